"""ZMQ sockets of both ends: options, keys, files, and what a peer over TCP may send. Knows frames, not messages.

Owns what is done to a socket before it is used, and what is removed after. Over TCP a socket has keys, or the word `insecure`; a
server's admits only clients whose keys it knows, and drops what comes from a peer that sends too fast (`rates`).
"""

import contextlib
import errno
import logging
import math
import os
import socket
import stat
import threading
from collections.abc import Callable, Sequence

import zmq
from zmq.auth.thread import ThreadAuthenticator

from vllm_specbranch.addresses import ipc_path, tcp_host_and_port
from vllm_specbranch.errors import WireError
from vllm_specbranch.keys import INSECURE, AllowList, ClientKeys, ClientSecurity, ServerKeys, ServerSecurity
from vllm_specbranch.rates import Rates

# Messages held per direction and peer. An engine step makes two messages out and one back, so this is about thirty
# steps: a peer that is further behind is hung or dead, and its backlog would be stale.
QUEUE_LENGTH = 64

_MAX_POLL_MS = 2**31 - 1
_RECONNECT_MS = 50  # A connection attempt to a missing file takes microseconds.
_MAX_RECONNECT_MS = 500
# A host that is gone sends no farewell: the system asks an idle connection after so many seconds whether it is there, and cuts it
# when so much later nothing has come. Not libzmq's heartbeats: 4.3.5 ends its whole process at one of them when the connection
# has broken while what had come over it was not read yet and filled the queue.
_KEEP_ALIVE_S = 1
_KEEP_ALIVE_PROBES = 5
# A stranger that connects and says nothing; and an address that swallows what is sent there.
_HANDSHAKE_MS = 5000
_CONNECT_MS = 2000
_ZAP_DOMAIN = "specbranch"
_MAX_SKIPPED = 256  # Messages of peers that are too fast, dropped in one go before a caller gets its turn again.

Frames = Sequence[bytes]
_Socket = zmq.Socket[bytes]
_logger = logging.getLogger("vllm.specbranch.transport")


class Port:
    """A ZMQ socket in a context of its own, so that closing it waits for nobody else's sockets.

    Args:
        kind: `zmq.DEALER` or `zmq.ROUTER`.
        start: connects or binds it.
        address: for messages to people.

    Raises:
        WireError: libzmq or the system refuses.
    """

    def __init__(self, kind: int, start: Callable[[_Socket], object], address: str) -> None:
        self._closed = False
        self._context = zmq.Context()
        try:
            self._socket: _Socket = self._context.socket(kind)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.SNDHWM, QUEUE_LENGTH)
            self._socket.setsockopt(zmq.RCVHWM, QUEUE_LENGTH)
            self._socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
            start(self._socket)
        except zmq.ZMQError as error:
            self._abandon()
            raise WireError(f"cannot use the address {address!r}: {error}") from error
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)

    def _abandon(self) -> None:
        self._context.destroy(linger=0)

    def send(self, frames: Frames) -> bool:
        """Whether the frames were queued. Never blocks, never raises."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError:  # Full (EAGAIN), no such peer (EHOSTUNREACH), closed (ENOTSOCK).
            return False
        return True

    def fetch(self, timeout_ms: float) -> Frames | None:
        """The frames of the next arrival, or None if there is none within `timeout_ms` or the port is closed."""
        if self._closed:
            return None
        try:
            return self._receive()  # Before any poll, which costs ten times as much.
        except zmq.Again:
            if not timeout_ms > 0:
                return None
        # Rounded up: poll takes whole milliseconds.
        if not self._poller.poll(math.ceil(min(timeout_ms, _MAX_POLL_MS))):
            return None
        try:
            return self._receive()
        except zmq.Again:
            return None

    def _receive(self) -> Frames | None:
        """What has arrived; raises `zmq.Again` if nothing has."""
        return self._socket.recv_multipart(zmq.NOBLOCK)

    def watch(self, descriptor: int) -> None:
        """Lets `fetch` also return while this file descriptor is readable."""
        self._poller.register(descriptor, zmq.POLLIN)

    @property
    def num_refused(self) -> int:
        """Messages that were dropped unread because their senders were too fast."""
        return 0

    def close(self, linger_ms: int = 0) -> None:
        """Lets go of the socket; what has not left within `linger_ms` is lost. Again does nothing."""
        self._closed = True
        self._context.destroy(linger=linger_ms)


class ClientPort(Port):
    """An engine's socket, which goes on with its work while it is closed.

    Raises:
        WireError: libzmq or the system refuses.
    """

    def __init__(self, start: Callable[[_Socket], object], address: str) -> None:
        super().__init__(zmq.DEALER, start, address)

    def close(self, linger_ms: int = 0) -> None:
        """Also lets go of the context, on another thread: libzmq may be waiting in there for the name of a host, for seconds."""
        if self._closed:
            return
        self._closed = True
        self._socket.close(linger=linger_ms)
        threading.Thread(target=self._context.term, name="close port", daemon=True).start()


class IpcServerPort(Port):
    """A listening Unix socket, which removes its file: libzmq leaves it behind.

    Args:
        start: sets options and binds.
        address: `ipc://` and an absolute path.

    Raises:
        WireError: the address cannot be used, a live server has it, or something other than a socket is at the path.
    """

    def __init__(self, start: Callable[[_Socket], object], address: str) -> None:
        self._path = ipc_path(address)
        _check_free(self._path)
        super().__init__(zmq.ROUTER, start, address)
        self._file = _file_identity(self._path)

    def close(self, linger_ms: int = 0) -> None:
        """Also removes the socket's file."""
        if self._closed:
            return
        # Before the socket closes, for after that the path may be a successor's; and only if the file is still ours.
        if self._file is not None and _file_identity(self._path) == self._file:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        super().close(linger_ms)


class TcpServerPort(Port):
    """A listening TCP socket.

    Args:
        start: sets options and binds.
        address: `tcp://host:port`.
        security: whom it admits.
        rates: how fast they may send.

    Raises:
        WireError: the address cannot be used.
    """

    def __init__(
        self, start: Callable[[_Socket], object], address: str, security: ServerSecurity, rates: Rates | None = None
    ) -> None:
        self._rates = Rates() if rates is None else rates
        self._authenticator: ThreadAuthenticator | None = None
        host, _ = tcp_host_and_port(address, to_bind=True)

        def start_safely(port: _Socket) -> None:
            _set_tcp_options(port, host)
            if isinstance(security, ServerKeys):
                self._authenticator = _start_authenticator(self._context, AllowList(security.clients))
                port.setsockopt(zmq.CURVE_SERVER, 1)
                port.setsockopt(zmq.CURVE_SECRETKEY, security.secret)
                port.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN.encode())
                # Without an authenticator libzmq would admit any key: with this it admits none.
                port.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
            start(port)

        super().__init__(zmq.ROUTER, start_safely, address)
        # With the port that the system chose, where 0 was asked for.
        self.address = str(self._socket.get_string(zmq.LAST_ENDPOINT)).rstrip("\0")

    def _receive(self) -> Frames | None:
        for _ in range(_MAX_SKIPPED):
            frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            if self._rates.admits(_source(frames[-1]), sum(len(one) for one in frames)):
                return [one.bytes for one in frames]
            if self._rates.num_dropped == 1:
                _logger.warning(
                    "Dropped a message of %s, which sends too fast. More will only be counted.", self._who(frames[-1])
                )
        return None

    @staticmethod
    def _who(frame: zmq.Frame) -> str:
        return f"{_property(frame, 'User-Id')!a} at {_property(frame, 'Peer-Address')}"

    @property
    def num_refused(self) -> int:
        """Messages that were dropped unread because their senders were too fast."""
        return self._rates.num_dropped

    def _abandon(self) -> None:
        self._stop_authenticator()
        super()._abandon()

    def close(self, linger_ms: int = 0) -> None:
        """Also ends the authenticator's thread, once nobody can ask it any more."""
        if self._closed:
            return
        self._closed = True
        self._socket.close(linger=linger_ms)
        self._stop_authenticator()
        super().close(linger_ms)

    def _stop_authenticator(self) -> None:
        authenticator, self._authenticator = self._authenticator, None
        if authenticator is not None:
            authenticator.stop()


def set_client_options(port: _Socket, host: str, security: ClientSecurity) -> None:
    """What an engine's TCP socket gets before it connects."""
    _set_tcp_options(port, host)
    port.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
    if isinstance(security, ClientKeys):
        port.setsockopt(zmq.CURVE_SERVERKEY, security.server)
        port.setsockopt(zmq.CURVE_PUBLICKEY, security.public)
        port.setsockopt(zmq.CURVE_SECRETKEY, security.secret)


def check_security(address: str, security: object, kind: type) -> None:
    """TCP needs keys of the right kind or the word, a Unix socket neither.

    Raises:
        WireError: it is not so.
    """
    if not isinstance(security, kind) and security != INSECURE:
        raise WireError(f"address {address!r} cannot be used without {kind.__name__} or the word {INSECURE!r}")


def _set_tcp_options(port: _Socket, host: str) -> None:
    port.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    port.setsockopt(zmq.TCP_KEEPALIVE, 1)
    port.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEP_ALIVE_S)
    port.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _KEEP_ALIVE_S)
    port.setsockopt(zmq.TCP_KEEPALIVE_CNT, _KEEP_ALIVE_PROBES)
    # The same for what was sent and is not confirmed.
    port.setsockopt(zmq.TCP_MAXRT, 1000 * _KEEP_ALIVE_S * _KEEP_ALIVE_PROBES)
    if ":" in host:
        port.setsockopt(zmq.IPV6, 1)


def _start_authenticator(context: zmq.Context[_Socket], allowed: AllowList) -> ThreadAuthenticator:
    """pyzmq's authenticator, on a thread of its own; it has to run before the socket is bound."""
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(domain=_ZAP_DOMAIN, credentials_provider=allowed)
    return authenticator


def _source(frame: zmq.Frame) -> str:
    """Who sent a frame: its key, and without keys its address."""
    return _property(frame, "User-Id") or _property(frame, "Peer-Address")


def _property(frame: zmq.Frame, name: str) -> str:
    try:
        return str(frame.get(name))
    except zmq.ZMQError:  # There is no User-Id without keys.
        return ""


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


def _file_identity(path: str) -> tuple[int, int] | None:
    """Device and inode of a file, None if there is none."""
    try:
        found = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return found.st_dev, found.st_ino
