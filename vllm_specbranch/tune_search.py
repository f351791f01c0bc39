"""Which settings are the quickest, and whether they are worth having. Pure decisions; what a setting takes is asked of the caller.

Owns the search and the verdict. Runs in the process of `tune`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Settings = dict[str, object]

# Keys that a search varies, with their values; those that a policy does not have are left out.
VALUES: Mapping[str, Sequence[object]] = {
    "num_speculative_tokens": (2, 3, 4, 6, 8, 12, 16),
    "stop_threshold": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
    "max_branches": (1, 2, 4, 8, 16, 32, 64),
    # Around `auto`, which waits by what it has measured: never, and always for so many tokens.
    "on_miss": ("go", "auto", "wait:2"),
}
KEYS: Mapping[str, Sequence[str]] = {
    "specbranch": ("num_speculative_tokens", "stop_threshold", "max_branches", "on_miss"),
    "best_first": ("num_speculative_tokens", "max_branches", "on_miss"),
    "fanout": ("num_speculative_tokens", "max_branches", "on_miss"),
    "pearl": ("num_speculative_tokens",),
}
# Where a search starts, for each policy; the first one is what a user gets who says nothing.
STARTS: Sequence[Settings] = (
    {"policy": "best_first", "num_speculative_tokens": 8, "max_branches": 32, "on_miss": "auto"},
    {"policy": "specbranch", "num_speculative_tokens": 8, "stop_threshold": 0.1, "max_branches": 8, "on_miss": "auto"},
    {"policy": "fanout", "num_speculative_tokens": 8, "max_branches": 16, "on_miss": "auto"},
    {"policy": "pearl", "num_speculative_tokens": 8},
)
# How many policies are searched further than their start, and how often all keys of one are gone through.
NUM_SEARCHED = 2
MAX_PASSES = 2
# A value is changed for at least this gain: less is chance on so few prompts.
MIN_GAIN = 0.005
# Less than this over plain decoding is not worth a second model; over what needs no second device, not worth that device.
MIN_SPEED_UP = 1.05

OnTried = Callable[[Settings, float, bool], None]


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes:
        speed: in whatever unit the caller measures.
        num_tried: settings that were measured.
    """

    settings: Settings
    speed: float
    num_tried: int


class Search:
    """A coordinate search: one key after the other, all its values, the best one is kept; until nothing changes.

    Args:
        speed_of: measures settings; more is better.
        seed: of the order of keys.
        on_tried: told about each measurement: settings, speed, whether it is the best so far.
    """

    def __init__(self, speed_of: Callable[[Settings], float], seed: int = 0, on_tried: OnTried | None = None) -> None:
        self._speed_of = speed_of
        self._random = random.Random(seed)
        self._on_tried = on_tried
        self._known: dict[tuple[tuple[str, object], ...], float] = {}
        self._best = 0.0

    def run(self, starts: Sequence[Settings] = STARTS) -> Found:
        """Search from the best few of some starts."""
        ranked = sorted(starts, key=lambda one: -self._speed(one))
        found = [self._climb(dict(one)) for one in ranked[:NUM_SEARCHED]]
        best = max(found, key=self._speed)
        return Found(best, self._speed(best), len(self._known))

    def _climb(self, settings: Settings) -> Settings:
        keys = list(KEYS[str(settings["policy"])])
        self._random.shuffle(keys)
        for _ in range(MAX_PASSES):
            before = dict(settings)
            for key in keys:
                settings = self._best_value(settings, key)
            if settings == before:
                break
        return settings

    def _best_value(self, settings: Settings, key: str) -> Settings:
        """Go from the present value both ways, as long as it gets better."""
        values = VALUES[key]
        best = settings
        for way in (1, -1):
            place = values.index(settings[key]) + way
            while 0 <= place < len(values):
                tried = {**settings, key: values[place]}
                if self._speed(tried) < self._speed(best) * (1 + MIN_GAIN):
                    break
                best = tried
                place += way
        return best

    def _speed(self, settings: Settings) -> float:
        key = tuple(sorted(settings.items()))
        if key not in self._known:
            speed = self._known[key] = self._speed_of(settings)
            is_best, self._best = speed > self._best, max(speed, self._best)
            if self._on_tried is not None:
                self._on_tried(settings, speed, is_best)
        return self._known[key]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a pair.

    Attributes:
        method: the quickest that is worth it; `plain` if none is.
        reason: one or two sentences.
    """

    method: Literal["plain", "draft_model", "specbranch"]
    reason: str


@dataclass(frozen=True, slots=True)
class Speeds:
    """What is judged, relative to plain decoding.

    Attributes:
        ours, sequential: of specbranch and of `draft_model`; None for a `draft_model` that cannot be run.
        gamma: draft tokens of `draft_model`.
        least: of the runs of specbranch, the slowest; None where nothing was run: the speeds are those of replays.
    """

    ours: float
    sequential: float | None
    gamma: int | None
    least: float | None = None


def judge(speeds: Speeds, *, acceptance: float, c: float, runs_on: str, alone_on: str) -> Verdict:
    """Decide what is worth having.

    Args:
        acceptance: chance that a drafted token is the target's, 0..1.
        c: draft steps in one target round.
        runs_on, alone_on: cores or devices of specbranch, and of the other two, in words.
    """
    ours, sequential = speeds.ours, speeds.sequential or 0.0
    own = f"draft_model {sequential:.2f} times" if speeds.sequential else "draft_model could not be run"
    if ours >= MIN_SPEED_UP * max(1.0, sequential):
        verb, basis = (
            ("should decode", "by replays") if speeds.least is None else ("decoded", "in the median of these runs")
        )
        own_best = f"draft_model with {speeds.gamma} draft tokens {sequential:.2f} times" if speeds.sequential else own
        reason = (
            f"specbranch {verb} {ours:.2f} times as fast as plain vLLM for this pair, {basis}, and {own_best}. specbranch runs on "
            f"{runs_on}, the other two on {alone_on}."
        )
        if speeds.least is not None and speeds.least <= 1.0:
            reason += (
                f" But once it was {speeds.least:.2f} times: run this again on a quieter machine, or with more prompts."
            )
        return Verdict("specbranch", reason)
    if sequential >= MIN_SPEED_UP:
        return Verdict(
            "draft_model",
            f"vLLM's own draft_model with {speeds.gamma} draft tokens is better for this pair: {sequential:.2f} times plain "
            f"decoding, specbranch {ours:.2f} times (at least {MIN_SPEED_UP:.2f} times as much would pay for its devices: it runs "
            f"on {runs_on}, draft_model on {alone_on}).",
        )
    why = []
    if c < 3:
        why.append(f"a round of the target takes only {c:.1f} draft steps (below 3 there is little to gain)")
    if acceptance < 0.4:
        why.append(f"only {acceptance:.0%} of the draft's first choices are the target's tokens")
    because = " and ".join(why) or "what drafting saves is lost again to its overhead"
    return Verdict(
        "plain",
        f"Speculation is not worth it for this pair: {because} (specbranch {ours:.2f} times plain decoding, {own}).",
    )
