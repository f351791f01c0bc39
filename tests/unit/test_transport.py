"""Tests of `transport`: over real sockets, and over the in-memory twin wherever time plays no part."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from vllm_specbranch import addresses, messages, transport
from vllm_specbranch.errors import SpecBranchError, WireError
from vllm_specbranch.messages import (
    Commit,
    CommitBatch,
    Draft,
    DraftBatch,
    EngineMessage,
    Failure,
    Hello,
    Open,
    Ready,
    Shutdown,
    StatusQuery,
    StepBegin,
    encode,
)
from vllm_specbranch.transport import ClientChannel, ServerEndpoint
from vllm_specbranch.zmq_port import QUEUE_LENGTH

SOON_MS = 5000.0  # For what must arrive; reached only by a failing test.
BLOCKED_S = 1.0  # No call that must not block may take this long, even on a busy machine.
HELLO = Hello("session", 151936, 4096, False, None)
READY = Ready("session", 4096, 512, 32)
GARBAGE = b"\x01garbage"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def address(tmp_path: Path) -> str:
    """An unused ipc address."""
    return f"ipc://{tmp_path}/s"


@pytest.fixture
def open_ends() -> Iterator[list[ClientChannel | ServerEndpoint]]:
    """What a test puts here is closed after it."""
    ends: list[ClientChannel | ServerEndpoint] = []
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def connect(address: str, open_ends: list) -> Callable[[], ClientChannel]:
    """Opens client ends."""

    def open_one() -> ClientChannel:
        open_ends.append(transport.connect(address))
        return open_ends[-1]

    return open_one


@pytest.fixture
def bind(address: str, open_ends: list) -> Callable[[], ServerEndpoint]:
    """Opens server ends."""

    def open_one() -> ServerEndpoint:
        open_ends.append(transport.bind(address))
        return open_ends[-1]

    return open_one


Pair = tuple[ClientChannel, ServerEndpoint]


@pytest.fixture(params=["zmq", "memory"])
def pair(request: pytest.FixtureRequest, open_ends: list) -> Pair:
    """A client and a server that are connected, by socket and in memory."""
    if request.param == "memory":
        client, server = transport.memory_pair()
        open_ends += [client, server]
        return client, server
    server = request.getfixturevalue("bind")()
    return request.getfixturevalue("connect")(), server


@pytest.fixture
def raw(address: str) -> Iterator[Callable[[int], zmq.Socket]]:
    """Opens bare ZMQ sockets of a kind, for sending what a channel would not: a DEALER connects, a ROUTER binds."""
    context = zmq.Context()

    def open_one(kind: int) -> zmq.Socket:
        port = context.socket(kind)
        port.setsockopt(zmq.LINGER, 0)
        port.setsockopt(zmq.SNDTIMEO, int(SOON_MS))
        if kind == zmq.ROUTER:
            port.bind(address)
        else:
            port.connect(address)
        return port

    yield open_one
    context.destroy(linger=0)


def inject(end: ClientChannel | ServerEndpoint, *frames: bytes) -> None:
    """Sends frames as they are through an end, to the other end."""
    assert end._link.send(frames)


def introduce(client: ClientChannel, server: ServerEndpoint) -> bytes:
    """Sends a first message; returns the name that the server knows the client by."""
    assert client.send(HELLO)
    arrival = server.recv(SOON_MS)
    assert arrival is not None
    peer, message = arrival
    assert message == HELLO
    return peer


def wait_for(server: ServerEndpoint, wanted: EngineMessage) -> bytes:
    """Receives until a message comes; returns its sender. For what may arrive behind leftovers."""
    deadline = time.monotonic() + SOON_MS / 1000
    while time.monotonic() < deadline:
        arrival = server.recv(100)
        if arrival is not None and arrival[1] == wanted:
            return arrival[0]
    pytest.fail(f"{wanted} never came")


def timed_ms(call: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.monotonic()
    call()
    return (time.monotonic() - start) * 1000


# What both kinds of channel do.


def test_messages_go_both_ways_in_order(pair: Pair) -> None:
    client, server = pair
    peer = introduce(client, server)
    sent = [
        StepBegin([Open("a", [1, 2], None)], ["b"]),
        CommitBatch(1, 2.5, [Commit("a", 2, [3], 3, None)], None),
        StatusQuery(1),
        Shutdown(),
    ]
    assert all(client.send(message) for message in sent)
    assert [server.recv(SOON_MS) for _ in sent] == [(peer, message) for message in sent]
    replies = [READY, DraftBatch(1, True, [Draft("a", 3, [4], True, b"", b"", [])], ["c"]), Failure("why")]
    assert all(server.send(peer, reply) for reply in replies)
    assert [client.recv(SOON_MS) for _ in replies] == replies
    assert client.num_dropped == server.num_dropped == 0


def test_nothing_there_is_none(pair: Pair) -> None:
    client, server = pair
    for timeout_ms in (0, -1, 0.5):
        assert client.recv(timeout_ms) is None
        assert server.recv(timeout_ms) is None


def test_messages_are_copies_made_by_the_wire(pair: Pair) -> None:
    client, server = pair
    tokens = [1, 2]
    assert client.send(StepBegin([Open("a", tokens, None)], []))
    tokens.append(3)
    arrival = server.recv(SOON_MS)
    assert arrival is not None
    assert arrival[1] == StepBegin([Open("a", [1, 2], None)], [])


def test_client_drops_garbage_and_goes_on(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    client, server = pair
    peer = introduce(client, server)
    for frames in ([b""], [GARBAGE], [b"\x01" + encode(READY)[1:]], [encode(HELLO)], [encode(READY), b""], [b"", b""]):
        inject(server, peer, *frames)
    assert server.send(peer, READY)
    assert client.recv(SOON_MS) == READY
    assert client.num_dropped == 6
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert "empty" in caplog.text


def test_server_drops_garbage_and_goes_on(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    client, server = pair
    for frames in ([b""], [GARBAGE], [b"\x01" + encode(HELLO)[1:]], [encode(READY)], [encode(HELLO), b""], [b"", b""]):
        inject(client, *frames)
    introduce(client, server)
    assert server.num_dropped == 6
    assert len(caplog.records) == 1
    assert "empty" in caplog.text


def test_what_cannot_be_sent_is_false_and_logged_once(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    client, server = pair
    peer = introduce(client, server)
    oversized = Failure("x" * messages.MAX_MESSAGE_BYTES)
    assert [server.send(peer, oversized) for _ in range(3)] == [False] * 3
    assert len(caplog.records) == 1
    assert f"over the limit of {messages.MAX_MESSAGE_BYTES}" in caplog.text
    assert not client.send(StatusQuery(2**64))
    assert len(caplog.records) == 2
    assert server.send(peer, READY)
    assert client.recv(SOON_MS) == READY


def test_unknown_peer_is_false(pair: Pair) -> None:
    _, server = pair
    for peer in (b"nobody", b"", b"\0" * 5):
        assert not server.send(peer, READY)


def test_drain_forgets_what_has_arrived(pair: Pair) -> None:
    client, server = pair
    peer = introduce(client, server)
    for number in range(10):
        assert server.send(peer, DraftBatch(number, True, [], []))
    inject(server, peer, GARBAGE)
    time.sleep(0.1)  # A real socket's messages need a moment to arrive.
    client.drain()
    assert client.recv(0) is None
    assert client.num_dropped == 0
    assert server.send(peer, READY)
    assert client.recv(SOON_MS) == READY


def test_closing_twice_and_using_closed_ends(pair: Pair) -> None:
    client, server = pair
    peer = introduce(client, server)
    for end in (client, server):
        end.close()
        end.close()
    assert not client.send(HELLO)
    assert not server.send(peer, READY)
    assert client.recv(50) is None
    assert server.recv(50) is None
    client.drain()
    assert client.num_dropped == 0


def test_client_that_leaves_is_noticed(pair: Pair) -> None:
    client, server = pair
    peer = introduce(client, server)
    client.close()
    results = []
    deadline = time.monotonic() + SOON_MS / 1000
    while (not results or results[-1]) and time.monotonic() < deadline:
        assert timed_ms(lambda: results.append(server.send(peer, READY))) < BLOCKED_S * 1000
        time.sleep(0.01)
    assert results[-1] is False
    assert server.recv(0) is None


# The memory twin alone.


def test_memory_pair_is_bounded_and_never_waits() -> None:
    client, server = transport.memory_pair()
    assert [client.send(HELLO) for _ in range(QUEUE_LENGTH + 2)] == [True] * QUEUE_LENGTH + [False] * 2
    assert sum(server.recv(0) is not None for _ in range(QUEUE_LENGTH + 2)) == QUEUE_LENGTH
    assert timed_ms(lambda: server.recv(60_000)) < BLOCKED_S * 1000
    assert client.send(HELLO)
    server.close()
    assert not client.send(HELLO)


# Timeouts.


@pytest.mark.parametrize("timeout_ms", [0.2, 30.5, 150])
def test_timeouts_are_kept(connect: Callable, bind: Callable, timeout_ms: float) -> None:
    server, client = bind(), connect()
    introduce(client, server)
    for end in (client, server):
        elapsed_ms = timed_ms(lambda end=end: end.recv(timeout_ms))
        assert timeout_ms * 0.95 <= elapsed_ms < timeout_ms + BLOCKED_S * 1000


def test_waiting_ends_when_a_message_comes(connect: Callable, bind: Callable) -> None:
    server, client = bind(), connect()
    peer = introduce(client, server)
    for timeout_ms in (60_000, 1e30, float("inf")):
        timer = threading.Timer(0.05, client.send, [StatusQuery(1)])
        timer.start()
        assert server.recv(timeout_ms) == (peer, StatusQuery(1))
        timer.join()


def test_looking_does_not_poll(connect: Callable, bind: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = bind(), connect()
    peer = introduce(client, server)
    assert server.send(peer, READY)
    assert client.recv(SOON_MS) == READY

    def poll(*args: object) -> None:
        pytest.fail("polled")

    monkeypatch.setattr(zmq.Poller, "poll", poll)
    assert client.recv(0) is None
    assert server.recv(0) is None


class EndlessGarbage:
    """A link on which garbage arrives as fast as it is fetched; every `every`-th arrival is good, if given."""

    def __init__(self, every: int | None = None) -> None:
        self.num_fetched = 0
        self._every = every

    def send(self, frames: object) -> bool:
        """Refuses."""
        return False

    def fetch(self, timeout_ms: float) -> list[bytes]:
        """The next arrival."""
        self.num_fetched += 1
        return [encode(READY) if self._every and self.num_fetched % self._every == 0 else GARBAGE]

    def close(self) -> None:
        """Does nothing."""


@pytest.mark.parametrize("timeout_ms", [-5, 0, 1, 100])
def test_timeout_is_total_under_endless_garbage(timeout_ms: float) -> None:
    link = EndlessGarbage()
    client = transport._Client(link, "test")
    results = []
    thread = threading.Thread(target=lambda: results.append(timed_ms(lambda: client.recv(timeout_ms))), daemon=True)
    thread.start()
    thread.join(timeout=SOON_MS / 1000)
    assert results, "recv did not return"
    assert timeout_ms * 0.95 <= results[0] < timeout_ms + BLOCKED_S * 1000
    assert client.num_dropped == link.num_fetched
    if timeout_ms <= 0:
        assert link.num_fetched == transport._MAX_LATE_DROPS


def test_drain_ends_under_endless_arrivals() -> None:
    link = EndlessGarbage()
    transport._Client(link, "test").drain()
    assert link.num_fetched == transport._MAX_DRAIN


def test_looking_gets_past_a_little_garbage() -> None:
    assert transport._Client(EndlessGarbage(every=transport._MAX_LATE_DROPS), "test").recv(0) == READY


def flood(port: zmq.Socket, prefix: list[bytes], stop: threading.Event) -> None:
    """Sends garbage as fast as the other side takes it."""
    while not stop.is_set():
        try:
            port.send_multipart([*prefix, GARBAGE], zmq.NOBLOCK)
        except zmq.ZMQError:
            time.sleep(0.0005)


def check_recv_under_flood(end: ClientChannel | ServerEndpoint, port: zmq.Socket, prefix: list[bytes]) -> None:
    """Checks an end's total timeout while a bare socket floods it; the flood's thread is joined."""
    stop = threading.Event()
    thread = threading.Thread(target=flood, args=(port, prefix, stop))
    thread.start()
    try:
        end.recv(SOON_MS / 10)
        before = end.num_dropped
        assert before > 0
        elapsed_ms = timed_ms(lambda: end.recv(200))
        assert 190 <= elapsed_ms < 200 + BLOCKED_S * 1000
        assert end.num_dropped > before
        assert timed_ms(lambda: end.recv(0)) < BLOCKED_S * 1000
    finally:
        stop.set()
        thread.join()


def test_server_keeps_its_timeout_and_its_clients_under_a_flood(
    connect: Callable, bind: Callable, raw: Callable
) -> None:
    server, client = bind(), connect()
    port = raw(zmq.DEALER)
    check_recv_under_flood(server, port, [])
    peer = introduce(client, server)
    assert server.send(peer, READY)
    assert client.recv(SOON_MS) == READY


def test_client_keeps_its_timeout_under_a_flood(connect: Callable, raw: Callable) -> None:
    router = raw(zmq.ROUTER)
    client = connect()
    assert client.send(HELLO)
    peer, data = router.recv_multipart()
    assert data == encode(HELLO)
    check_recv_under_flood(client, router, [peer])


# Peers that are missing, hung, dead or hostile.


def test_sending_to_nobody_fills_the_queue_and_then_is_false(connect: Callable) -> None:
    client = connect()
    results: list[bool] = []
    elapsed_ms = timed_ms(lambda: results.extend(client.send(HELLO) for _ in range(QUEUE_LENGTH + 3)))
    assert results == [True] * QUEUE_LENGTH + [False] * 3
    assert elapsed_ms < BLOCKED_S * 1000
    assert client.recv(0) is None
    assert timed_ms(client.close) < BLOCKED_S * 1000


def test_server_that_starts_late_gets_what_was_queued(connect: Callable, bind: Callable) -> None:
    client = connect()
    assert client.send(HELLO)
    time.sleep(0.2)
    arrival = bind().recv(SOON_MS)
    assert arrival is not None
    assert arrival[1] == HELLO


def test_hung_server_never_blocks_a_client(connect: Callable, bind: Callable) -> None:
    server, client = bind(), connect()
    introduce(client, server)
    large = StepBegin([Open("a", [100_000] * 20_000, None)], [])
    results: list[bool] = []
    start = time.monotonic()
    while (not results or results[-1]) and len(results) < 1000:
        results.append(client.send(large))
    assert results[-1] is False
    assert time.monotonic() - start < 3 * BLOCKED_S
    assert timed_ms(client.close) < BLOCKED_S * 1000


def test_hung_client_blocks_neither_the_server_nor_other_clients(connect: Callable, bind: Callable) -> None:
    server, hung, client = bind(), connect(), connect()
    hung_peer, peer = introduce(hung, server), introduce(client, server)
    assert hung_peer != peer
    large = DraftBatch(1, True, [Draft("a", 1, [100_000] * 20_000, True, b"", b"", [])], [])
    results: list[bool] = []
    start = time.monotonic()
    while (not results or results[-1]) and len(results) < 1000:
        results.append(server.send(hung_peer, large))
    assert results[-1] is False
    assert time.monotonic() - start < 3 * BLOCKED_S
    assert server.send(peer, READY)
    assert client.recv(SOON_MS) == READY


def test_client_talks_to_a_server_restarted_at_the_same_address(connect: Callable, bind: Callable) -> None:
    client = connect()
    for life in range(3):
        server = bind()
        hello = Hello(f"life {life}", 151936, 4096, False, None)
        assert client.send(hello)
        peer = wait_for(server, hello)
        assert server.send(peer, Ready(f"life {life}", 4096, 512, 32))
        assert client.recv(SOON_MS) == Ready(f"life {life}", 4096, 512, 32)
        server.close()
        assert client.send(StatusQuery(life))  # Into the void, or to the next life.


SERVER_PROCESS = """
import sys
from vllm_specbranch import transport
server = transport.bind(sys.argv[1])
print("bound", flush=True)
peer, message = server.recv(30_000)
server.send(peer, transport.messages.Failure("still alive"))
server.recv(30_000)
"""


def test_server_process_killed_and_replaced(connect: Callable, bind: Callable, address: str) -> None:
    """SIGKILL leaves the socket's file behind; the next server takes its place, and the client finds it."""
    client = connect()
    repository = str(Path(transport.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", SERVER_PROCESS, address], cwd=repository, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "bound\n"
            assert client.send(HELLO)
            assert client.recv(SOON_MS) == Failure("still alive")
            with pytest.raises(WireError, match="another server is listening"):
                transport.bind(address)
        finally:
            process.send_signal(signal.SIGKILL)
    assert os.path.exists(addresses.ipc_path(address))
    server = bind()
    assert client.send(StatusQuery(2))
    assert server.send(wait_for(server, StatusQuery(2)), READY)
    assert client.recv(SOON_MS) == READY


def test_oversized_message_to_the_server_costs_only_a_connection(
    connect: Callable, bind: Callable, raw: Callable
) -> None:
    server, client = bind(), connect()
    introduce(client, server)
    port = raw(zmq.DEALER)
    port.send(b"\x01" * (messages.MAX_MESSAGE_BYTES + 1))
    assert server.recv(200) is None
    assert introduce(client, server)
    deadline = time.monotonic() + SOON_MS / 1000
    while (arrival := server.recv(20)) is None and time.monotonic() < deadline:
        port.send(encode(StatusQuery(5)))  # The first ones may be lost with the old connection.
    assert arrival is not None
    assert arrival[1] == StatusQuery(5)
    assert server.num_dropped == 0  # Cut off by the socket: it never reached the decoder, nor this process's memory.


def test_oversized_message_to_the_client_is_dropped(connect: Callable, raw: Callable) -> None:
    router, client = raw(zmq.ROUTER), connect()
    assert client.send(HELLO)
    peer, _ = router.recv_multipart()
    router.send_multipart([peer, b"\x01" * (messages.MAX_MESSAGE_BYTES + 1)])
    router.send_multipart([peer, encode(READY)])
    assert client.recv(SOON_MS) == READY
    assert client.num_dropped == 1
    assert client.send(StatusQuery(1))
    assert router.recv_multipart() == [peer, encode(StatusQuery(1))]


def test_server_survives_a_stranger_that_does_not_speak_zmq(connect: Callable, bind: Callable, address: str) -> None:
    server = bind()
    for content in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, b""):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.connect(addresses.ipc_path(address))
            stranger.sendall(content)
    introduce(connect(), server)


# Addresses and socket files.


def test_no_file_is_left(address: str) -> None:
    path = addresses.ipc_path(address)
    client = transport.connect(address)
    server = transport.bind(address)
    assert os.path.exists(path)
    introduce(client, server)
    server.close()
    assert not os.path.exists(path)
    client.close()
    assert os.listdir(os.path.dirname(path)) == []


def test_closing_spares_a_successors_file(address: str, bind: Callable) -> None:
    path = addresses.ipc_path(address)
    server = transport.bind(address)
    os.rename(path, path + ".old")
    successor = bind()
    server.close()
    assert os.path.exists(path)
    client = transport.connect(address)
    introduce(client, successor)
    client.close()


def test_closing_survives_a_missing_file_or_directory(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    server = transport.bind(f"ipc://{directory}/s")
    (directory / "s").unlink()
    directory.rmdir()
    server.close()


def test_stale_file_is_replaced(connect: Callable, bind: Callable, address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(addresses.ipc_path(address))
    assert os.path.exists(addresses.ipc_path(address))
    introduce(connect(), bind())


def test_live_server_is_not_replaced(connect: Callable, bind: Callable, address: str) -> None:
    server = bind()
    with pytest.raises(WireError, match="another server is listening there"):
        transport.bind(address)
    introduce(connect(), server)


def test_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(WireError, match="not a socket"):
        transport.bind(f"ipc://{path}")
    assert path.read_text() == "precious"


def test_missing_directory_is_a_wire_error(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="No such file or directory"):
        transport.bind(f"ipc://{tmp_path}/missing/s")


@pytest.mark.parametrize("open_end", [transport.connect, transport.bind])
@pytest.mark.parametrize(
    "bad",
    ["", "ipc://", "ipc://relative", "ipc://@abstract", "ipc://*", "/tmp/s", "ipc:///a\0b"],
)
def test_unusable_addresses_are_named(open_end: Callable[[str], object], bad: str) -> None:
    with pytest.raises(WireError, match="ipc:// and an absolute path"):
        open_end(bad)


@pytest.mark.parametrize("open_end", [transport.connect, transport.bind])
def test_too_long_paths_are_explained(open_end: Callable[[str], object], tmp_path: Path) -> None:
    path = f"{tmp_path}/".ljust(108, "x")
    with pytest.raises(SpecBranchError, match="has 108 bytes, a Unix socket's at most 107"):
        open_end(f"ipc://{path}")
    with pytest.raises(WireError, match="108 bytes"):
        open_end("ipc:///" + "é" * 53 + "x")


def test_longest_path_works(tmp_path: Path) -> None:
    address = "ipc://" + f"{tmp_path}/".ljust(addresses.MAX_IPC_PATH_BYTES, "x")
    server, client = transport.bind(address), transport.connect(address)
    introduce(client, server)
    client.close()
    server.close()
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_running_after_a_failed_bind(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(WireError):
            transport.bind(f"ipc://{tmp_path}/missing/s")
    assert len(os.listdir("/proc/self/fd")) <= before
