"""The failure floor: whatever happens to the draft server, generation ends correctly, and nothing outlives its engine."""

import time
from collections.abc import Callable
from typing import Any

import psutil

from tests.e2e.conftest import RunEngine

Same = Callable[..., None]


def test_a_server_that_never_starts(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, assert_same: Same
) -> None:
    # One byte of KV cache: the draft server refuses to start, again and again.
    job = {"prompts": prompts[:8], "max_tokens": num_new_tokens, "batch_size": 8}
    result = run_engine([job], speculative={"draft_kv_cache_bytes": 1})
    assert_same(result["jobs"][0]["answers"])
    assert not result["status"]["is_up"]
    assert result["status"]["engine"]["num_accepted_tokens"] == 0
    assert "did not start" in result["log"]
    assert "draft_kv_cache_bytes=1 cannot be used" in result["log"], "the draft server says why"
    assert result["status"]["engine"]["num_server_starts"] == 1, "settings that cannot work are not tried again"


def test_a_silent_server_costs_little_and_drafting_resumes(
    run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int, assert_same: Same
) -> None:
    plan = {"after_s": 0.5, "signals": [["SIGSTOP", 3.0], ["SIGCONT", 0.0]], "then_wait_s": 1.0}
    jobs: list[dict[str, Any]] = [
        {"prompts": prompts, "max_tokens": num_new_tokens, "batch_size": 8, "disturb": plan},
        {"prompts": prompts[:16], "max_tokens": num_new_tokens, "batch_size": 4, "speculative_config": True},
    ]
    result = run_engine(jobs, speculative={"reply_timeout_ms": 50})
    for done in result["jobs"]:
        assert_same(done["answers"])
    engine = result["status"]["engine"]
    assert result["status"]["is_up"], "the server answered a probe and is used again"
    assert engine["num_server_deaths"] == 0
    assert engine["num_breaker_openings"] >= 1
    # One reply timeout, with room for a machine that is busy when the timer ends.
    assert engine["longest_wait_s"] < 0.25


def test_no_process_outlives_a_killed_engine(run_engine: RunEngine, prompts: list[list[int]]) -> None:
    job = {"prompts": prompts[:2], "max_tokens": 8, "batch_size": 2}
    result = run_engine([job], speculative={}, in_process=False, expect_kill=True)
    pid = result["status"]["server_pid"]
    until = time.monotonic() + 10.0
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the draft server outlived its engine"
        time.sleep(0.1)
