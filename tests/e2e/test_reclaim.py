"""Blocks taken back from running requests of a real engine: the tables of both sides agree, and nothing is lost (rule 5)."""

from collections.abc import Callable
from typing import Any

from tests.e2e.conftest import RunEngine

LEAST_BLOCKS = 50


def test_trimming_at_every_step_changes_no_token_and_leaves_no_table_behind(
    run_engine: RunEngine,
    prompts: list[list[int]],
    num_new_tokens: int,
    assert_same: Callable[..., None],
    weak_draft_model: str,
) -> None:
    """With chunked prefill, prefix hits and preemptions; long chunks, most of them in vain."""
    job = {"prompts": prompts[:32], "max_tokens": num_new_tokens, "batch_size": 16}
    result = run_engine(
        [job, job | {"prompts": prompts[:8]}],
        speculative={
            "model": weak_draft_model,
            "num_speculative_tokens": 16,
            "policy": "specbranch",
            "stop_rule": "none",
            "on_miss": "wait:12",
            "max_branches": 2,
            "reply_timeout_ms": 1000,
        },
        runner="tests.e2e.trimming",
        max_num_batched_tokens=128,
        num_gpu_blocks_override=60,
    )
    print(result["trimming"], result["status"]["scheduler"], result["status"]["rates"])
    for done in result["jobs"]:
        assert_same(done["answers"])
    found: dict[str, Any] = result["trimming"]
    assert found["num_different"] == 0
    assert found["num_blocks"] > LEAST_BLOCKS < found["num_rows_made_anew"]
    scheduler = result["status"]["scheduler"]
    assert scheduler["num_reclaimed_blocks"] == found["num_blocks"]
    assert scheduler["num_preemptions"] == result["metrics"]["vllm:num_preemptions"] > 0
    assert result["metrics"]["vllm:prefix_cache_hits"] > 0
    assert result["status"]["rates"]["mean_acceptance_length"] > 1.05
