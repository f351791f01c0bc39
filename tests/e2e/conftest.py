"""Engines for the end-to-end tests: each in its own process, the plain answers made once for all."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.model_paths import DRAFT, REPOSITORY, TARGET, holdout_prompts

NUM_PROMPTS = 64
# A KV block of vLLM's CPU build; small, so that few blocks make a small cache.
BLOCK_SIZE = 32
MAX_MODEL_LEN = 512
ENGINE_TIMEOUT_S = 600.0

RunEngine = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """64 held-out prompts of 20 to 180 tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    texts = holdout_prompts(NUM_PROMPTS, 400)
    return [tokenizer.encode(text)[: 20 + (37 * index) % 161] for index, text in enumerate(texts)]


@pytest.fixture(scope="session")
def num_new_tokens() -> int:
    """New tokens per prompt in the comparisons with plain vLLM."""
    return 64


@pytest.fixture(scope="session")
def run_engine(tmp_path_factory: pytest.TempPathFactory) -> RunEngine:
    """Run jobs in a fresh engine; returns what the runner module wrote, with the log under `log`.

    The engine core runs in the process that reads the jobs, as vLLM can, unless `in_process` is false. What users get by default,
    a process for it and one for each worker, takes twice as long to start: for tests that are about processes.
    """

    def run(
        jobs: list[dict[str, Any]],
        *,
        speculative: dict[str, Any] | None = None,
        in_process: bool = True,
        expect_kill: bool = False,
        stop_driver: bool = False,
        environment: dict[str, str] | None = None,
        runner: str = "tests.e2e.generate",
        timeout_s: float = ENGINE_TIMEOUT_S,
        **engine: Any,
    ) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("engine")
        out, log = folder / "out.json", folder / "log.txt"
        engine = {
            "model": TARGET,
            "dtype": "float32",
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": 16,
            "block_size": BLOCK_SIZE,
            "enforce_eager": True,
            "seed": 0,
        } | engine
        if speculative is not None:
            engine["speculative_config"] = {
                "method": "specbranch",
                "model": DRAFT,
                "draft_cpu_cores": last_core(),
            } | speculative
        spec = {"engine": engine, "jobs": jobs, "kill_engine": expect_kill, "stop_driver": stop_driver}
        variables = dict(os.environ) | (environment or {})
        if in_process:
            variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
        with log.open("w") as stream:
            done = subprocess.run(
                [sys.executable, "-m", runner, str(out)],
                input=json.dumps(spec).encode(),
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env=variables,
                timeout=timeout_s,
                check=False,
            )
        text = log.read_text()
        assert out.exists() and (done.returncode == 0 or expect_kill), f"status {done.returncode}:\n{text[-6000:]}"
        result: dict[str, Any] = json.loads(out.read_text())
        result["log"] = text
        return result

    return run


def last_core() -> list[int]:
    """The draft server's core: the last one; the target has the first (see tests/conftest.py)."""
    return [max(os.sched_getaffinity(0))]


@pytest.fixture(scope="session")
def plain_answers(run_engine: RunEngine, prompts: list[list[int]], num_new_tokens: int) -> list[list[int]]:
    """Plain vLLM's greedy float32 answers, with our plugin installed and not chosen."""
    job = {"prompts": prompts, "max_tokens": num_new_tokens, "batch_size": 16}
    answers: list[list[int]] = run_engine([job])["jobs"][0]["answers"]
    assert len(answers) == NUM_PROMPTS
    assert all(len(answer) == num_new_tokens for answer in answers)
    return answers


@pytest.fixture(scope="session")
def assert_same(prompts: list[list[int]], plain_answers: list[list[int]]) -> Callable[[list[list[int]]], None]:
    """Assert that answers (of the first prompts) equal plain vLLM's, under rule 5 of the design."""

    def check(answers: list[list[int]], expected: list[list[int]] | None = None) -> None:
        wanted = plain_answers[: len(answers)] if expected is None else expected
        assert len(answers) == len(wanted)
        different = [index for index, answer in enumerate(answers) if answer != wanted[index]]
        gaps = {index: near_tie_gap(prompts[index], wanted[index], answers[index]) for index in different}
        num_tokens = sum(len(answer) for answer in answers)
        print(
            f"{len(different)} of {len(answers)} answers differ ({num_tokens} tokens); top-2 logit gaps there: {gaps}"
        )
        assert all(gap < 1e-5 for gap in gaps.values())
        assert len(different) <= -(-num_tokens // 10_000)

    return check


def near_tie_gap(prompt: list[int], plain: list[int], other: list[int]) -> float:
    """The gap of the target's top two logits where two answers part; infinite if one is only shorter."""
    import torch
    from transformers import AutoModelForCausalLM

    position = next((i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
    if position is None:
        return float("inf")
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + plain[:position]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return float(first - second)
