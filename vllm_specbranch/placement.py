"""Where the draft server runs: start it, watch it, restart it.

Owns the child process, its cores, its environment and its private directory. Knows nothing of messages. Runs in the target's
worker (output rank); `ServerSpec` is also read by the child. The child's standard input is its lifeline: it ends when this
process does, however that happens (see `draft_main`).
"""

import contextlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from vllm_specbranch.back_off import HUNG_S, BackOff
from vllm_specbranch.config import SpecBranchConfig, child_environment, target_core_settings
from vllm_specbranch.draft_model import DraftModelSettings

logger = logging.getLogger("vllm.specbranch.placement")

# Loading and compiling a draft model takes seconds to minutes; a download may be part of it.
LONGEST_START_S = 900.0
STOP_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 0.2
# Exit status of a server whose settings cannot work (EX_CONFIG of sysexits.h): another start would end the same way.
EXIT_CONFIG = 78
# What is run in a child process, with its arguments; an observed engine (`observed_engine`) starts another module in its place.
server_module: tuple[str, ...] = ("vllm_specbranch.draft_main",)
# A socket's path has to fit into 107 bytes.
LONGEST_ROOT = 60
_DIRECTORY_PREFIX = "specbranch-"

# What vLLM sets for the target's threads, and what would pin the child onto the target's cores.
TARGET_ONLY_VARIABLES = (
    "OMP_NUM_THREADS",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_DIST_IDENT",
)


@dataclass(frozen=True)
class ServerSpec:
    """All that a draft server is told at its start, as JSON on the first line of its standard input.

    Attributes:
        address: where it listens, `ipc://...` or `tcp://...`.
        cores: CPU cores it pins itself to; None leaves it unpinned.
        model: what to load.
        config: the engine's settings, for the planner.
        keys: with TCP: the directory of its keys, its own, removed at its end.
    """

    address: str
    cores: tuple[int, ...] | None
    model: DraftModelSettings
    config: SpecBranchConfig
    keys: str | None = None

    def to_json(self) -> bytes:
        """One line of JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, line: bytes) -> "ServerSpec":
        """Inverse of `to_json`.

        Raises:
            msgspec.DecodeError: not a spec.
        """
        return msgspec.json.decode(line, type=cls)


def parse_target_cores(setting: str | None) -> set[int]:
    """The core numbers in an OpenMP affinity setting such as `{0,1}`, `0 1` or `granularity=fine,explicit,proclist=[0,1]`."""
    if not setting:
        return set()
    cores: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", setting):
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def choose_cores(
    wanted: tuple[int, ...] | None, available: set[int], target: set[int], siblings: set[int]
) -> tuple[int, ...] | None:
    """The draft server's cores: those asked for, else all that the target leaves free.

    Args:
        wanted: the user's choice.
        available: cores that this engine may use.
        target: cores that the target is bound to; empty if it is not bound.
        siblings: hardware threads that share a physical core with one of the target's; taken only when nothing else is free.

    Returns:
        The cores, or None when the target is not bound or leaves nothing (then the draft server is not bound either).
    """
    if wanted is not None:
        return wanted
    free = available - target
    free = free - siblings or free
    return tuple(sorted(free)) if target and free else None


def sibling_threads(cores: set[int]) -> set[int]:
    """The hardware threads that share a physical core with any of `cores`, as far as the kernel says."""
    siblings: set[int] = set()
    for core in cores:
        with contextlib.suppress(OSError):
            text = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
            siblings |= parse_target_cores(text)
    return siblings - cores


def available_cores() -> set[int]:
    """Cores that this engine may use.

    Where vLLM bound this process to the target's cores, those of its parent, the EngineCore process; otherwise its own.
    """
    cores = set(os.sched_getaffinity(0))
    if target_core_settings() is not None:
        with contextlib.suppress(OSError):
            cores |= os.sched_getaffinity(os.getppid())
    return cores


def beside_target(config: SpecBranchConfig, *, on_cpu: bool) -> tuple[int, ...] | None:
    """The cores of a draft server on the target's machine; None leaves it unbound. Called in the target's worker."""
    if not on_cpu:
        return config.draft_cpu_cores
    target = parse_target_cores(target_core_settings())
    return choose_cores(config.draft_cpu_cores, available_cores(), target, sibling_threads(target))


def warn_of_shared_cores() -> None:
    """Say that target and draft server have no cores of their own."""
    logger.warning(
        "The draft server shares CPU cores with the target, so they will wait for each other. Give each its own: "
        "VLLM_CPU_OMP_THREADS_BIND for the target, draft_cpu_cores for the draft server."
    )


def launch(
    spec: ServerSpec,
    overrides: Mapping[str, str],
    defaults: Mapping[str, str] | None = None,
    module: tuple[str, ...] | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a draft server as a child of this process.

    Args:
        spec: what it is told.
        overrides, defaults: for its environment, as in `child_environment`.
        module: what is run, with its arguments; None for what this process says (`server_module`).

    Raises:
        OSError: the system refuses.
    """
    overrides = {"VLLM_LOGGING_PREFIX": "(DraftServer) ", **overrides}
    process = subprocess.Popen(
        [sys.executable, "-m", *(module or server_module)],
        stdin=subprocess.PIPE,
        env=child_environment(overrides, TARGET_ONLY_VARIABLES, defaults),
        # A group of its own: should this process die while the child is stopped, and cannot see its lifeline close, the system
        # hangs it up, as it does with stopped groups that lose their last parent in the session. (Where the process that
        # inherits the child is of the same session, it stays until it is continued.)
        process_group=0,
    )
    assert process.stdin is not None
    # A child that dies at once breaks the pipe; its death is its owner's to report.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(spec.to_json() + b"\n")
        process.stdin.flush()
    return process


def make_private_directory() -> Path:
    """A new private directory, named after this process; those of processes that are gone are removed on the way."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > LONGEST_ROOT:
        root = Path("/tmp")
    for old in root.glob(f"{_DIRECTORY_PREFIX}*"):
        owner = old.name.removeprefix(_DIRECTORY_PREFIX).partition("-")[0]
        # Another engine that starts at the same moment may remove it first.
        with contextlib.suppress(FileNotFoundError):
            if owner.isdecimal() and not psutil.pid_exists(int(owner)) and old.stat().st_uid == os.getuid():
                shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_DIRECTORY_PREFIX}{os.getpid()}-", dir=root))


class ServerProcess:
    """A draft server as a child process, started again when it dies.

    Args:
        config: the engine's settings.
        model: what the server loads.
        clock: seconds, monotonic.
    """

    longest_start_s = LONGEST_START_S
    longest_silence_s = HUNG_S
    is_shared = False

    def __init__(
        self,
        config: SpecBranchConfig,
        model: DraftModelSettings,
        *,
        on_cpu: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._model = model
        self._on_cpu = on_cpu
        self._directory = make_private_directory()
        self._process: subprocess.Popen[bytes] | None = None
        self._back_off = BackOff(clock)
        self._is_reported = True
        self.is_hopeless = False
        self.num_starts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the newest child."""
        return self._process.pid if self._process else None

    @property
    def address(self) -> str:
        """Where the newest server listens; every start has its own."""
        return f"ipc://{self._directory}/draft-{self.num_starts}.sock"

    def is_running(self) -> bool:
        """Whether the child lives. Reports its death once, in the log."""
        if self._process is None:
            return False
        code = self._process.poll()
        if code is None:
            return True
        if not self._is_reported:
            self._is_reported = True
            self._report_death(self._process.pid, code)
        return False

    def _report_death(self, pid: int, code: int) -> None:
        if code == EXIT_CONFIG:
            self.is_hopeless = True
            logger.error(
                "The draft server cannot work with these settings (its own line says why); no drafts from now on."
            )
            return
        wait_s = self._back_off.failed()
        logger.warning(
            "The draft server (pid %d) ended with status %d. Requests go on without drafts; next start in %.1f s.",
            pid,
            code,
            wait_s,
        )

    def ensure_running(self) -> bool:
        """Start the child if it does not run and its back-off is over.

        Returns:
            Whether a new child was started.
        """
        if self.is_running() or self.is_hopeless or not self._back_off.is_over:
            return False
        try:
            self._start()
        except OSError as error:
            wait_s = self._back_off.postpone()
            logger.warning("The draft server cannot be started (%s); next try in %.1f s.", error, wait_s)
            return False
        return True

    def _start(self) -> None:
        self._close_lifeline()
        self.num_starts += 1
        cores = beside_target(self._config, on_cpu=self._on_cpu)
        if self._on_cpu and cores is None and self.num_starts == 1:
            warn_of_shared_cores()
        spec = ServerSpec(self.address, cores, self._model, self._config)
        self._process = launch(spec, self._overrides(cores))
        self._back_off.started()
        self._is_reported = False

    def _overrides(self, cores: tuple[int, ...] | None) -> dict[str, str]:
        if self._on_cpu:
            return {"OMP_NUM_THREADS": str(len(cores) if cores else 1)}
        return {} if self._config.draft_device is None else {"CUDA_VISIBLE_DEVICES": str(self._config.draft_device)}

    def kill(self) -> None:
        """End a child that no longer answers; `ensure_running` starts the next one, once it is dead. Nobody waits for that here."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def refused(self, is_final: bool) -> None:
        """The server does not draft for this engine, and another start would end the same way."""
        del is_final
        self.is_hopeless = True
        self._is_reported = True
        self.kill()

    def stop(self) -> None:
        """End the child and remove its directory. Safe to call again."""
        self._is_reported = True
        self._close_lifeline()
        if self._process is not None:
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
                # A child stuck in the kernel dies later.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(KILL_TIMEOUT_S)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _close_lifeline(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
