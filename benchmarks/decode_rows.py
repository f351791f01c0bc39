"""Which engines `bench_decode` compares: the groups that `--rows` names, their order, and where each engine runs.

Owns the choice and the type of a row; starts nothing and computes no statistics. Runs in the process of the benchmark.
"""

import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from vllm_specbranch.compare import Difference
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.lineup import Lineup, Placement
from vllm_specbranch.measure_messages import EngineSpec, RunResult

BASELINE = "plain"
SEQUENTIAL = "draft_model"
PEARL = "pearl"
WIDE = "wide"
POLICIES = (PEARL, "specbranch", "fanout", "best_first")
ABLATED = "specbranch"
# What is taken away from the ablated policy, one thing at a time.
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "no branches": {"max_branches": 1},
    "no cut": {"stop_rule": "none"},
    "fixed k": {"branch_rule": "fixed"},
}
# `plain` is always there, as the baseline. `async_off` is plain vLLM without asynchronous scheduling, which our method turns off;
# where vLLM never schedules asynchronously (CPUs), it is a second plain engine, and its ratio shows the noise of the run.
# `no_plugin` is plain vLLM that does not load this project at all: what being installed and not chosen costs. `wide`
# adds plain and draft_model on the cores of target and draft together: as many devices as our rows have; not under emulation.
GROUPS = (BASELINE, "async_off", "no_plugin", SEQUENTIAL, "ngram", *POLICIES, "ablations", WIDE)
DEFAULT_GROUPS = (BASELINE, "async_off", SEQUENTIAL, "ngram", PEARL, "specbranch", "best_first", WIDE)


@dataclass(slots=True)
class Entry:
    """An engine of the comparison.

    Attributes:
        group: one of `GROUPS` less `wide`.
        runs_on: its cores or devices, for people.
        num_devices: how many of them.
        is_wide: whether it has the devices of target and draft together for one model at a time.
        facts: what vLLM made of the settings; filled in when it has started.
    """

    spec: EngineSpec
    group: str
    runs_on: str
    num_devices: int
    is_wide: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.spec.name

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's method."""
        return self.group in (*POLICIES, "ablations")


@dataclass(slots=True)
class Row:
    """One line of a table: an engine under one condition, and what it did, one run per repetition.

    Attributes:
        batch_size: requests at the same time.
        differences: from the first repetition of the baseline, in any repetition.
    """

    entry: Entry
    batch_size: int = 1
    runs: list[RunResult] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.entry.name

    @property
    def tokens_per_s(self) -> list[float]:
        """Of steady decoding, one value per repetition; see `steady_tokens_per_s`."""
        return [steady_tokens_per_s(run, self.batch_size) for run in self.runs]

    @property
    def num_steady_steps(self) -> list[int]:
        """How many engine steps `tokens_per_s` is made of, one value per repetition; 0 where it is that of the whole run."""
        return [steady(run, self.batch_size).num_steps for run in self.runs]

    @property
    def whole_run_tokens_per_s(self) -> list[float]:
        """With prefills, and with the end of the run, where fewer requests are left; one value per repetition."""
        return [run.num_tokens / run.wall_s for run in self.runs]

    @property
    def sameness(self) -> str:
        """`identical`, `ties`, or `DIFFERENT`."""
        if not self.differences:
            return "identical"
        return "ties" if all(one.is_tie for one in self.differences) else "DIFFERENT"

    def ratios(self, to: "Row") -> list[float]:
        """Speed relative to another row, repetition by repetition."""
        return _ratios(self.tokens_per_s, to.tokens_per_s)

    def whole_run_ratios(self, to: "Row") -> list[float]:
        """The same for the whole run."""
        return _ratios(self.whole_run_tokens_per_s, to.whole_run_tokens_per_s)


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


@dataclass(frozen=True, slots=True)
class Steady:
    """The engine steps of a run in which a full batch decodes and none is prefilled."""

    num_steps: int
    num_tokens: int
    seconds: float


def steady(run: RunResult, batch_size: int) -> Steady:
    """Find the engine steps in which `batch_size` requests decode and none is prefilled.

    On CPUs a prefill costs many rounds, the same for every method; and requests that speculation ends early leave smaller batches
    behind. Neither says how fast a full batch decodes.
    """
    traces = [one for one in run.requests if one.output_times_s]
    firsts = sorted(one.output_times_s[0] for one in traces)
    lasts = sorted(one.output_times_s[-1] for one in traces)
    tokens: dict[float, int] = defaultdict(int)
    for trace in traces:
        for time_s, size in zip(trace.output_times_s, trace.output_sizes, strict=True):
            tokens[time_s] += size
    num_steps, num_tokens, seconds = 0, 0, 0.0
    for start_s, end_s in pairwise(sorted(tokens)):
        num_decoding = bisect_right(firsts, start_s) - bisect_left(lasts, end_s)
        if num_decoding == batch_size:
            num_steps, num_tokens, seconds = num_steps + 1, num_tokens + tokens[end_s], seconds + end_s - start_s
    return Steady(num_steps, num_tokens, seconds)


def steady_tokens_per_s(run: RunResult, batch_size: int) -> float:
    """Speed of the steady steps; of the whole run where there was none."""
    found = steady(run, batch_size)
    return found.num_tokens / found.seconds if found.seconds else run.num_tokens / run.wall_s


def entries(
    lineup: Lineup,
    groups: Sequence[str],
    gammas: Sequence[int],
    num_tokens: int,
    settings: Mapping[str, Mapping[str, Any]],
) -> list[Entry]:
    """All engines of the comparison, the baseline first.

    Args:
        groups: of `GROUPS`, in any order.
        gammas: draft tokens of draft_model, one engine for each.
        num_tokens: draft tokens of ngram and of our policies.
        settings: more keys of `speculative_config`, by policy.

    Raises:
        ConfigError: settings that our method refuses.
    """
    found = [*_plain(lineup, groups), *_sequential(lineup, groups, gammas, is_wide=False)]
    if "ngram" in groups:
        found.append(Entry(lineup.ngram(num_tokens), "ngram", lineup.placement.describe(False), 1))
    found += _sequential(lineup, groups, gammas, is_wide=True)
    return found + list(_ours(lineup, groups, num_tokens, settings))


def rivals(rows: Sequence[Row]) -> list[Row]:
    """What a row of ours is held against, besides the baseline: draft_model at its best on the target's cores and on all cores, and
    pearl.

    The best number of draft tokens is chosen by the very numbers that are compared, which favours the rival.
    """
    found = []
    for is_wide in (False, True):
        group = [row for row in rows if row.entry.group == SEQUENTIAL and row.entry.is_wide == is_wide]
        found += sorted(group, key=lambda row: -statistics.median(row.tokens_per_s))[:1]
    return found + [row for row in rows if row.name == PEARL]


def _plain(lineup: Lineup, groups: Sequence[str]) -> Iterator[Entry]:
    runs_on = lineup.placement.describe(with_draft=False)
    num_devices = max(1, len(lineup.placement.target_cores))
    yield Entry(lineup.plain(BASELINE), BASELINE, runs_on, num_devices)
    if "async_off" in groups:
        spec = lineup.plain(f"{BASELINE}, async off", async_scheduling=False)
        yield Entry(spec, "async_off", runs_on, num_devices)
    if "no_plugin" in groups:
        spec = msgspec.structs.replace(lineup.plain(f"{BASELINE}, no plugin"), plugins=False)
        yield Entry(spec, "no_plugin", runs_on, num_devices)


def _sequential(lineup: Lineup, groups: Sequence[str], gammas: Sequence[int], is_wide: bool) -> Iterator[Entry]:
    """draft_model on the target's cores; or, with plain before it, on the cores of target and draft together."""
    places = lineup.placement
    cores, suffix = places.target_cores, ""
    if is_wide:
        cores = tuple(sorted({*places.target_cores, *places.draft_cores}))
        suffix = f" on {len(cores)} cores"
        if WIDE not in groups or cores == places.target_cores:
            return
    runs_on = Placement(cores, (), places.target_device).describe(with_draft=False)
    num_devices = max(1, len(cores))
    if is_wide:
        yield Entry(lineup.plain(BASELINE + suffix, cores), BASELINE, runs_on, num_devices, is_wide)
    for gamma in gammas if SEQUENTIAL in groups else ():
        spec = lineup.draft_model(gamma, f"{SEQUENTIAL} {gamma}{suffix}", cores)
        yield Entry(spec, SEQUENTIAL, runs_on, num_devices, is_wide)


def _ours(
    lineup: Lineup, groups: Sequence[str], num_tokens: int, settings: Mapping[str, Mapping[str, Any]]
) -> Iterator[Entry]:
    places = lineup.placement
    devices: set[int | None] = {*places.target_cores, *places.draft_cores} or {
        places.target_device,
        places.draft_device,
    }
    wanted: list[tuple[str, str, str, Mapping[str, Any]]] = [
        (policy, policy, policy, {}) for policy in POLICIES if policy in groups
    ]
    if "ablations" in groups:
        wanted += [("ablations", f"{ABLATED}, {what}", ABLATED, less) for what, less in ABLATIONS.items()]
    for group, name, policy, less in wanted:
        # Keys that are a matter of one policy only are given to that one.
        keys = {"policy": policy, **settings.get(policy, {}), **less}
        spec = lineup.specbranch(num_tokens, name, **keys)
        assert spec.speculative is not None
        # Before any engine starts: a wrong key would be found out minutes later.
        SpecBranchConfig.from_user(spec.speculative)
        yield Entry(spec, group, places.describe(with_draft=True), len(devices))
