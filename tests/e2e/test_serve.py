"""`vllm serve --speculative-config specbranch`: the bare word, two API servers, streams, and vLLM's own load generator."""

import asyncio
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import last_core
from tests.e2e.serving import VLLM, Server, serving, stream_completion
from tests.model_paths import TARGET


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve"), ["--api-server-count", "2"], last_core()) as running:
        yield running


def assert_idle(server: Server) -> dict[str, Any]:
    """After the last request the draft server holds nothing."""
    until = time.monotonic() + 10.0
    while (status := server.status())["num_requests"] or status["num_blocks_held"]:
        assert time.monotonic() < until, status
        time.sleep(0.2)
    return status


def test_32_concurrent_streams(
    server: Server,
    prompts: list[list[int]],
    num_new_tokens: int,
    plain_answers: list[list[int]],
    assert_same: Callable[..., None],
) -> None:
    async def run() -> list[tuple[list[int], int]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120.0) as client:
            tasks = [stream_completion(client, prompt, num_new_tokens) for prompt in prompts[:32]]
            return list(await asyncio.gather(*tasks))

    results = asyncio.run(run())
    assert_same([token_ids for token_ids, _ in results])
    assert all(num_chunks > 5 for _, num_chunks in results), "really streamed"
    status = assert_idle(server)
    assert status["engine"]["num_accepted_tokens"] > 0
    assert status["engine"]["num_foreign_drafts"] == 0


def test_chat_streamed_and_at_once_say_the_same(server: Server) -> None:
    async def run() -> tuple[str, str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120.0) as client:
            question: Any = {"role": "user", "content": "import os\nimport sys\n\n\ndef main"}
            common: dict[str, Any] = {"model": "pair", "messages": [question], "max_tokens": 48, "temperature": 0.0}
            whole = await client.chat.completions.create(**common)
            parts = []
            async for chunk in await client.chat.completions.create(**common, stream=True):
                parts += [choice.delta.content or "" for choice in chunk.choices]
            return whole.choices[0].message.content or "", "".join(parts)

    whole, streamed = asyncio.run(run())
    assert whole
    assert whole == streamed


def test_vllm_bench_serve_completes(server: Server, tmp_path: Path) -> None:
    command = [VLLM, "bench", "serve", "--base-url", server.url, "--model", "pair", "--tokenizer", TARGET]
    command += [
        "--dataset-name",
        "random",
        "--num-prompts",
        "24",
        "--random-input-len",
        "48",
        "--random-output-len",
        "32",
    ]
    command += [
        "--max-concurrency",
        "16",
        "--ignore-eos",
        "--save-result",
        "--result-dir",
        str(tmp_path),
        "--seed",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (result,) = (json.loads(path.read_text()) for path in tmp_path.glob("*.json"))
    assert result["completed"] == 24
    assert result["failed"] == 0
    assert_idle(server)


def test_vllms_own_counters_see_the_drafts(server: Server) -> None:
    assert sum(server.metric("vllm:spec_decode_num_accepted_tokens_total")) > 0
