"""What `tune` found, in a table: what replays expect of each alternative, and what engines made of it.

Owns the rows and which of the settings are recommended. No engine, no model. Runs in the process of `tune`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_specbranch.replay import Replayed
from vllm_specbranch.report import number, percent, table
from vllm_specbranch.tune_check import Ratios, sequential_name
from vllm_specbranch.tune_search import Settings

PLAIN, AS_IT_COMES = "plain vLLM", "specbranch as it comes"
BOUND = "every outcome guessed (no policy can do more)"


def label(settings: Settings) -> str:
    """Settings in a few words."""
    words = [f"{settings['policy']}, {settings['num_speculative_tokens']} draft tokens"]
    if "max_branches" in settings:
        words.append(f"{settings['max_branches']} branches")
    if "stop_threshold" in settings:
        words.append(f"threshold {settings['stop_threshold']:g}")
    if settings.get("on_miss", "auto") != "auto":
        words.append(f"on a miss {settings['on_miss']}")
    return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Report:
    """What the search found, and what it is held against.

    Attributes:
        gammas: draft tokens of `draft_model`: its best by replays, and one more.
        expected: by name, what replays and calculations say; plain decoding first.
        candidates: settings of specbranch by name: as it comes, and the best that the search found.
        tried: speed of all settings that were replayed, relative to plain decoding.
        ratios: what engines made of `draft_model` and the candidates; without those that could not be run.
    """

    gammas: Sequence[int]
    expected: Mapping[str, Replayed]
    candidates: Mapping[str, Settings]
    tried: Sequence[tuple[Settings, float]]
    ratios: Ratios = field(default_factory=dict)

    @property
    def is_checked(self) -> bool:
        """Whether an engine has run a candidate: what engines say and what replays expect is never compared."""
        return any(name in self.ratios for name in self.candidates)

    @property
    def best(self) -> str:
        """The name of the quickest candidate."""
        return max((name for name in self.candidates if self._counts(name)), key=self.speed)

    @property
    def best_gamma(self) -> int | None:
        """Draft tokens that `draft_model` was quickest with; None if no engine could run it."""
        known = [gamma for gamma in self.gammas if self._counts(sequential_name(gamma))]
        return max(known, key=lambda gamma: self.speed(sequential_name(gamma)), default=None)

    def _counts(self, name: str) -> bool:
        return name in self.ratios or not self.is_checked

    def speed(self, name: str) -> float:
        """Relative to plain decoding: the median of the runs, or what is expected where no candidate was run."""
        if self.is_checked:
            return statistics.median(self.ratios[name])
        return self.expected[PLAIN].time_s / self.expected[name].time_s

    def as_table(self) -> str:
        """The rows for people."""
        plain = self.expected[PLAIN]
        cells = []
        for name, one in self.expected.items():
            ratios = self.ratios.get(name) if self.is_checked else None
            cells.append(
                [
                    self._words(name),
                    number(one.tokens_per_s / plain.tokens_per_s, 2, "x"),
                    f"{self.speed(name):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "-",
                    number(one.mean_acceptance_length),
                    percent(one.server["num_hits"] / one.num_rounds) if one.server else "-",
                    percent(one.wait_s / one.time_s) if one.server else "-",
                ]
            )
        headers = ["relative to plain vLLM", "expected", "on engines", "acceptance length", "hits", "time waiting"]
        return table(headers, cells)

    def _words(self, name: str) -> str:
        return f"specbranch: {name}" if name in self.candidates and name != AS_IT_COMES else name

    def draft_model_advice(self, draft: str) -> str:
        """How to use vLLM's own method."""
        own = {"method": "draft_model", "model": draft, "num_speculative_tokens": self.best_gamma}
        return f"Use: --speculative-config '{json.dumps(own)}'\n"
