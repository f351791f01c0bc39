"""Run a vLLM engine in a child process on given cores, and measure it: the side that asks.

Owns the child's life: start, progress, commands, end. What travels is in `measure_messages` (commands on the child's
standard input, answers on a pipe of its own, because vLLM prints on standard output), what the child does in
`measure_child`. Runs in the process of the demo or a benchmark; imports neither torch nor vLLM.

Several engines may be alive at once: one that has nothing to do blocks on its pipe and uses no CPU, so that
repetitions can go round all of them. No child outlives this process: the end of its standard input is its end.
"""

import contextlib
import importlib.util
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vllm_specbranch.config import child_environment
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.measure_messages import (
    Answer,
    Command,
    Emulation,
    Encode,
    Encoded,
    EngineSpec,
    Failed,
    Ready,
    Record,
    Run,
    RunResult,
    Stage,
    Stop,
)

START_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 20.0
PROGRESS_INTERVAL_S = 0.5
NUM_LOG_LINES = 30

# What a user's shell may have set for engines of his own, and what would change the ones measured here.
_REMOVED_VARIABLES = (
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "OMP_PLACES",
    "OMP_PROC_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_PLUGINS",
    "VLLM_USE_V2_MODEL_RUNNER",
)


class MeasureError(SpecBranchError):
    """An engine did not start, died, or did not answer in time; the message ends with the last lines of its log."""


OnProgress = Callable[[Sequence["Engine"]], None]
_A = TypeVar("_A", bound=Answer)


class Engine:
    """One engine in its own process. Use as a context manager: entering starts it, leaving ends it.

    Args:
        spec: what to run.
        start_timeout_s: longest start.
        answer_timeout_s: longest wait for any answer after that.
    """

    def __init__(
        self, spec: EngineSpec, start_timeout_s: float = START_TIMEOUT_S, answer_timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self.spec = spec
        self.stage = "starting Python"
        self.facts: dict[str, Any] = {}
        self.is_ready = False
        self._start_timeout_s = start_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._buffer = b""
        self._is_told_to_stop = False
        self._started_s = 0.0
        self._directory = Path()

    @property
    def pid(self) -> int | None:
        """Of the child, or None before the start and after the end."""
        return self._process.pid if self._process else None

    @property
    def log_path(self) -> Path:
        """What vLLM wrote."""
        return self._directory / "engine.log"

    def __enter__(self) -> "Engine":
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the child; returns at once (see `wait_until_ready`)."""
        self._directory = Path(tempfile.mkdtemp(prefix="specbranch-engine-"))
        self._answers, answers_write = os.pipe()
        self._started_s = time.monotonic()
        try:
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "vllm_specbranch.measure_child", str(answers_write)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=[answers_write],
                    env=_environment(self.spec),
                )
        finally:
            os.close(answers_write)
        self._send(msgspec.json.encode(self.spec))

    def poll(self, timeout_s: float) -> bool:
        """Take in what the starting child says, for at most `timeout_s`. Returns whether it is ready.

        Raises:
            MeasureError: it died, failed, or took too long.
        """
        if self.is_ready:
            return True
        match self._receive(timeout_s):
            case Ready(facts):
                self.facts, self.stage, self.is_ready = facts, "ready", True
            case Stage(text):
                self.stage = text
            case None if time.monotonic() - self._started_s > self._start_timeout_s:
                raise self._error(f"was not ready after {self._start_timeout_s:.0f} s (last: {self.stage})")
        return self.is_ready

    def wait_until_ready(self, on_progress: OnProgress | None = None) -> None:
        """Wait for the end of the start; see `wait_for_all`."""
        wait_for_all([self], on_progress)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, as `LLM.generate` would make them."""
        return self._ask(Encode(list(texts)), Encoded).token_ids

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        batch_size: int = 1,
        temperature: float = 0.0,
        first_seed: int | None = None,
        emulation: Emulation | None = None,
        record: Record | None = None,
    ) -> RunResult:
        """Generate and measure.

        Args:
            prompts: token ids of each.
            max_tokens: exactly so many for each prompt; the end-of-sequence token does not end a request.
            batch_size: prompts in the engine at the same time.
            temperature: 0 is greedy.
            first_seed: seed of the first request, one more for each following; None for requests without seeds.
            emulation: stretch the forwards of this run.
            record: also write its rounds; the engine must have `recording_worker.RecordingExtension`.

        Raises:
            ConfigError: emulation for an engine that is not observed.
            MeasureError: the engine died, failed, or took too long.
        """
        if emulation is not None and not self.spec.observe:
            raise ConfigError(emulation, "None for an engine that is not observed (EngineSpec.observe)", "emulation")
        ids = [list(one) for one in prompts]
        command = Run(ids, max_tokens, batch_size, temperature, first_seed, emulation, record)
        return self._ask(command, RunResult)

    def ask_to_stop(self) -> None:
        """Tell the child to end; `close` waits for that. Several engines end faster when all are told first."""
        if self._process is None or self._is_told_to_stop:
            return
        self._is_told_to_stop = True
        with contextlib.suppress(OSError):
            self._write(msgspec.json.encode(Stop()))
        if not self.is_ready:
            self._process.kill()

    def close(self) -> None:
        """End the child, and with it its draft server. Safe to call again."""
        self.ask_to_stop()
        if self._process is None:
            return
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        os.close(self._answers)
        shutil.rmtree(self._directory, ignore_errors=True)
        self._process = None

    def _ask(self, command: Command, kind: type[_A]) -> _A:
        self._send(msgspec.json.encode(command))
        answer = self._receive(self._answer_timeout_s)
        if answer is None:
            raise self._error(f"did not answer within {self._answer_timeout_s:.0f} s")
        if not isinstance(answer, kind):
            raise self._error(f"answered with {type(answer).__name__} where {kind.__name__} was due")
        return answer

    def _send(self, line: bytes) -> None:
        try:
            self._write(line)
        except OSError as error:
            raise self._ended() from error

    def _write(self, line: bytes) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def _receive(self, timeout_s: float) -> Answer | None:
        """The next answer, or None if none comes in time."""
        until_s = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([self._answers], [], [], max(0.0, until_s - time.monotonic()))
            if not readable:
                return None
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                raise self._ended()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: Answer = msgspec.json.decode(line, type=Answer)
        if isinstance(answer, Failed):
            raise self._error(f"failed while {self.stage}: {answer.reason}", with_log=False)
        return answer

    def _ended(self) -> MeasureError:
        """What to say of a child whose pipe is closed: it is dead, or dies."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        doing = "" if self.is_ready else f" while {self.stage}"
        return self._error(f"ended with status {self._process.returncode}{doing}")

    def _error(self, what: str, with_log: bool = True) -> MeasureError:
        text = f"the engine {self.spec.name!r} {what}"
        if with_log:
            lines = self.log_path.read_text(errors="replace").splitlines()[-NUM_LOG_LINES:]
            text += "\n".join([f"; the last {len(lines)} lines of its log:", *(f"  {line}" for line in lines)])
        return MeasureError(text)


@contextlib.contextmanager
def running(
    specs: Sequence[EngineSpec], on_progress: OnProgress | None = None, at_once: int | None = None
) -> Iterator[list[Engine]]:
    """Start an engine for each spec, side by side; yield them ready; end them all.

    Args:
        specs: of the engines.
        on_progress: see `wait_for_all`.
        at_once: so many start side by side, and the next ones when they are ready; None for all.

    Raises:
        MeasureError: one died, failed, or took too long.
    """
    engines = [Engine(spec) for spec in specs]
    with contextlib.ExitStack() as stack:
        try:
            for first in range(0, len(engines), at_once or len(engines)):
                for engine in engines[first : first + (at_once or len(engines))]:
                    stack.enter_context(engine)
                wait_for_all(engines[: first + (at_once or len(engines))], on_progress)
            yield engines
        finally:
            for engine in engines:
                engine.ask_to_stop()


def wait_for_all(engines: Sequence[Engine], on_progress: OnProgress | None = None) -> None:
    """Wait until all engines are ready.

    Args:
        engines: already started; they start side by side.
        on_progress: called about every half second, and at the end.

    Raises:
        MeasureError: one died, failed, or took too long.
    """
    waiting = list(engines)
    while waiting:
        waiting = [one for one in waiting if not one.poll(PROGRESS_INTERVAL_S / len(waiting))]
        if on_progress is not None:
            on_progress(engines)


def _environment(spec: EngineSpec) -> dict[str, str]:
    """The environment of an engine: in-process, offline, one OpenMP thread per core."""
    overrides = {
        # One thread of control on the pinned cores: scheduler, target and proposer take turns, as they do in
        # EngineCore.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if spec.cores:
        overrides["OMP_NUM_THREADS"] = str(len(spec.cores))
    if not spec.plugins:
        overrides["VLLM_PLUGINS"] = ""
    if spec.visible_devices is not None:
        overrides["CUDA_VISIBLE_DEVICES"] = spec.visible_devices
    environment = child_environment(overrides, _REMOVED_VARIABLES)
    libraries = [one for one in (environment.get("LD_PRELOAD"), *_preloaded_libraries()) if one]
    return environment | ({"LD_PRELOAD": ":".join(libraries)} if libraries and spec.cores else {})


def _preloaded_libraries() -> list[str]:
    """The libraries that vLLM's CPU platform preloads into workers it spawns; an in-process engine would lack them."""
    found = []
    for package, pattern in (("vllm", "libs/libtcmalloc*.so*"), ("torch", "lib/libgomp*.so*")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            found += sorted(str(path) for path in Path(folder).glob(pattern))[:1]
    return found
