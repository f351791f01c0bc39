"""`vllm-specbranch draft-server` as a process of a test: started, waited for, started again at the same address."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.e2e.conftest import MAX_MODEL_LEN, last_core
from tests.model_paths import DRAFT, REPOSITORY
from vllm_specbranch.keys import make_keys

READY_S = 120.0


def free_addresses(count: int) -> list[str]:
    """Where nobody listens."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]
    return [f"tcp://127.0.0.1:{port}" for port in ports]


class StandaloneServer:
    """A draft server as a user would start it, again and again at one address. Begun when it is made.

    Args:
        folder: for the keys and the log.
        insecure: whether it goes without keys; `keys` is the word then.

    Attributes:
        nobodys_address: another one, at which there is no server.
        model: what the next one loads.
    """

    def __init__(self, folder: Path, *, insecure: bool = False) -> None:
        self.keys = "insecure" if insecure else str(folder / "keys")
        if not insecure:
            make_keys(self.keys)
        self.address, self.nobodys_address = free_addresses(2)
        self._logs: list[Path] = []
        self._folder = folder
        self.model = DRAFT
        self.process = self._begin()

    def start(self) -> None:
        """Start it anew and wait until it says that it is ready."""
        self.process = self._begin()
        self.wait_until_ready()

    def _begin(self) -> "subprocess.Popen[bytes]":
        words = ["draft-server", "--model", self.model, "--bind", self.address, "--enforce-eager"]
        words += ["--http", "127.0.0.1:0"]
        words += ["--insecure"] if self.keys == "insecure" else ["--keys", self.keys]
        words += ["--dtype", "float32", "--cores", str(last_core()[0]), "--max-model-len", str(MAX_MODEL_LEN)]
        self._logs.append(self._folder / f"server-{len(self._logs)}.log")
        with self._logs[-1].open("w") as stream:
            command = [sys.executable, "-m", "vllm_specbranch.cli", *words]
            # As in images and shells where vLLM has been: OpenMP is there before the server says how many threads it wants.
            (openmp,) = (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")
            environment = {**os.environ, "LD_PRELOAD": str(openmp)}
            return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment)

    def wait_until_ready(self) -> None:
        """Wait for the line that says so."""
        until = time.monotonic() + READY_S
        while f"draft server ready at {self.address}" not in self.log:
            assert self.process.poll() is None and time.monotonic() < until, self.log
            time.sleep(0.1)

    @property
    def http_port(self) -> int:
        """Where the newest one tells its metrics."""
        found = re.search(r"/metrics, /health and /ready at port (\d+)", self.log)
        assert found, self.log
        return int(found[1])

    @property
    def log(self) -> str:
        """What the newest one has printed."""
        return self._logs[-1].read_text()

    @property
    def all_logs(self) -> str:
        """What all of them have printed, one after the other."""
        return "".join(path.read_text() for path in self._logs)

    def end(self) -> None:
        """Kill it, if it is there. Safe to call again."""
        self.process.kill()
        self.process.wait()

    def start_again_when_dead(self, done: Path) -> None:
        """Wait for its death, start another, and say so by making a file."""
        self.process.wait()
        self.start()
        done.touch()
