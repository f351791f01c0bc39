"""Carries messages between the engine and the draft server: ZMQ over a Unix socket, and an in-memory twin for tests.

Owns sockets, timeouts, queue limits and the dropping of bytes that are no message. Does not own what a message is
(`messages`), nor who starts or restarts the server (`placement`). The client end runs in the target worker, the server
end in the draft server; each end belongs to one thread.

Nothing here waits without a limit. A send never blocks: it returns False when the queue is full or the peer is gone.
A receive has one timeout for the whole call, however many malformed messages arrive meanwhile. Malformed messages are
dropped and counted, with one log line per channel.

The server may die and come back at the same address: a client reconnects by itself. Up to `QUEUE_LENGTH` messages
that it sent in between may reach the new server, before anything newer, so a server must expect strangers' leftovers.
"""

import contextlib
import errno
import logging
import math
import os
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import zmq

from vllm_specbranch import messages
from vllm_specbranch.errors import WireError
from vllm_specbranch.messages import EngineMessage, ServerMessage

# Messages held per direction and peer. An engine step makes two messages out and one back, so this is about thirty
# steps: a peer that is further behind is hung or dead, and its backlog would be stale.
QUEUE_LENGTH = 64
MAX_IPC_PATH_BYTES = 107  # sockaddr_un.sun_path is 108 bytes on Linux, one of them the terminating zero.

_MAX_LATE_DROPS = (
    8  # Malformed messages that a receive skips past its deadline, so that recv(0) gets at what is behind them.
)
_MAX_DRAIN = 4 * QUEUE_LENGTH
_MAX_POLL_MS = 2**31 - 1
_RECONNECT_MS = 50  # A connection attempt to a missing file takes microseconds.
_MAX_RECONNECT_MS = 500
_MEMORY_PEER = b"memory"

_Frames = Sequence[bytes]
_T = TypeVar("_T")
_logger = logging.getLogger("vllm.specbranch.transport")


class ClientChannel(Protocol):
    """The engine's end. Used by one thread."""

    @property
    def num_dropped(self) -> int:
        """Messages received and thrown away because they were malformed."""

    def send(self, message: EngineMessage) -> bool:
        """Queues a message; never blocks. False: nothing was sent (queue full, closed, or message over the limit)."""

    def recv(self, timeout_ms: float) -> ServerMessage | None:
        """The next message, or None after `timeout_ms` in all; 0 or less takes only what has arrived."""

    def drain(self) -> None:
        """Throws away what has arrived and was not received, undecoded."""

    def close(self) -> None:
        """Lets go of the socket; unsent messages are lost. Closing again does nothing."""


class ServerEndpoint(Protocol):
    """The draft server's end. Used by one thread."""

    @property
    def num_dropped(self) -> int:
        """Messages received and thrown away because they were malformed."""

    def recv(self, timeout_ms: float) -> tuple[bytes, EngineMessage] | None:
        """The next message and its sender, or None after `timeout_ms` in all; 0 or less takes only what has arrived."""

    def watch(self, descriptor: int) -> None:
        """Lets `recv` also return, with None, while this file descriptor is readable."""

    def send(self, peer: bytes, message: ServerMessage) -> bool:
        """Queues a message for a sender that `recv` named; never blocks. False: nothing was sent (gone or full)."""

    def close(self) -> None:
        """Lets go of the socket and removes its file; unsent messages are lost. Closing again does nothing."""


def connect(address: str) -> ClientChannel:
    """Opens the engine's end. Returns at once, whether or not a server is there.

    Args:
        address: `ipc://` and an absolute path.

    Raises:
        WireError: the address cannot be used.
    """
    ipc_path(address)
    # No MAXMSGSIZE here: libzmq never reconnects a client whose server broke that limit. The decoder checks the size.
    return _Client(_Port(zmq.DEALER, lambda port: port.connect(address), address), address)


def bind(address: str) -> ServerEndpoint:
    """Opens the draft server's end and replaces the socket file of a server that died.

    Args:
        address: `ipc://` and an absolute path, in a directory that exists.

    Raises:
        WireError: the address cannot be used, a live server has it, or something other than a socket is at the path.
    """
    _check_free(ipc_path(address))

    def start(port: zmq.Socket[bytes]) -> None:
        port.setsockopt(zmq.ROUTER_MANDATORY, 1)  # A send to a vanished peer fails, where it would be silently lost.
        # A longer message is never held in memory: libzmq cuts that connection, and the client connects anew.
        port.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
        port.bind(address)

    return _Server(_BoundPort(zmq.ROUTER, start, address), address)


def memory_pair() -> tuple[ClientChannel, ServerEndpoint]:
    """Two connected ends without sockets, for single-threaded tests: what one sends, the other receives, through bytes.

    Timeouts are ignored: nothing can arrive while `recv` runs, so it returns None at once. A send returns False when
    `QUEUE_LENGTH` messages wait or the other end is closed.
    """
    to_server, to_client = _MemoryQueue(), _MemoryQueue()
    client = _MemoryLink(to_client, to_server, lambda frames: [_MEMORY_PEER, *frames])
    server = _MemoryLink(to_server, to_client, lambda frames: frames[1:] if frames[0] == _MEMORY_PEER else None)
    return _Client(client, "memory"), _Server(server, "memory")


def ipc_path(address: str) -> str:
    """The path of an `ipc://` address.

    Raises:
        WireError: it is not `ipc://` and an absolute path, or the path is too long for a Unix socket.
    """
    scheme, separator, path = address.partition("://")
    if (scheme, separator) != ("ipc", "://") or not path.startswith("/") or "\0" in path:
        raise WireError(f"address {address!r} cannot be used; allowed: ipc:// and an absolute path")
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_IPC_PATH_BYTES:
        raise WireError(
            f"address {address!r} cannot be used: its path has {num_bytes} bytes, a Unix socket's at most "
            f"{MAX_IPC_PATH_BYTES}; choose a shorter directory"
        )
    return path


def _check_free(path: str) -> None:
    """Raises WireError unless `path` is free or a dead server's socket: libzmq would replace whatever is there."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise WireError(f"cannot bind to {path!r}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise WireError(f"cannot bind to {path!r}: something is there that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise WireError(f"cannot bind to {path!r}: another server is listening there")


class _Link(Protocol):
    """Moves frames: a socket, or its in-memory twin. On the server's side the first frame is the peer's name."""

    def send(self, frames: _Frames) -> bool:
        """Whether the frames were queued. Never blocks, never raises."""

    def fetch(self, timeout_ms: float) -> _Frames | None:
        """The frames of the next arrival, or None if there is none within `timeout_ms` or the link is closed."""

    def watch(self, descriptor: int) -> None:
        """Lets `fetch` also return while this file descriptor is readable."""

    def close(self) -> None:
        """Closes; again does nothing."""


class _Port:
    """A ZMQ socket in a context of its own, so that closing it waits for nobody else's sockets."""

    def __init__(self, kind: int, start: Callable[[zmq.Socket[bytes]], object], address: str) -> None:
        self._closed = False
        self._context = zmq.Context()
        try:
            self._socket: zmq.Socket[bytes] = self._context.socket(kind)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.SNDHWM, QUEUE_LENGTH)
            self._socket.setsockopt(zmq.RCVHWM, QUEUE_LENGTH)
            self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
            start(self._socket)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise WireError(f"cannot use the address {address!r}: {error}") from error
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def send(self, frames: _Frames) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:  # Full (EAGAIN), no such peer (EHOSTUNREACH), closed (ENOTSOCK).
            return False
        return True

    def fetch(self, timeout_ms: float) -> _Frames | None:
        if self._closed:
            return None
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)  # Before any poll, which costs ten times as much.
        except zmq.Again:
            if not timeout_ms > 0:
                return None
        # Rounded up: poll takes whole milliseconds.
        if not self._poller.poll(math.ceil(min(timeout_ms, _MAX_POLL_MS))):
            return None
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def watch(self, descriptor: int) -> None:
        self._poller.register(descriptor, zmq.POLLIN)

    def close(self) -> None:
        self._closed = True
        self._context.destroy(linger=0)


class _BoundPort(_Port):
    """A listening socket, which removes its file: libzmq leaves it behind."""

    def __init__(self, kind: int, start: Callable[[zmq.Socket[bytes]], object], address: str) -> None:
        super().__init__(kind, start, address)
        self._path = ipc_path(address)
        self._file = _file_identity(self._path)

    def close(self) -> None:
        if self._closed:
            return
        # Before the socket closes, for after that the path may be a successor's; and only if the file is still ours.
        if self._file is not None and _file_identity(self._path) == self._file:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        super().close()


def _file_identity(path: str) -> tuple[int, int] | None:
    """Device and inode of a file, None if there is none."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class _MemoryQueue:
    """One direction of a memory pair."""

    def __init__(self) -> None:
        self.arrivals: deque[_Frames] = deque()
        self.closed = False


class _MemoryLink:
    """One end of a memory pair. `readdress` does a ROUTER's work: puts the peer's name in front, or takes it off."""

    def __init__(
        self, inbox: _MemoryQueue, outbox: _MemoryQueue, readdress: Callable[[_Frames], _Frames | None]
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._readdress = readdress

    def send(self, frames: _Frames) -> bool:
        addressed = self._readdress(frames)
        if addressed is None or self._inbox.closed or self._outbox.closed:
            return False
        if len(self._outbox.arrivals) >= QUEUE_LENGTH:
            return False
        self._outbox.arrivals.append(addressed)
        return True

    def fetch(self, timeout_ms: float) -> _Frames | None:
        return self._inbox.arrivals.popleft() if self._inbox.arrivals else None

    def watch(self, descriptor: int) -> None:
        """Nothing to do: `fetch` never waits."""

    def close(self) -> None:
        self._inbox.closed = True
        self._inbox.arrivals.clear()


class _Channel(Generic[_T]):
    """What both ends share: the total timeout, and dropping what is malformed.

    Args:
        link: where frames come from and go to.
        read: turns one arrival into what `recv` returns, or raises WireError.
        name: of this end, for the log.
    """

    def __init__(self, link: _Link, read: Callable[[_Frames], _T], name: str) -> None:
        self._link = link
        self._read = read
        self._name = name
        self._num_dropped = 0
        self._logged_unsent = False

    @property
    def num_dropped(self) -> int:
        return self._num_dropped

    def recv(self, timeout_ms: float) -> _T | None:
        deadline = time.monotonic() + timeout_ms / 1000
        remaining_ms = timeout_ms
        num_skipped = 0
        while (frames := self._link.fetch(remaining_ms)) is not None:
            try:
                return self._read(frames)
            except WireError as error:
                self._drop(error)
            num_skipped += 1
            remaining_ms = (deadline - time.monotonic()) * 1000
            if remaining_ms <= 0 and num_skipped >= _MAX_LATE_DROPS:
                return None
        return None

    def close(self) -> None:
        self._link.close()

    def _drop(self, error: WireError) -> None:
        self._num_dropped += 1
        if self._num_dropped == 1:
            _logger.warning("Dropped a message on %s: %s. More will only be counted.", self._name, error)

    def _send(self, peer: _Frames, message: messages.Message) -> bool:
        try:
            data = messages.encode(message)
        except WireError as error:
            if not self._logged_unsent:
                self._logged_unsent = True
                _logger.warning("Could not send a message on %s: %s. More will not be logged.", self._name, error)
            return False
        return self._link.send([*peer, data])


class _Client(_Channel[ServerMessage]):
    """`ClientChannel` over a link."""

    def __init__(self, link: _Link, name: str) -> None:
        super().__init__(link, lambda frames: messages.decode_for_engine(_only(frames)), f"the engine's end of {name}")

    def send(self, message: EngineMessage) -> bool:
        return self._send([], message)

    def drain(self) -> None:
        for _ in range(_MAX_DRAIN):
            if self._link.fetch(0) is None:
                return


class _Server(_Channel[tuple[bytes, EngineMessage]]):
    """`ServerEndpoint` over a link."""

    def __init__(self, link: _Link, name: str) -> None:
        def read(frames: _Frames) -> tuple[bytes, EngineMessage]:
            return frames[0], messages.decode_for_server(_only(frames[1:]))

        super().__init__(link, read, f"the draft server's end of {name}")

    def watch(self, descriptor: int) -> None:
        self._link.watch(descriptor)

    def send(self, peer: bytes, message: ServerMessage) -> bool:
        return self._send([peer], message)


def _only(frames: _Frames) -> bytes:
    if len(frames) != 1:
        raise WireError(f"a message has {len(frames)} frames, not 1")
    return frames[0]
