"""What both kinds of channel do, over real sockets and over the in-memory twin; and that timeouts are kept."""

import logging
import threading
import time
from collections.abc import Callable

import pytest
import zmq

from tests.transport_ends import BLOCKED_S, GARBAGE, HELLO, READY, SOON_MS, Pair, inject, introduce, timed_ms
from vllm_specbranch import messages, transport
from vllm_specbranch.messages import (
    Commit,
    CommitBatch,
    Draft,
    DraftBatch,
    Failure,
    Open,
    Shutdown,
    StatusQuery,
    StepBegin,
    encode,
)
from vllm_specbranch.transport import ClientChannel, ServerEndpoint
from vllm_specbranch.zmq_port import QUEUE_LENGTH

pytestmark = pytest.mark.timeout(60)


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


def test_an_engine_of_another_version_learns_of_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client, server = pair
    ours = messages.PROTOCOL_VERSION
    inject(client, bytes([ours + 1]) + encode(HELLO)[1:])
    assert server.recv(100) is None
    assert f"has protocol version {ours + 1}; this side speaks {ours}" in caplog.text
    caplog.clear()
    monkeypatch.setattr(messages, "PROTOCOL_VERSION", ours + 1)  # From here on as in the other process.
    deadline = time.monotonic() + SOON_MS / 1000
    while not client.num_dropped and time.monotonic() < deadline:
        assert client.recv(20) is None
    assert f"has protocol version {ours}; this side speaks {ours + 1}" in caplog.text


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
