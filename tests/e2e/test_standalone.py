"""A draft server that no engine started, over TCP with keys: two engines at once, its death under load, its return, its end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import MAX_MODEL_LEN, RunEngine, last_core
from tests.model_paths import DRAFT, REPOSITORY
from vllm_specbranch.keys import make_keys

READY_S = 120.0
NUM_PROMPTS = 8
# Two engines and a server share two cores here: few requests and a slow target, so that drafts come in time on a busy machine too.
SLOW_DOWN_S = 0.05

Same = Callable[..., None]


class Server:
    """`vllm-specbranch draft-server` as a user would start it, again and again at one address."""

    def __init__(self, folder: Path) -> None:
        self.keys = folder / "keys"
        make_keys(self.keys)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        self._log = folder / "server.log"
        self.process = self.start()

    def start(self) -> "subprocess.Popen[bytes]":
        """Start it and wait until it says that it is ready."""
        words = ["draft-server", "--model", DRAFT, "--bind", self.address, "--keys", str(self.keys), "--enforce-eager"]
        words += ["--dtype", "float32", "--cores", str(last_core()[0]), "--max-model-len", str(MAX_MODEL_LEN)]
        with self._log.open("w") as stream:
            command = [sys.executable, "-m", "vllm_specbranch.cli", *words]
            # As in images and shells where vLLM has been: OpenMP is there before the server says how many threads it wants.
            (openmp,) = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
            environment = {**os.environ, "LD_PRELOAD": str(openmp)}
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment
            )
        until = time.monotonic() + READY_S
        while f"draft server ready at {self.address}" not in self.log:
            assert self.process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.1)
        return self.process

    @property
    def log(self) -> str:
        """What the newest one has printed."""
        return self._log.read_text()

    def start_again_when_dead(self, done: Path) -> None:
        """Wait for its death, start another, and say so by making a file."""
        self.process.wait()
        self.start()
        done.touch()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    found = Server(tmp_path_factory.mktemp("standalone"))
    yield found
    found.process.kill()
    found.process.wait()


def test_two_engines_share_a_server_that_is_killed_and_comes_back(
    run_engine: RunEngine,
    prompts: list[list[int]],
    num_new_tokens: int,
    assert_same: Same,
    server: Server,
    tmp_path: Path,
) -> None:
    """Greedy answers in float32 are plain vLLM's, before, during and after; both engines find the new server."""
    back = tmp_path / "back"
    watch = threading.Thread(target=server.start_again_when_dead, args=(back,), daemon=True)
    watch.start()
    load = {"prompts": prompts[:NUM_PROMPTS], "max_tokens": num_new_tokens, "with_status": True}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    kill = {"after_s": 0.2, "signals": [["SIGKILL", 0.0]], "pid": server.process.pid}
    jobs: list[list[dict[str, Any]]] = [
        [
            load | {"batch_size": 4, "slow_down_s": SLOW_DOWN_S, "then_touch": first, "then_wait_for": second},
            load | {"batch_size": 2, "disturb": kill, "then_wait_for": str(back)},
            load | {"batch_size": 4},
        ],
        [
            load | {"batch_size": 4, "slow_down_s": SLOW_DOWN_S, "then_touch": second, "then_wait_for": first},
            load | {"batch_size": 2, "then_wait_for": str(back)},
            load | {"batch_size": 4},
        ],
    ]
    # What an engine decides for itself; the rest is the server's.
    speculative = {
        "draft_placement": server.address,
        "draft_keys": str(server.keys),
        "draft_cpu_cores": None,
        "reply_timeout_ms": 200,
    }
    # Without it vLLM sends no functions to workers, such as the one that slows them down.
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_engine, one, speculative=speculative, environment=environment) for one in jobs]
        results: list[dict[str, Any]] = [run.result() for run in runs]
    watch.join()
    for result in results:
        for done in result["jobs"]:
            assert_same(done["answers"])
        before, during, after = (done["status"]["engine"]["num_accepted_tokens"] for done in result["jobs"])
        assert before > 0, result["jobs"][0]["status"]
        assert after > during, "the new server drafts"
        assert result["status"]["is_up"], "the new server was found"
        assert result["status"]["server_pid"] is None, "no child of the engine's"
    assert results[0]["jobs"][1]["events"] == ["SIGKILL"]
    assert results[0]["status"]["engine"]["num_breaker_openings"] >= 1


def test_sigterm_ends_it_well(server: Server) -> None:
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(30.0) == 0
    assert server.log.endswith("draft server ended\n")
