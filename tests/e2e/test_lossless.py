"""Greedy float32: the same token ids as plain vLLM, whatever happens (rule 5 of the design). Real engines, real text."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.conftest import BLOCK_SIZE, RunEngine

# Under load the draft side stops where verification costs more than it gains; on CPUs a batch of 16 may be load enough.
LOADED_ACCEPTANCE_LENGTH = 1.05
Same = Callable[..., None]


def job(prompts: list[list[int]], max_tokens: int, batch_size: int, **more: Any) -> dict[str, Any]:
    return {"prompts": prompts, "max_tokens": max_tokens, "batch_size": batch_size, **more}


def assert_drafting(status: dict[str, Any], least_acceptance_length: float = 1.3) -> None:
    """The run really was speculative: drafts came, were verified, and many were accepted."""
    engine = status["engine"]
    assert status["is_up"]
    assert engine["num_foreign_drafts"] == 0
    assert engine["num_accepted_tokens"] > 0
    assert status["rates"]["mean_acceptance_length"] > least_acceptance_length, status["rates"]
    assert status["num_requests"] == 0, "every request was closed"
    assert status["num_blocks_held"] == 0, "after the last request the draft server holds no block"


@pytest.mark.parametrize("policy", ("best_first", pytest.param("pearl", marks=pytest.mark.long)))
def test_batches_of_1_4_and_16_in_separate_processes(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, assert_same: Same, policy: str
) -> None:
    # One at a time takes long, and adds no more than the first few.
    jobs = [job(prompts[: 8 * size], num_new_tokens, size) for size in (1, 4, 16)]
    result = run_engine(jobs, speculative={"policy": policy}, in_process=False)
    for done in result["jobs"]:
        assert_same(done["answers"])
    assert_drafting(result["status"], LOADED_ACCEPTANCE_LENGTH)


@pytest.mark.long
@pytest.mark.parametrize("policy", ("fanout",))
def test_batches_of_1_4_and_16_in_process_compiled(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, assert_same: Same, policy: str
) -> None:
    # One at a time takes long, and adds no more than the first few.
    jobs = [job(prompts[: 8 * size], num_new_tokens, size) for size in (1, 4, 16)]
    result = run_engine(jobs, speculative={"policy": policy}, enforce_eager=False)
    for done in result["jobs"]:
        assert_same(done["answers"])
    assert_drafting(result["status"], LOADED_ACCEPTANCE_LENGTH)


@pytest.mark.parametrize("policy", ("best_first", pytest.param("specbranch", marks=pytest.mark.long)))
def test_chunked_prefill_prefix_hits_preemptions_and_a_killed_draft_server(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, assert_same: Same, policy: str
) -> None:
    # 16 requests of up to 276 tokens need up to 9 blocks each; 60 blocks force preemptions.
    jobs = [
        job(prompts[:32], num_new_tokens, 16),
        job(prompts[:16], num_new_tokens, 16),
        job(prompts, num_new_tokens, 16, disturb={"after_s": 1.0, "signals": [["SIGKILL", 0.0]]}),
        job(prompts[:32], num_new_tokens, 8, once_up=True),
    ]
    # Scheduler and worker in different processes: what one tells the other of resumed requests has to survive the way.
    result = run_engine(
        jobs,
        speculative={"policy": policy},
        in_process=False,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=60,
    )
    for done in result["jobs"]:
        assert_same(done["answers"])
    metrics, status = result["metrics"], result["status"]
    assert metrics["vllm:num_preemptions"] > 0, metrics
    assert metrics["vllm:prefix_cache_hits"] >= BLOCK_SIZE, metrics
    assert result["jobs"][2]["events"] == ["SIGKILL"]
    assert (status["engine"]["num_server_deaths"], status["engine"]["num_server_starts"]) == (1, 2)
    assert result["log"].count("ended with status -9") == 1, "one log line"
    assert_drafting(status, least_acceptance_length=1.05)


@pytest.mark.long
def test_the_end_of_the_context_stops_drafts_for_that_request_only(
    run_engine: RunEngine, prompts: list[list[int]]
) -> None:
    """vLLM would stop drafting for the whole batch, and schedule zeros, when one request nears the drafter's context.

    With 64 draft tokens "near" is the whole life of the long request, and the short ones live no longer.
    """
    context, num_tokens = 200, 40
    long = (prompts[4] + prompts[0] + prompts[5])[: context - num_tokens]
    jobs = [job([long, *(prompt[:40] for prompt in prompts[:3])], num_tokens, 4)]
    plain = run_engine(jobs, max_model_len=context)
    ours = run_engine(jobs, max_model_len=context, speculative={"num_speculative_tokens": 64})
    assert ours["jobs"][0]["answers"] == plain["jobs"][0]["answers"]
    assert len(plain["jobs"][0]["answers"][0]) == num_tokens, "the long request ends at the context"
    assert_drafting(ours["status"], LOADED_ACCEPTANCE_LENGTH)


@pytest.mark.long
def test_a_draft_with_a_shorter_context_than_the_target(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, assert_same: Same
) -> None:
    """And an engine that takes one request at a time."""
    result = run_engine([job(prompts[:16], num_new_tokens, 4)], speculative={"max_model_len": 100}, max_num_seqs=1)
    assert_same(result["jobs"][0]["answers"])
    assert_drafting(result["status"], least_acceptance_length=1.05)
    assert "decoded without drafts" in result["log"]


def test_vllm_without_our_plugin_says_the_same_as_with_it(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, plain_answers: list[list[int]]
) -> None:
    result = run_engine([job(prompts[:16], num_new_tokens, 16)], environment={"VLLM_PLUGINS": ""})
    assert result["jobs"][0]["answers"] == plain_answers[:16]
