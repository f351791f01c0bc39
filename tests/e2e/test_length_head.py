"""The length head on real engines: its features are transformers' hidden states, and no head changes what is generated."""

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import RunEngine, last_core
from tests.e2e.head_probe import Record
from tests.heads import HIDDEN_SIZE, NUM_TARGET_LAYERS, make_head
from tests.model_paths import TARGET

NUM_LAYERS = 4
NUM_TOKENS = 48
CHUNK = 64
# Of the largest value of a layer: float32 through six layers in two implementations. Other rows are far further off.
TOLERANCE = 1e-4


@functools.cache
def reference_model() -> tuple[Any, list[Any]]:
    """The target by transformers, and a list that its last layer appends its output to: transformers returns that one behind the
    final norm only.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    outputs: list[Any] = []
    model.model.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output if torch.is_tensor(output) else output[0])
    )
    return model, outputs


def reference(tokens: list[int]) -> tuple[Any, Any]:
    """By transformers: the residual stream after each of the last K layers `[K, n, hidden_size]`, and the embeddings."""
    import torch

    model, last = reference_model()
    last.clear()
    with torch.inference_mode():
        ids = torch.tensor([tokens])
        states = model(ids, output_hidden_states=True).hidden_states
        after = [*states[NUM_TARGET_LAYERS - NUM_LAYERS + 1 : NUM_TARGET_LAYERS], last[0]]
        return torch.stack([one[0] for one in after]), model.get_input_embeddings()(ids)[0]


def check_features(records: list[Record]) -> dict[str, int]:
    """Assert that every row is the right one; returns how many rounds there were of each kind."""
    import torch

    kinds = {"first": 0, "no drafts": 0, "none accepted": 0, "some": 0, "all": 0}
    for name in {record[0] for record in records}:
        own = [record for record in records if record[0] == name]
        longest = max((record[1] for record in own), key=len)
        states, embeddings = reference(longest)
        before = None
        for _, tokens, num_drafts, z in own:
            assert tokens == longest[: len(tokens)]
            row = torch.tensor(z).view(NUM_LAYERS + 1, HIDDEN_SIZE)
            position = len(tokens) - 2
            scale = states[:, position].abs().amax(dim=1, keepdim=True)
            distances = ((row[:-1].unsqueeze(1) - states).abs() / scale.unsqueeze(1)).amax(dim=(0, 2))
            assert distances[position] < TOLERANCE, f"{name} at {position}: nearest row is {int(distances.argmin())}"
            distances[position] = torch.inf
            assert distances.min() > 100 * TOLERANCE, "another row would have passed as well"
            assert torch.equal(row[-1], embeddings[position + 1])
            kinds[kind_of(num_drafts, None if before is None else len(tokens) - before - 1)] += 1
            before = len(tokens)
    return kinds


def kind_of(num_drafts: int, num_accepted: int | None) -> str:
    if num_accepted is None:
        return "first"
    if not num_drafts:
        return "no drafts"
    return "none accepted" if not num_accepted else "all" if num_accepted == num_drafts else "some"


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
        in_process=True,
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


def test_compiled_graphs_with_features_beside_those_without(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, assert_same: Any, heads: dict[str, str]
) -> None:
    """One cache for all engines of this machine: a graph that was compiled without hidden states cannot be taken for one with."""
    common = {"prompts": prompts[:16], "max_tokens": num_new_tokens, "batch_size": 16, "with_status": True}
    watched = common | {"prompts": prompts[:4], "max_tokens": 16, "batch_size": 4, "with_features": True}
    settings: dict[str, Any] = {"in_process": True, "enforce_eager": False}
    plain = run_engine([common], speculative={"policy": "fanout"}, **settings)
    ours = run_engine([common, watched], speculative={"policy": "fanout", "length_head": heads["random"]}, **settings)
    assert_same(plain["jobs"][0]["answers"])
    assert_same(ours["jobs"][0]["answers"])
    assert num_classes(plain["status"]) == [0, 0, 0]
    assert sum(num_classes(ours["status"])) > 0
    (records,) = ours["jobs"][1]["features"]
    assert sum(check_features(records).values()) == len(records) > 16


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
        in_process=True,
        environment={"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"},
        tensor_parallel_size=2,
    )
    done = result["jobs"][0]
    records, other = done["features"]
    assert other == [], "one rank speaks for all"
    found = check_features(records)
    assert found["none accepted"] + found["some"] + found["all"] > 10, found
    assert_same(done["answers"], [answer[:24] for answer in plain_answers[:6]])
