"""`vllm serve --speculative-config specbranch`: the bare word, two API servers, streams, and vLLM's own load generator."""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI
from prometheus_client.mmap_dict import MmapedDict

from tests.e2e.conftest import last_core
from tests.e2e.serving import VLLM, Server, assert_metrics_are_the_counters, serving, stream_completion
from tests.model_paths import TARGET
from vllm_specbranch.metrics import METRICS, PREFIX


@pytest.fixture(scope="module")
def folder_of_counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the API servers keep what they have counted, for each other's scrapes."""
    return tmp_path_factory.mktemp("counts")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder_of_counts: Path) -> Iterator[Server]:
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(folder_of_counts)}
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, ["--api-server-count", "2"], last_core(), environment) as running:
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


def counts_by_process(folder: Path, name: str) -> list[float]:
    """What each API server has counted of one counter."""
    counts = []
    for path in folder.glob("counter_*.db"):
        entries = MmapedDict.read_all_values_from_file(str(path))
        counts.append(sum(value for key, value, _, _ in entries if json.loads(key)[1] == name))
    return counts


def test_our_metrics_are_the_counters_with_two_api_servers(
    server: Server, prompts: list[list[int]], folder_of_counts: Path
) -> None:
    """Each is told of some steps; a scrape of either adds up to all of them."""
    before = assert_metrics_are_the_counters(server)
    for prompt in prompts[:16]:
        server.call("/v1/completions", {"model": "pair", "prompt": prompt, "max_tokens": 24, "ignore_eos": True})
    after = assert_metrics_are_the_counters(server)
    assert after["server.num_hits"] > before["server.num_hits"]
    assert after["server.num_rounds"] == after["server.num_hits"] + after["server.num_misses"]
    hits = [count for count in counts_by_process(folder_of_counts, f"{PREFIX}hits_total") if count]
    assert len(hits) == 2
    assert sum(hits) == after["server.num_hits"]


def test_counters_go_on_when_the_draft_server_is_started_again(server: Server, prompts: list[list[int]]) -> None:
    def ask() -> None:
        server.call("/v1/completions", {"model": "pair", "prompt": prompts[0], "max_tokens": 24, "ignore_eos": True})

    before = assert_metrics_are_the_counters(server)
    os.kill(server.status()["server_pid"], signal.SIGKILL)
    ask()
    shown = server.metrics(PREFIX)
    assert shown[f"{PREFIX}draft_server_deaths_total"] == before["engine.num_server_deaths"] + 1
    assert shown[f"{PREFIX}draft_server_ready"] == 0, "the engine lives and answers, and drafts for nobody"
    until = time.monotonic() + 60.0
    while not server.status()["is_up"]:
        assert time.monotonic() < until
        ask()
    ask()
    after = assert_metrics_are_the_counters(server, before)
    assert after["engine.num_server_restarts"] == before["engine.num_server_restarts"] + 1
    assert all(after[one.key] >= before[one.key] for one in METRICS if one.is_counter)
    assert after["server.num_rounds"] > before["server.num_rounds"]
