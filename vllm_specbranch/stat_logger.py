"""Our metrics on vLLM's `/metrics`: takes what the scheduler put on vLLM's statistics, and counts it in Prometheus.

Owns how they ride there: as entries of `num_kv_fetch_reqs_by_stage`, the one field of vLLM's `SchedulerStats` that is an open
mapping of names to whole numbers on both ends, and that does no harm to a reader who knows nothing of ours. Runs in the EngineCore
process (`put`) and in every API server (the rest).
"""

from collections.abc import Mapping
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from vllm_specbranch.metrics import METRICS, PREFIX, Metric


def put(news: Mapping[str, int], stats: SchedulerStats) -> None:
    """Let `news` ride on the statistics of a step."""
    if news:
        stats.num_kv_fetch_reqs_by_stage |= {PREFIX + key: value for key, value in news.items()}


def take(stats: SchedulerStats) -> dict[str, int]:
    """Take off what `put` put there, so that vLLM's own loggers do not see it."""
    field = stats.num_kv_fetch_reqs_by_stage
    return {key.removeprefix(PREFIX): field.pop(key) for key in list(field) if key.startswith(PREFIX)}


class SpecBranchStatLogger(AggregateStatLoggerBase):
    """One API server's share of the metrics of all engines; labels and kinds of metric are those of vLLM's own logger beside it.

    Counters stand at 0 from the start. A gauge appears with the first step of its engine, since nothing is known before.

    Args:
        prometheus: vLLM's logger.
    """

    def __init__(self, prometheus: PrometheusStatLogger) -> None:
        self._labels: dict[int, list[object]] = prometheus.per_engine_labelvalues
        self._metrics = {one.key: (one, self._create(one, prometheus)) for one in METRICS}
        for metric, collector in self._metrics.values():
            if metric.is_counter:
                for values in self._labels.values():
                    collector.labels(*values)

    @staticmethod
    def _create(metric: Metric, prometheus: PrometheusStatLogger) -> Any:
        labels = ["model_name", "engine"]
        if metric.is_counter:
            return prometheus._counter_cls(metric.name.removesuffix("_total"), metric.documentation, labelnames=labels)
        # As vLLM's own gauges: of several API servers the one that was told last knows.
        return prometheus._gauge_cls(
            metric.name, metric.documentation, labelnames=labels, multiprocess_mode="mostrecent"
        )

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any = None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Count what came with the statistics of one step."""
        del iteration_stats, mm_cache_stats
        if scheduler_stats is None or engine_idx not in self._labels:
            return
        for key, value in take(scheduler_stats).items():
            if key not in self._metrics:
                continue
            metric, collector = self._metrics[key]
            child = collector.labels(*self._labels[engine_idx])
            (child.inc if metric.is_counter else child.set)(value * metric.unit)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def join(manager: Any) -> None:
    """Put our logger before the others of a `StatLoggerManager`, which must not see what rides on the statistics."""
    prometheus = next(one for one in manager.stat_loggers if isinstance(one, PrometheusStatLogger))
    manager.stat_loggers.insert(0, SpecBranchStatLogger(prometheus))
