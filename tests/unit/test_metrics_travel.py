"""The way of our metrics from a worker's sample to `/metrics`, through vLLM's real scheduler, wire and loggers; no model."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.real_scheduler import Engine, make_config
from vllm_specbranch import patching, plugin
from vllm_specbranch.draft_distributions import SampledDraftTokenIds
from vllm_specbranch.messages import Report
from vllm_specbranch.metrics import METRICS, PREFIX, DraftServerCounters, EngineCounters
from vllm_specbranch.snapshots import Sample

OURS = [patch for patch in plugin.all_patches() if patch.process == "metrics"]


@pytest.fixture
def untouched_vllm() -> Iterator[None]:
    patching.revert(OURS)
    yield
    patching.revert(OURS)
    unregister_vllm_metrics()


class Line:
    """One engine, what its steps send to the API server, and that server's loggers."""

    def __init__(self) -> None:
        config = make_config(block_size=16, gamma=4, max_num_batched_tokens=64)
        self.engine = Engine(config, num_blocks=64)
        self.loggers = StatLoggerManager(config, engine_idxs=[0])
        self.counters = EngineCounters()
        update = self.engine.scheduler.update_from_output

        def update_and_tell(*args: Any) -> dict[int, EngineCoreOutputs]:
            outputs: dict[int, EngineCoreOutputs] = update(*args)
            for one in outputs.values():
                received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(one))
                self.loggers.record(received.scheduler_stats, None)
            self.loggers.log()
            return outputs

        self.engine.scheduler.update_from_output = update_and_tell  # type: ignore[method-assign]

    def step(self, life: int, num_hits: int) -> None:
        """One step of vLLM, and what the worker hands over after it."""
        self.engine.step()
        counters = DraftServerCounters(num_hits=num_hits).as_dict()
        state = {"is_alive": True, "is_ready": True, "reply_timeout_s": 0.05}
        sample = Sample(self.counters.as_dict(), state, Report(life, 1, 2, 3, 64, counters))
        drafts = SampledDraftTokenIds([], [], sample=sample)
        self.engine.scheduler.update_draft_token_ids(pickle.loads(pickle.dumps(drafts)))


def shown() -> dict[str, float]:
    lines = generate_latest(REGISTRY).decode().splitlines()
    found = {line.partition("{")[0]: float(line.split()[-1]) for line in lines if line.startswith(PREFIX)}
    return {name.removeprefix(PREFIX): value for name, value in found.items()}


def test_what_a_worker_counts_is_on_metrics_when_its_last_request_is_gone(untouched_vllm: None) -> None:
    line = Line()
    line.engine.add([1, 2, 3], max_tokens=6)
    for number in range(3):
        line.counters.num_replies += 1
        line.counters.wait_s += 0.25
        line.step(life=1, num_hits=10 * number)
    for number in range(3):
        line.step(life=2, num_hits=number)
    assert not line.engine.scheduler.has_unfinished_requests()
    line.engine.step()
    seen = shown()
    assert seen["hits_total"] == 20 + 2, "both lives of the draft server"
    assert (seen["replies_total"], seen["reply_wait_seconds_total"]) == (3, 0.75)
    assert (seen["draft_server_ready"], seen["draft_kv_blocks"]) == (1, 64)
    assert seen["reply_timeout_seconds"] == pytest.approx(0.05)
    assert [seen[name] for name in ("draft_requests", "draft_queued_rows", "draft_kv_blocks_held")] == [0, 0, 0]
    assert {one.suffix for one in METRICS if one.is_counter} <= seen.keys()
    assert seen["reclaimed_blocks_total"] == 0
