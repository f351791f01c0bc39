"""How the numbers of `metrics` travel from the target's worker to the API servers: totals to the scheduler, differences from there.

    draft server    Report, on every final reply                                   counters of one life of the server
    target worker   Sample, on every step's draft token ids                        the same, and the engine's since its start
    EngineCore      SnapshotMaker -> Snapshot, now and then                        counters since the engine's start
                    MetricsFeed -> whole numbers on vLLM's own SchedulerStats      what was added since the last ones went out
    API servers     `stat_logger`

Counters leave the EngineCore as differences because vLLM gives the statistics of a step to one API server, whichever has outputs
in it, and Prometheus adds up what all of them have counted. Pure Python; says nothing of vLLM or Prometheus.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_specbranch.messages import Report
from vllm_specbranch.metrics import METRICS

# So often at most an API server is told. A scrape is seconds apart.
FEED_PERIOD_S = 0.5


class Sample(NamedTuple):
    """What a worker knows after a step; made and sent at every one, so it holds things as they are.

    Attributes:
        counters: of the engine, by name.
        state: gauges of the engine's side, by name; seconds where the name ends in `_s`.
        report: of the draft server, if one came with this step's reply.
    """

    counters: dict[str, float]
    state: dict[str, float]
    report: Report | None


Snapshot = dict[str, int]
"""By the key of a `Metric`: counters since the engine's start, and gauges."""

_COUNTERS = frozenset(one.key for one in METRICS if one.is_counter)
_GAUGES = frozenset(one.key for one in METRICS if not one.is_counter)
_OF_REQUESTS = frozenset(one.key for one in METRICS if one.is_of_requests)
_SECONDS = frozenset(one.key for one in METRICS if one.unit == 1e-6)


@dataclass(slots=True)
class ServerTotals:
    """The counters of all lives of a draft server together: they go on where a restarted one begins at 0 again."""

    _life: int | None = None
    _ended: dict[str, int] = field(default_factory=dict)
    _current: dict[str, int] = field(default_factory=dict)

    def update(self, report: Report) -> None:
        """Take in how the server stands now."""
        if report.life != self._life:
            self._ended = self.as_dict()
            self._life = report.life
        self._current = report.counters

    def as_dict(self) -> dict[str, int]:
        """Name to value."""
        if not self._ended:
            return self._current
        names = self._ended.keys() | self._current.keys()
        return {name: self._ended.get(name, 0) + self._current.get(name, 0) for name in names}


@dataclass(slots=True)
class SnapshotMaker:
    """Makes the snapshots of one engine, in its EngineCore."""

    _totals: ServerTotals = field(default_factory=ServerTotals)
    _report: Report | None = None

    _sample: Sample | None = None

    def update(self, sample: Sample) -> None:
        """Take in what came from the worker."""
        self._sample = sample
        if sample.report is not None:
            self._totals.update(sample.report)
            self._report = sample.report

    def make(self) -> Snapshot:
        """Return what is known now; empty before there was a sample."""
        if self._sample is None:
            return {}
        counters = self._sample.counters
        values: dict[str, float] = {f"engine.{name}": value for name, value in counters.items()}
        values["engine.num_server_restarts"] = max(0, counters.get("num_server_starts", 0) - 1)
        values |= {f"server.{name}": value for name, value in self._totals.as_dict().items()}
        values |= {f"state.{name}": value for name, value in self._sample.state.items()}
        if self._report is not None:
            values["state.num_requests"] = self._report.num_requests
            values["state.num_queued_rows"] = self._report.num_queued_rows
            values["state.num_blocks_held"] = self._report.num_blocks_held
            values["state.num_blocks"] = self._report.num_blocks
        return {key: round(1e6 * value) if key in _SECONDS else int(value) for key, value in values.items()}


class MetricsFeed:
    """Says in the EngineCore what the API servers are to add and to show, now and then.

    Args:
        make: of the newest snapshot; called when it is time only.
    """

    def __init__(self, make: Callable[[], Snapshot]) -> None:
        self._make = make
        self._told: dict[str, int] = {}
        self._told_s = -FEED_PERIOD_S

    def take(self, now_s: float, scheduler: Mapping[str, int], *, is_idle: bool) -> dict[str, int]:
        """What has been counted since the last call that returned something, and all gauges; empty when it is not time.

        Args:
            now_s: monotonic.
            scheduler: the scheduler's own counters.
            is_idle: whether no request is left; no step may follow then for long, so everything goes out.
        """
        if now_s - self._told_s < FEED_PERIOD_S and not is_idle:
            return {}
        snapshot = self._make()
        if not snapshot:
            return {}
        self._told_s = now_s
        news: dict[str, int] = {}
        for key, value in (
            *snapshot.items(),
            *((f"scheduler.{name}", count) for name, count in scheduler.items()),
        ):
            if key in _GAUGES:
                news[key] = 0 if is_idle and key in _OF_REQUESTS else value
            elif key in _COUNTERS and value > self._told.get(key, 0):
                news[key] = value - self._told.get(key, 0)
                self._told[key] = value
        return news
