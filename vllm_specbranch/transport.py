"""Carries messages between the engine and the draft server: ZMQ over a Unix socket or TCP, and an in-memory twin for tests.

Owns timeouts and the dropping of bytes that are no message. Does not own the sockets (`zmq_port`), nor what a message is
(`messages`), nor who starts or restarts the server (`placement`). The client end runs in the target worker, the server
end in the draft server; each end belongs to one thread.

Nothing here waits without a limit. A send never blocks: it returns False when the queue is full or the peer is gone.
A receive has one timeout for the whole call, however many malformed messages arrive meanwhile. Malformed messages are
dropped and counted, with one log line per channel.

The server may die and come back at the same address: a client reconnects by itself. Up to `QUEUE_LENGTH` messages
that it sent in between may reach the new server, before anything newer, so a server must expect strangers' leftovers.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import zmq

from vllm_specbranch import messages
from vllm_specbranch.addresses import ipc_path, is_tcp, tcp_host_and_port
from vllm_specbranch.errors import VersionError, WireError
from vllm_specbranch.keys import ClientKeys, ClientSecurity, ServerKeys, ServerSecurity
from vllm_specbranch.messages import EngineMessage, ServerMessage
from vllm_specbranch.rates import Rates
from vllm_specbranch.zmq_port import (
    QUEUE_LENGTH,
    ClientPort,
    Frames,
    IpcServerPort,
    TcpServerPort,
    check_security,
    set_client_options,
)

_MAX_LATE_DROPS = (
    8  # Malformed messages that a receive skips past its deadline, so that recv(0) gets at what is behind them.
)
_MAX_DRAIN = 4 * QUEUE_LENGTH
_MEMORY_PEER = b"memory"

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
    def address(self) -> str:
        """Where it listens, with the port that the system chose where any was asked for."""

    @property
    def num_dropped(self) -> int:
        """Messages received and thrown away because they were malformed."""

    @property
    def num_refused(self) -> int:
        """Messages thrown away unread because their senders were too fast."""

    @property
    def key(self) -> str:
        """Which key has proved to be that of the sender that `recv` named last; the same empty one for all without keys."""

    def recv(self, timeout_ms: float) -> tuple[bytes, EngineMessage] | None:
        """The next message and its sender, or None after `timeout_ms` in all; 0 or less takes only what has arrived."""

    def watch(self, descriptor: int) -> None:
        """Lets `recv` also return, with None, while this file descriptor is readable."""

    def send(self, peer: bytes, message: ServerMessage) -> bool:
        """Queues a message for a sender that `recv` named; never blocks. False: nothing was sent (gone or full)."""

    def close(self, linger_ms: int = 0) -> None:
        """Lets go of the socket and removes its file; what is unsent after `linger_ms` is lost. Again does nothing."""


def connect(address: str, security: ClientSecurity | None = None) -> ClientChannel:
    """Opens the engine's end. Returns at once, whether or not a server is there.

    Args:
        address: `ipc://` and an absolute path, or `tcp://host:port`.
        security: for TCP: keys, or the word `insecure`.

    Raises:
        WireError: the address cannot be used, or not without keys.
    """

    def start(port: zmq.Socket[bytes]) -> None:
        # No MAXMSGSIZE here: libzmq never reconnects a client whose server broke that limit. The decoder checks the size.
        if is_tcp(address) and security is not None:
            set_client_options(port, tcp_host_and_port(address)[0], security)
        port.connect(address)

    if is_tcp(address):
        tcp_host_and_port(address)
        check_security(address, security, ClientKeys)
    else:
        ipc_path(address)
    return _Client(ClientPort(start, address), address)


def bind(address: str, security: ServerSecurity | None = None, rates: Rates | None = None) -> ServerEndpoint:
    """Opens the draft server's end. Over a Unix socket it replaces the socket file of a server that died.

    Args:
        address: `ipc://` and an absolute path, in a directory that exists; or `tcp://host:port`.
        security: for TCP: keys, or the word `insecure`.
        rates: for TCP: how fast a peer may send.

    Raises:
        WireError: the address cannot be used, or not without keys; a live server has it; or something other than a socket is at
            the path.
    """

    def start(port: zmq.Socket[bytes]) -> None:
        port.setsockopt(zmq.ROUTER_MANDATORY, 1)  # A send to a vanished peer fails, where it would be silently lost.
        # A longer message is never held in memory: libzmq cuts that connection, and the client connects anew.
        port.setsockopt(zmq.MAXMSGSIZE, messages.MAX_MESSAGE_BYTES)
        port.bind(address)

    if not is_tcp(address):
        return _Server(IpcServerPort(start, address), address)
    check_security(address, security, ServerKeys)
    assert security is not None
    asked = Rates() if rates is None else rates
    port = TcpServerPort(start, address, security, asked)
    # The rates are asked about each message before it is handed over, by its sender's key where there are keys.
    return _Server(port, port.address, (lambda: asked.source) if isinstance(security, ServerKeys) else None)


def memory_pair() -> tuple[ClientChannel, ServerEndpoint]:
    """Two connected ends without sockets, for single-threaded tests: what one sends, the other receives, through bytes.

    Timeouts are ignored: nothing can arrive while `recv` runs, so it returns None at once. A send returns False when
    `QUEUE_LENGTH` messages wait or the other end is closed.
    """
    to_server, to_client = _MemoryQueue(), _MemoryQueue()
    client = _MemoryLink(to_client, to_server, lambda frames: [_MEMORY_PEER, *frames])
    server = _MemoryLink(to_server, to_client, lambda frames: frames[1:] if frames[0] == _MEMORY_PEER else None)
    return _Client(client, "memory"), _Server(server, "memory")


class _Link(Protocol):
    """Moves frames: a socket, or its in-memory twin. On the server's side the first frame is the peer's name."""

    def send(self, frames: Frames) -> bool:
        """Whether the frames were queued. Never blocks, never raises."""

    def fetch(self, timeout_ms: float) -> Frames | None:
        """The frames of the next arrival, or None if there is none within `timeout_ms` or the link is closed."""

    def watch(self, descriptor: int) -> None:
        """Lets `fetch` also return while this file descriptor is readable."""

    @property
    def num_refused(self) -> int:
        """Arrivals that were dropped unread because their senders were too fast."""

    def close(self, linger_ms: int = 0) -> None:
        """Closes, once what was sent has left or `linger_ms` are over; again does nothing."""


class _MemoryQueue:
    """One direction of a memory pair."""

    def __init__(self) -> None:
        self.arrivals: deque[Frames] = deque()
        self.closed = False


class _MemoryLink:
    """One end of a memory pair. `readdress` does a ROUTER's work: puts the peer's name in front, or takes it off."""

    def __init__(self, inbox: _MemoryQueue, outbox: _MemoryQueue, readdress: Callable[[Frames], Frames | None]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._readdress = readdress

    def send(self, frames: Frames) -> bool:
        addressed = self._readdress(frames)
        if addressed is None or self._inbox.closed or self._outbox.closed:
            return False
        if len(self._outbox.arrivals) >= QUEUE_LENGTH:
            return False
        self._outbox.arrivals.append(addressed)
        return True

    def fetch(self, timeout_ms: float) -> Frames | None:
        return self._inbox.arrivals.popleft() if self._inbox.arrivals else None

    def watch(self, descriptor: int) -> None:
        """Nothing to do: `fetch` never waits."""

    @property
    def num_refused(self) -> int:
        return 0

    def close(self, linger_ms: int = 0) -> None:
        self._inbox.closed = True
        self._inbox.arrivals.clear()


class _Channel(Generic[_T]):
    """What both ends share: the total timeout, and dropping what is malformed.

    Args:
        link: where frames come from and go to.
        read: turns one arrival into what `recv` returns, or raises WireError.
        name: of this end, for the log.
    """

    def __init__(self, link: _Link, read: Callable[[Frames], _T], name: str) -> None:
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

    def close(self, linger_ms: int = 0) -> None:
        self._link.close(linger_ms)

    def _drop(self, error: WireError) -> None:
        self._num_dropped += 1
        if self._num_dropped == 1:
            _logger.warning("Dropped a message on %s: %s. More will only be counted.", self._name, error)

    def _send(self, peer: Frames, message: messages.Message) -> bool:
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

    def __init__(self, link: _Link, name: str, key_of_last: Callable[[], str] | None = None) -> None:
        def read(frames: Frames) -> tuple[bytes, EngineMessage]:
            try:
                return frames[0], messages.decode_for_server(_only(frames[1:]))
            except VersionError as error:
                # It cannot be read there either, but its version can: both logs say what is wrong.
                self.send(frames[0], messages.Refused("", str(error), True))
                raise

        super().__init__(link, read, f"the draft server's end of {name}")
        self.address = name
        self._key_of_last = key_of_last

    @property
    def num_refused(self) -> int:
        return self._link.num_refused

    @property
    def key(self) -> str:
        return "" if self._key_of_last is None else self._key_of_last()

    def watch(self, descriptor: int) -> None:
        self._link.watch(descriptor)

    def send(self, peer: bytes, message: ServerMessage) -> bool:
        return self._send([peer], message)


def _only(frames: Frames) -> bytes:
    if len(frames) != 1:
        raise WireError(f"a message has {len(frames)} frames, not 1")
    return frames[0]
