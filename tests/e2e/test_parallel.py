"""Tensor parallelism: every rank verifies the same drafts against the same distributions."""

import os
from typing import Any

import pytest

from tests.e2e.conftest import RunEngine, last_core

NUM_PROMPTS = 8
SLOW_DOWN_S = 0.05


@pytest.fixture(scope="module")
def outcome(run_engine: RunEngine, prompts: list[list[int]]) -> dict[str, Any]:
    """One engine of two ranks; sampled requests with and without seeds, then greedy ones."""
    cores = sorted(os.sched_getaffinity(0))
    sampling = [{"temperature": 1.0, **({"seed": index} if index % 2 else {})} for index in range(NUM_PROMPTS)]
    common = {"prompts": prompts[:NUM_PROMPTS], "max_tokens": 48, "batch_size": NUM_PROMPTS}
    jobs = [
        # Both ranks and the draft server share two cores: with so small a target there would be few drafts on a busy machine.
        {**common, "sampling": sampling, "with_ranks": True, "with_status": True, "slow_down_s": SLOW_DOWN_S},
        {**common, "with_status": True},
    ]
    return run_engine(
        jobs,
        speculative={"draft_cpu_cores": last_core(), "reply_timeout_ms": 1000},
        environment={"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"},
        tensor_parallel_size=2,
    )


def test_both_ranks_sample_the_same_tokens_with_draft_probabilities_in_use(outcome: dict[str, Any]) -> None:
    done = outcome["jobs"][0]
    first, second = done["verified_by_rank"]
    assert first == second, "in every step"
    assert sum(with_probs for _, with_probs in first) > 10
    num_tokens = sum(token >= 0 for rows, _ in first for row in rows for token in row)
    # Some steps have no drafts; the last tokens of a verification may lie beyond the end of the answer.
    assert num_tokens > 0.8 * NUM_PROMPTS * 48
    assert all(len(answer) == 48 for answer in done["answers"])
    engine = done["status"]["engine"]
    assert engine["num_sampled_outcomes"] > 0.3 * NUM_PROMPTS * 48
    assert engine["num_unsound_distributions"] == engine["num_foreign_drafts"] == 0


def test_greedy_answers_are_plain_vllm_s(
    outcome: dict[str, Any], assert_same: Any, plain_answers: list[list[int]]
) -> None:
    answers = outcome["jobs"][1]["answers"]
    assert_same(answers, [answer[:48] for answer in plain_answers[:NUM_PROMPTS]])
    assert outcome["jobs"][1]["status"]["engine"]["num_accepted_tokens"] > 0
