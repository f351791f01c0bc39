"""What `tune` found, in a table: what replays expect of each alternative, and what engines made of it.

Owns the rows and which of the settings are recommended. No engine, no model. Runs in the process of `tune`.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_specbranch.replay import Replayed
from vllm_specbranch.report import number, percent, table
from vllm_specbranch.tune_check import PLAIN, SEQUENTIAL, Ratios
from vllm_specbranch.tune_search import Settings

AS_IT_COMES, BOUND = "specbranch as it comes", "every outcome guessed (no policy can do more)"


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
        gamma: draft tokens of `draft_model`.
        expected: by name, what replays and calculations say; plain decoding first.
        candidates: settings of specbranch by name: as it comes, and the best that the search found.
        tried: speed of all settings that were replayed, relative to plain decoding.
        ratios: what engines made of `PLAIN`, `SEQUENTIAL` and the candidates; empty if they could not be run.
    """

    gamma: int
    expected: Mapping[str, Replayed]
    candidates: Mapping[str, Settings]
    tried: Sequence[tuple[Settings, float]]
    ratios: Ratios = field(default_factory=dict)

    @property
    def best(self) -> str:
        """The name of the quickest candidate: on engines, if they were run."""
        return max(self.candidates, key=self.speed)

    def speed(self, name: str) -> float:
        """Relative to plain decoding: the median of the runs, or what is expected."""
        if name in self.ratios:
            return statistics.median(self.ratios[name])
        return self.expected[PLAIN].time_s / self.expected[name].time_s

    def as_table(self) -> str:
        """The rows for people."""
        plain = self.expected[PLAIN]
        cells = []
        for name, one in self.expected.items():
            ratios = self.ratios.get(name)
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
        if name == SEQUENTIAL:
            return f"vLLM draft_model, {self.gamma} draft tokens (its best by replays)"
        if name in self.candidates and name != AS_IT_COMES:
            return f"specbranch: {name}"
        return "plain vLLM" if name == PLAIN else name

    def draft_model_advice(self, draft: str) -> str:
        """How to use vLLM's own method."""
        own = {"method": SEQUENTIAL, "model": draft, "num_speculative_tokens": self.gamma}
        return f"Use: --speculative-config '{json.dumps(own)}'\n"
