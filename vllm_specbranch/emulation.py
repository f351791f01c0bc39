"""Forwards of a model, noted and stretched, so that two CPU cores behave like two accelerators. For benchmarks only.

Owns how long an emulated forward lasts, the sleep that makes it so, and what is noted of it; nothing on the package's hot path
knows of it. A model that is not in this process reads its pace from a `PaceFile` and appends to a `RecordFile`. Runs in the
measured child and in the observed draft server; imports neither torch nor vLLM.

Times are `time.perf_counter`, which on Linux is the same clock in all processes.
"""

import ctypes
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_specbranch.measure_messages import Forward

# A forward that lasts longer than this many times its emulated duration was not emulated.
OVERRUN = 1.1
# A sleep ends late, the later the longer it was (a core in deep idle): 0.1 to 0.3 ms on an idle virtual machine. So the first
# sleep ends this much early, ...
_FIRST_MARGIN_S = 500e-6
# ... short ones follow, and what is left of this is waited for awake.
_LAST_MARGIN_S = 50e-6
# The kernel may end a thread's sleep late by its timer slack, 50 us by default.
_PR_SET_TIMERSLACK = 29
_TIMER_SLACK_NS = 1
_sleepers = threading.local()


def _sharpen_timer() -> None:
    """Ask for exact sleeps of the calling thread, once."""
    if not getattr(_sleepers, "is_sharp", False):
        _sleepers.is_sharp = True
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)


def sleep_until(deadline_s: float) -> None:
    """Hold up the calling thread until `time.perf_counter() >= deadline_s`, with the GIL released and the core free."""
    _sharpen_timer()
    while (left_s := deadline_s - time.perf_counter()) > _LAST_MARGIN_S:
        time.sleep(left_s - (_FIRST_MARGIN_S if left_s > 2 * _FIRST_MARGIN_S else _LAST_MARGIN_S))
    while time.perf_counter() < deadline_s:
        pass


@dataclass(frozen=True, slots=True)
class Pace:
    """How long the forwards of one model last.

    Attributes:
        base_ms: a forward of one token; 0 for no stretching.
        token_cost: each further token, relative to one alone.
    """

    base_ms: float = 0.0
    token_cost: float = 0.0

    def duration_s(self, num_tokens: int) -> float:
        """Of a forward of `num_tokens` query tokens."""
        return self.base_ms * 1e-3 * (1 + self.token_cost * (num_tokens - 1))

    def num_overruns(self, forwards: Iterable[Forward]) -> int:
        """How many lasted clearly longer than this: their own computing took too long, or the machine was busy."""
        if not self.base_ms:
            return 0
        return sum(one.end_s - one.start_s > OVERRUN * self.duration_s(one.num_tokens) for one in forwards)


class Records(Protocol):
    """Where noted forwards go."""

    def append(self, forward: Forward) -> None:
        """Note one; from any thread."""
        ...


class Observer:
    """Notes the forwards of one model, and stretches them.

    Args:
        pace: asked at the end of every forward.
        records: where forwards go, with absolute times.
    """

    def __init__(self, pace: Callable[[], Pace], records: Records) -> None:
        self._pace = pace
        self._records = records

    def finish(self, started_s: float, num_tokens: int) -> None:
        """The forward that began at `started_s` has been computed: make it last as long as it should, and note it."""
        sleep_until(started_s + self._pace().duration_s(num_tokens))
        self._records.append(Forward(started_s, time.perf_counter(), num_tokens))


class PaceFile:
    """A pace in a small file that several processes have mapped: written between runs, read at every forward.

    A reader may meet a pace half written: one forward between two runs then lasts wrong. Nothing measured sees it.

    Args:
        path: of the file; made if it is not there.
    """

    _LAYOUT = struct.Struct("=dd")

    def __init__(self, path: Path) -> None:
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            if os.fstat(file.fileno()).st_size < self._LAYOUT.size:
                file.truncate(self._LAYOUT.size)
            self._map = mmap.mmap(file.fileno(), self._LAYOUT.size)

    def write(self, pace: Pace) -> None:
        """Valid from the next forward on."""
        self._LAYOUT.pack_into(self._map, 0, pace.base_ms, pace.token_cost)

    def read(self) -> Pace:
        """The present pace; no stretching if none was ever written."""
        return Pace(*self._LAYOUT.unpack_from(self._map, 0))


class RecordFile:
    """Forwards in a file: appended by one process (about 3 us each, and safe from any thread), read by another.

    Args:
        path: of the file; made if it is not there.
    """

    _LAYOUT = struct.Struct("=ddq")

    def __init__(self, path: Path) -> None:
        # Appending writes of one record each: they neither mix nor get lost when the writer is killed.
        self._writer = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb", buffering=0)  # noqa: SIM115
        self._reader = path.open("rb")

    def append(self, forward: Forward) -> None:
        """Note one."""
        self._writer.write(self._LAYOUT.pack(forward.start_s, forward.end_s, forward.num_tokens))

    def take(self) -> list[Forward]:
        """All that have been noted since the last call, in the order of their ends."""
        data = self._reader.read()
        whole = len(data) - len(data) % self._LAYOUT.size
        self._reader.seek(whole - len(data), os.SEEK_CUR)
        return [Forward(*fields) for fields in self._LAYOUT.iter_unpack(data[:whole])]

    def close(self) -> None:
        """Let go of the file."""
        self._writer.close()
        self._reader.close()


def count_tokens(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int:
    """Query tokens in the arguments of a vLLM model's forward: the length of its positions.

    Positions come second; models with several position axes (M-RoPE) have the tokens last.
    """
    positions = keywords["positions"] if "positions" in keywords else arguments[1]
    return int(positions.shape[-1])


def hook_module(module: Any, observer: Observer) -> None:
    """Have `observer` note and stretch every forward of a torch module with the arguments of a vLLM model.

    Args:
        module: whose forwards do not overlap, on a device that computes in the calling thread.
    """
    started_s = 0.0

    def before(_module: Any, _arguments: tuple[Any, ...], _keywords: dict[str, Any]) -> None:
        nonlocal started_s
        started_s = time.perf_counter()

    def after(_module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], _output: Any) -> None:
        observer.finish(started_s, count_tokens(arguments, keywords))

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)


def within(forwards: Iterable[Forward], start_s: float, end_s: float) -> list[Forward]:
    """Those that began in `[start_s, end_s)`, by their start, with times since `start_s`."""
    chosen = sorted((one for one in forwards if start_s <= one.start_s < end_s), key=lambda one: one.start_s)
    return [Forward(one.start_s - start_s, one.end_s - start_s, one.num_tokens) for one in chosen]
