"""`vllm serve --speculative-config specbranch`: the bare word, two API servers, streams, and vLLM's own load generator."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import BLOCK_SIZE, MAX_MODEL_LEN, last_core
from tests.model_paths import DRAFT, REPOSITORY, TARGET

START_TIMEOUT_S = 300.0
VLLM = str(Path(sys.executable).with_name("vllm"))
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass
class Server:
    url: str
    log: Path

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as reply:
            text = reply.read()
        return json.loads(text) if text.startswith((b"{", b"[")) else text.decode()

    def status(self) -> dict[str, Any]:
        """The worker's own report; the endpoint exists in vLLM's development mode only."""
        answer = self.call("/collective_rpc", {"method": "specbranch_status"})["results"][0]
        status: dict[str, Any] = json.loads(answer) if isinstance(answer, str) else answer
        return status


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    settings = folder / "settings.json"
    settings.write_text(json.dumps({"model": DRAFT, "num_speculative_tokens": 8, "draft_cpu_cores": last_core()}))
    port = free_port()
    command = [VLLM, "serve", TARGET, "--speculative-config", "specbranch", "--api-server-count", "2"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "pair", "--dtype", "float32"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16", "--block-size", str(BLOCK_SIZE)]
    command += ["--enforce-eager", "--seed", "0", "--chat-template", CHAT_TEMPLATE]
    environment = dict(os.environ) | {"VLLM_SPECBRANCH_CONFIG": str(settings), "VLLM_SERVER_DEV_MODE": "1"}
    running = Server(f"http://127.0.0.1:{port}", folder / "log.txt")
    with running.log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY)
    try:
        wait_until_healthy(running, process)
        yield running
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_healthy(server: Server, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, f"the server ended:\n{server.log.read_text()[-6000:]}"
        assert time.monotonic() < until, f"the server did not start:\n{server.log.read_text()[-6000:]}"
        try:
            server.call("/health")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
        else:
            return


async def stream_completion(client: AsyncOpenAI, prompt: list[int], max_tokens: int) -> tuple[list[int], int]:
    """(token ids, number of streamed chunks that carried tokens)."""
    extra = {"ignore_eos": True, "return_token_ids": True}
    stream = await client.completions.create(
        model="pair", prompt=prompt, max_tokens=max_tokens, temperature=0.0, stream=True, extra_body=extra
    )
    token_ids: list[int] = []
    num_chunks = 0
    async for chunk in stream:
        for choice in chunk.choices:
            new = (choice.model_extra or {}).get("token_ids") or []
            token_ids += new
            num_chunks += bool(new)
    return token_ids, num_chunks


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
    text = server.call("/metrics")
    values = [
        float(line.split()[-1])
        for line in text.splitlines()
        if line.startswith("vllm:spec_decode_num_accepted_tokens_total")
    ]
    assert sum(values) > 0
