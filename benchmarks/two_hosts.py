"""Two hosts on one machine: two network namespaces with an address each, and a wire between them that can be cut.

Owns the namespaces and the wire; what runs in them is others' business. Linux, as root, with `ip` (iproute2). Runs in the process
of a benchmark.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from vllm_specbranch.errors import SpecBranchError

# Of a private network that no route of the machine leads to: both ends of the wire are in the namespaces.
ADDRESSES = {"engine": "10.203.77.1", "draft": "10.203.77.2"}
_PREFIX_LENGTH = 30
_CLONE_NEWNET = 0x40000000
_COMMAND_TIMEOUT_S = 20.0
_NAMESPACES = Path("/run/netns")

Host = Literal["engine", "draft"]


class NoHostsError(SpecBranchError):
    """This machine, or this user, cannot make network namespaces."""


class TwoHosts:
    """Two hosts, `engine` and `draft`. Use as a context manager: entering makes them, leaving removes them.

    What still runs in one when it is removed keeps it, without its wire.

    Raises:
        NoHostsError: not Linux, not root, no `ip`, or the kernel refuses.
    """

    def __init__(self) -> None:
        if why := missing():
            raise NoHostsError(f"two hosts cannot be made here: {why}")
        self._names = {host: f"specbranch-{host}-{os.getpid()}" for host in ADDRESSES}
        # At most 15 characters.
        self._ends = {host: f"sb{host[0]}{os.getpid()}" for host in ADDRESSES}

    def __enter__(self) -> "TwoHosts":
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    @contextlib.contextmanager
    def on(self, host: Host) -> Iterator[None]:
        """Let this thread, and the processes that it starts, live on a host; what it has started stays there."""
        with open("/proc/thread-self/ns/net", "rb") as home, (_NAMESPACES / self._names[host]).open("rb") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def cut(self) -> None:
        """Cut the wire: what is sent is lost, and nobody is told."""
        self._ip("-n", self._names["engine"], "link", "set", self._ends["engine"], "down")

    def heal(self) -> None:
        """Join it again."""
        self._ip("-n", self._names["engine"], "link", "set", self._ends["engine"], "up")

    def _make(self) -> None:
        for name in self._names.values():
            self._ip("netns", "add", name)
        first, second = self._ends.values()
        engine, draft = self._names.values()
        wire = ["link", "add", first, "netns", engine, "type", "veth", "peer", "name", second, "netns", draft]
        self._ip(*wire)
        for host, name in self._names.items():
            self._ip("-n", name, "address", "add", f"{ADDRESSES[host]}/{_PREFIX_LENGTH}", "dev", self._ends[host])
            for device in ("lo", self._ends[host]):
                self._ip("-n", name, "link", "set", device, "up")

    def _remove(self) -> None:
        for name in self._names.values():
            if (_NAMESPACES / name).exists():
                # The wire goes with its ends.
                self._ip("netns", "delete", name)

    @staticmethod
    def _ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
        if done.returncode:
            raise NoHostsError(f"`ip {' '.join(words)}` failed: {done.stderr.strip() or done.returncode}")


def missing() -> str | None:
    """Why two hosts cannot be made here; None if they can, as far as that can be told without trying."""
    if sys.platform != "linux":
        return f"network namespaces are Linux's, and this is {sys.platform}"
    if os.geteuid() != 0:
        return "network namespaces are made by root (try sudo)"
    if shutil.which("ip") is None:
        return "there is no `ip` (install iproute2)"
    return None


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        number = ctypes.get_errno()
        raise NoHostsError(f"a network namespace cannot be entered: {os.strerror(number)}")
