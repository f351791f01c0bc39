"""`vllm serve` as a process of a test: started, waited for, asked, ended."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from tests.e2e.conftest import BLOCK_SIZE, MAX_MODEL_LEN
from tests.model_paths import DRAFT, REPOSITORY, TARGET
from vllm_specbranch.metrics import METRICS, PREFIX
from vllm_specbranch.snapshots import Sample, SnapshotMaker

START_TIMEOUT_S = 300.0
VLLM = str(Path(sys.executable).with_name("vllm"))
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass
class Server:
    url: str
    log: Path
    pid: int

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

    def metrics(self, prefix: str) -> dict[str, float]:
        """What `/metrics` has of the one engine, by name without labels."""
        lines = [line for line in self.call("/metrics").splitlines() if line.startswith(prefix)]
        return {line.partition("{")[0]: float(line.split()[-1]) for line in lines}

    def metric(self, name: str) -> list[float]:
        """All values of a counter on `/metrics`, one per engine."""
        return [float(line.split()[-1]) for line in self.call("/metrics").splitlines() if line.startswith(name)]


@contextlib.contextmanager
def serving(
    folder: Path,
    arguments: Sequence[str],
    cores: Sequence[int] | None,
    environment: dict[str, str] | None = None,
    **more: Any,
) -> Iterator[Server]:
    """The shipped pair behind `vllm serve --speculative-config specbranch`.

    Args:
        folder: for the settings and the log.
        arguments: of `vllm serve`, beside what every test here wants.
        cores: of the draft server; None for one that no engine starts.
        environment: variables beside those of this process.
        more: settings.
    """
    settings = folder / "settings.json"
    speculative: dict[str, Any] = {"model": DRAFT, "num_speculative_tokens": 8, "reply_timeout_ms": 500, **more}
    if cores is not None:
        speculative["draft_cpu_cores"] = list(cores)
    settings.write_text(json.dumps(speculative))
    port = free_port()
    command = [VLLM, "serve", TARGET, "--speculative-config", "specbranch", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "pair", "--dtype", "float32"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16", "--block-size", str(BLOCK_SIZE)]
    command += ["--enforce-eager", "--seed", "0", "--chat-template", CHAT_TEMPLATE]
    variables = dict(os.environ) | {"VLLM_SPECBRANCH_CONFIG": str(settings), "VLLM_SERVER_DEV_MODE": "1"}
    log = folder / "log.txt"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=variables | (environment or {}), cwd=REPOSITORY
        )
    server = Server(f"http://127.0.0.1:{port}", log, process.pid)
    try:
        _wait_until_healthy(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_healthy(server: Server, process: "subprocess.Popen[bytes]") -> None:
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


async def stream_completion(
    client: AsyncOpenAI, prompt: list[int], max_tokens: int, temperature: float = 0.0
) -> tuple[list[int], int]:
    """(token ids, number of streamed chunks that carried tokens)."""
    extra = {"ignore_eos": True, "return_token_ids": True}
    stream = await client.completions.create(
        model="pair", prompt=prompt, max_tokens=max_tokens, temperature=temperature, stream=True, extra_body=extra
    )
    token_ids: list[int] = []
    num_chunks = 0
    async for chunk in stream:
        for choice in chunk.choices:
            new = (choice.model_extra or {}).get("token_ids") or []
            token_ids += new
            num_chunks += bool(new)
    return token_ids, num_chunks


# What goes on after the last reply of all: it is told with the next one. (The proposer's clock runs in the step that closes.)
AFTER_THE_REPLY = frozenset(
    {"engine.propose_s"}
    | {
        f"server.num_{name}"
        for name in ("drafted_tokens", "forks", "steps", "rows", "wait_steps", "narrowings", "evictions")
    }
)


def assert_metrics_are_the_counters(server: Server, ended: Mapping[str, int] | None = None) -> dict[str, int]:
    """When all is idle, `/metrics` says what the worker's own report says; returns that, by the keys of `metrics`.

    Args:
        server: the server.
        ended: what was returned before a draft server ended: its successor begins at 0.
    """
    until = time.monotonic() + 10.0
    while True:
        status, shown = server.status(), server.metrics(PREFIX)
        maker = SnapshotMaker()
        maker.update(Sample(status["engine"], {}, None))
        counted = maker.make()
        counted |= {
            f"server.{name}": count + (ended or {}).get(f"server.{name}", 0) for name, count in status["server"].items()
        }
        told = {one.key: round(shown[one.name] / one.unit) for one in METRICS}
        known = counted.keys() & told.keys()
        assert len(known) > 25
        if {key: told[key] for key in known - AFTER_THE_REPLY} == {
            key: counted[key] for key in known - AFTER_THE_REPLY
        }:
            break
        assert time.monotonic() < until, {key: (told[key], counted[key]) for key in known if told[key] != counted[key]}
        time.sleep(0.2)
    assert all(told[key] <= counted[key] for key in known)
    assert [told[key] for key in ("state.is_alive", "state.is_ready")] == [1, 1]
    gone = ("is_breaker_open", "has_given_up", "num_requests", "num_queued_rows", "num_blocks_held")
    assert [told[f"state.{name}"] for name in gone] == [0] * len(gone)
    assert told["state.num_blocks"] == status["num_blocks"]
    return told
