"""Our metrics on `/metrics`: what rides on vLLM's statistics, who takes it off, and what a scrape shows then."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import vllm
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats

from vllm_specbranch import patching, plugin, stat_logger
from vllm_specbranch.metrics import METRICS, PREFIX

OURS = [patch for patch in plugin.all_patches() if patch.process == "metrics"]
ENGINES = [0, 1]


@pytest.fixture
def patched() -> Iterator[None]:
    plugin.apply_metrics_patches()
    yield
    patching.revert(OURS)


@pytest.fixture
def bare_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """VLLM's loggers without the engine that they describe: labels only."""

    def make(self: Any, vllm_config: Any, engine_indexes: list[int]) -> None:
        unregister_vllm_metrics()
        self.vllm_config = vllm_config
        self.per_engine_labelvalues = {index: ["pair", str(index)] for index in engine_indexes}

    monkeypatch.setattr(PrometheusStatLogger, "__init__", make)
    monkeypatch.setattr(PrometheusStatLogger, "record", lambda *_, **__: None)
    yield
    unregister_vllm_metrics()


def manager(speculative_config: Any) -> StatLoggerManager:
    config: Any = SimpleNamespace(speculative_config=speculative_config)
    return StatLoggerManager(config, engine_idxs=ENGINES, enable_default_loggers=False)


def ours() -> StatLoggerManager:
    return manager(SimpleNamespace(specbranch="settings"))


def shown() -> dict[str, float]:
    lines = generate_latest(REGISTRY).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.split()[-1]) for line in lines if line.startswith(PREFIX)}


def stats(**news: int) -> SchedulerStats:
    made = SchedulerStats()
    stat_logger.put({key.replace("__", "."): value for key, value in news.items()}, made)
    return made


def over_the_wire(sent: SchedulerStats) -> SchedulerStats:
    data = msgspec.msgpack.encode(EngineCoreOutputs(scheduler_stats=sent))
    received = msgspec.msgpack.decode(data, type=EngineCoreOutputs).scheduler_stats
    assert received is not None
    return received


def series(suffix: str, engine: int) -> str:
    return f'{PREFIX}{suffix}{{engine="{engine}",model_name="pair"}}'


def test_what_is_put_on_the_statistics_survives_vllm_s_wire_and_is_taken_off() -> None:
    sent = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 2})
    stat_logger.put({"server.num_hits": 3, "state.is_ready": 1}, sent)
    received = over_the_wire(sent)
    assert stat_logger.take(received) == {"server.num_hits": 3, "state.is_ready": 1}
    assert received.num_kv_fetch_reqs_by_stage == {"in_progress": 2}
    assert stat_logger.take(received) == {}


def test_counters_add_up_and_gauges_show_the_last_per_engine(patched: None, bare_loggers: None) -> None:
    loggers = ours()
    loggers.record(
        over_the_wire(stats(server__num_hits=3, engine__wait_s=250_000, state__is_ready=1)), None, engine_idx=1
    )
    loggers.record(
        over_the_wire(stats(server__num_hits=4, engine__wait_s=250_000, state__is_ready=0)), None, engine_idx=1
    )
    loggers.record(over_the_wire(stats(server__num_hits=1)), None, engine_idx=0)
    seen = shown()
    assert (seen[series("hits_total", 0)], seen[series("hits_total", 1)]) == (1, 7)
    assert seen[series("reply_wait_seconds_total", 1)] == 0.5
    assert seen[series("draft_server_ready", 1)] == 0
    assert series("draft_server_ready", 0) not in seen, "nothing is known of an engine that has not stepped"


def test_counters_stand_at_0_from_the_start_and_names_are_those_of_the_table(patched: None, bare_loggers: None) -> None:
    loggers = ours()
    counters = {series(one.suffix, engine) for one in METRICS if one.is_counter for engine in ENGINES}
    assert {name for name in shown() if "_created" not in name} == counters
    assert set(shown().values()) >= {0.0}
    loggers.record(stats(**{one.key.replace(".", "__"): 1 for one in METRICS}), None, engine_idx=0)
    assert counters | {series(one.suffix, 0) for one in METRICS} <= set(shown())


def test_statistics_without_ours_and_keys_of_another_version_do_no_harm(patched: None, bare_loggers: None) -> None:
    loggers = ours()
    before = shown()
    for one in (None, SchedulerStats(), stats(server__num_marvels=3)):
        loggers.record(one, None, engine_idx=0)
    loggers.record(stats(server__num_hits=3), None, engine_idx=7)
    assert shown() == before


def test_our_logger_comes_first_so_that_vllm_s_do_not_see_what_is_ours(patched: None, bare_loggers: None) -> None:
    loggers = ours()
    assert isinstance(loggers.stat_loggers[0], stat_logger.SpecBranchStatLogger)
    seen: list[dict[str, int]] = []
    loggers.stat_loggers[-1].record = lambda one, *_, **__: seen.append(dict(one.num_kv_fetch_reqs_by_stage))  # type: ignore
    loggers.record(stats(server__num_hits=3), None, engine_idx=0)
    assert seen == [{}]


@pytest.mark.parametrize("speculative_config", [None, SimpleNamespace(method="ngram")])
def test_engines_of_other_methods_show_nothing_of_ours(
    speculative_config: Any, patched: None, bare_loggers: None
) -> None:
    ours()
    assert shown()
    plain = manager(speculative_config)
    assert shown() == {}
    assert not [one for one in plain.stat_loggers if isinstance(one, stat_logger.SpecBranchStatLogger)]


def test_before_an_engine_of_ours_is_made_vllm_is_untouched() -> None:
    patching.revert(OURS)
    before = StatLoggerManager.__init__
    plugin.register()
    assert StatLoggerManager.__init__ is before


def test_the_patch_raises_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(patching.PatchError, match=r"0\.33\.0"):
        plugin.apply_metrics_patches()
