"""The length head on real engines: its features are transformers' hidden states, and no head changes what is generated."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import RunEngine, last_core
from tests.feature_reference import NUM_LAYERS, check_features
from tests.heads import make_head

NUM_TOKENS = 48
CHUNK = 64


def num_classes(status: dict[str, Any]) -> list[int]:
    return [status["engine"][f"num_head_classes_{one}"] for one in range(3)]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = Path(tmp_path_factory.mktemp("heads"))
    return {kind: make_head(folder / kind, kind) for kind in ("0", "2", "random")}


def test_features_are_transformers_hidden_states_and_any_head_leaves_greedy_answers_as_they_are(
    run_engine: RunEngine,
    prompts: list[list[int]],
    assert_same: Any,
    plain_answers: list[list[int]],
    heads: dict[str, str],
) -> None:
    """Prefills in chunks, preemptions, batches that mix prompts and rounds; then each head in turn on the same engine."""
    assert max(map(len, prompts[:16])) > CHUNK
    common = {"prompts": prompts[:16], "max_tokens": NUM_TOKENS, "batch_size": 16, "with_status": True}
    watched = common | {"prompts": prompts[:12], "max_tokens": 24, "batch_size": 12, "with_features": True}
    jobs = [watched, *(common | {"head": heads[kind]} for kind in heads)]
    result = run_engine(
        jobs,
        speculative={"length_head": heads["random"], "on_miss": "wait:2", "reply_timeout_ms": 1000},
        max_num_batched_tokens=CHUNK,
        num_gpu_blocks_override=60,
    )
    (records,) = result["jobs"][0]["features"]
    found = check_features(records)
    print(f"rounds: {found}")
    assert all(found[kind] >= 3 for kind in ("first", "none accepted", "some", "all")), found
    assert result["metrics"]["vllm:num_preemptions"] > 0
    before = num_classes(result["jobs"][0]["status"])
    engine = result["jobs"][0]["status"]["engine"]
    print(f"head: {1e6 * engine['head_s'] / engine['num_commit_batches']:.0f} us a step, observer not counted")
    assert sum(before) == len(records)
    assert min(before) > 0, "a random head says everything"
    for kind, done in zip(heads, result["jobs"][1:], strict=True):
        assert_same(done["answers"], [answer[:NUM_TOKENS] for answer in plain_answers[:16]])
        said = [now - then for now, then in zip(num_classes(done["status"]), before, strict=True)]
        before = num_classes(done["status"])
        print(f"head {kind}: classes {said}")
        assert all((one > 0) == (kind in ("random", str(index))) for index, one in enumerate(said))


@pytest.mark.long
def test_compiled_graphs_with_features_beside_those_without(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, assert_same: Any, heads: dict[str, str]
) -> None:
    """One cache for all engines of this machine: a graph that was compiled without hidden states cannot be taken for one with."""
    common = {"prompts": prompts[:16], "max_tokens": num_new_tokens, "batch_size": 16, "with_status": True}
    watched = common | {"prompts": prompts[:4], "max_tokens": 16, "batch_size": 4, "with_features": True}
    settings: dict[str, Any] = {"enforce_eager": False}
    plain = run_engine([common], speculative={"policy": "fanout"}, **settings)
    ours = run_engine([common, watched], speculative={"policy": "fanout", "length_head": heads["random"]}, **settings)
    assert_same(plain["jobs"][0]["answers"])
    assert_same(ours["jobs"][0]["answers"])
    assert num_classes(plain["status"]) == [0, 0, 0]
    assert sum(num_classes(ours["status"])) > 0
    (records,) = ours["jobs"][1]["features"]
    assert sum(check_features(records).values()) == len(records) > 16


@pytest.mark.long
def test_features_of_two_ranks(
    run_engine: RunEngine, prompts: list[list[int]], assert_same: Any, plain_answers: list[list[int]]
) -> None:
    """The embedding is split over the ranks; one that left the look-up out would hang the other."""
    import os

    cores = sorted(os.sched_getaffinity(0))
    job = {"prompts": prompts[:6], "max_tokens": 24, "batch_size": 6, "with_features": True}
    result = run_engine(
        [job],
        speculative={"draft_cpu_cores": last_core(), "head_layers": NUM_LAYERS, "reply_timeout_ms": 1000},
        environment={"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"},
        tensor_parallel_size=2,
    )
    done = result["jobs"][0]
    records, other = done["features"]
    assert other == [], "one rank speaks for all"
    found = check_features(records)
    assert found["none accepted"] + found["some"] + found["all"] > 10, found
    assert_same(done["answers"], [answer[:24] for answer in plain_answers[:6]])
