"""The relay of the fault tests does what it says; and the engine's line comes through all of it, over TCP with keys."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.relay import Conditions, Relay, Side, parse_place
from tests.remote_engine import Engine, Servers
from tests.unit.test_remote_link import keys, servers
from vllm_specbranch.keys import load_client_keys

__all__ = ["keys", "servers"]

SOON_S = 30.0
DELAY_S = 0.05


class Echo:
    """Sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.got = b""
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(client,), daemon=True).start()

    def _echo(self, client: socket.socket) -> None:
        with client:
            while data := client.recv(1 << 16):
                self.got += data
                client.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    found = Echo()
    yield found
    found.close()


@pytest.fixture
def relay(echo: Echo) -> Iterator[Relay]:
    with Relay(echo.place) as found:
        yield found


def connect(relay: Relay) -> socket.socket:
    return socket.create_connection(parse_place(relay.address.removeprefix("tcp://")), SOON_S)


def read(client: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes and (more := client.recv(num_bytes - len(data))):
        data += more
    return data


def has_ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True


def test_what_goes_in_comes_out(relay: Relay) -> None:
    data = random.Random(0).randbytes(3 << 20)
    with connect(relay) as client:
        threading.Thread(target=client.sendall, args=(data,), daemon=True).start()
        assert read(client, len(data)) == data


def test_a_delay_is_each_way_and_pieces_do_not_wait_for_each_other(relay: Relay) -> None:
    relay.set(Conditions(delay_s=DELAY_S))
    with connect(relay) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started_s = time.monotonic()
        for number in range(20):
            client.sendall(bytes([number]))
            time.sleep(0.001)
        assert read(client, 1) == b"\0"
        assert time.monotonic() - started_s >= 2 * DELAY_S
        assert read(client, 19) == bytes(range(1, 20)), "in their order"
        # In turns they would have taken 20 times as long.
        assert time.monotonic() - started_s < 20 * DELAY_S


def test_what_is_on_its_way_arrives_after_its_sender_has_ended(relay: Relay) -> None:
    relay.set(Conditions(delay_s=DELAY_S))
    with connect(relay) as client:
        client.sendall(b"farewell")
        client.shutdown(socket.SHUT_WR)
        assert read(client, 8) == b"farewell"


def test_a_held_line_is_silent_and_loses_nothing(relay: Relay, echo: Echo) -> None:
    with connect(relay) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        relay.set(Conditions(is_held=True))
        client.sendall(b"b")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert echo.got == b"a"
        client.settimeout(SOON_S)
        relay.set(Conditions())
        assert read(client, 1) == b"b"


def test_a_thin_line_takes_its_time(relay: Relay) -> None:
    relay.set(Conditions(bytes_per_s=1000.0))
    with connect(relay) as client:
        started_s = time.monotonic()
        for _ in range(4):
            client.sendall(bytes(100))
            assert read(client, 100) == bytes(100)
        assert time.monotonic() - started_s >= 3 * 0.1


def test_a_cut_ends_connections_and_new_ones_are_taken_or_refused(relay: Relay) -> None:
    with connect(relay) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        relay.set(Conditions(is_refusing=True))
        relay.cut()
        assert has_ended(client)
    with connect(relay) as client:
        assert has_ended(client)
    relay.set(Conditions())
    with connect(relay) as client:
        client.sendall(b"b")
        assert read(client, 1) == b"b"


@pytest.mark.parametrize(("to", "got"), [("server", b"a!b"), ("client", b"ab")])
def test_injected_bytes_go_one_way(relay: Relay, echo: Echo, to: Side, got: bytes) -> None:
    with connect(relay) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        relay.inject(b"!", to)
        assert read(client, 1) == b"!", "from the relay, or from whom it went to"
        client.sendall(b"b")
        assert read(client, 1) == b"b"
        assert echo.got == got


def test_changed_pieces_differ_by_a_bit(relay: Relay, echo: Echo) -> None:
    relay.set(Conditions(flip_share=1.0))
    with connect(relay) as client:
        client.sendall(bytes(1000))
        assert len(read(client, 1000)) == 1000
    assert sum(byte.bit_count() for byte in echo.got) >= 1
    assert len(echo.got) == 1000


def test_without_a_server_it_ends_what_it_took() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with Relay(nobody) as relay, connect(relay) as client:
        assert has_ended(client)


# --- the engine's line through it ------------------------------------------------------------------------------------------


@pytest.fixture
def through(servers: Servers) -> Iterator[Relay]:
    with Relay(servers.address.removeprefix("tcp://")) as found:
        yield found


@pytest.fixture
def engine(through: Relay, keys: Path) -> Iterator[Engine]:
    found = Engine(through.address, load_client_keys(keys))
    yield found
    found.link.close()


def cut(relay: Relay) -> None:
    relay.cut()


def hold(relay: Relay) -> None:
    relay.set(Conditions(is_held=True))
    time.sleep(0.3)
    relay.set(Conditions())


def raw_garbage(to: Side) -> Callable[[Relay], None]:
    return lambda relay: relay.inject(random.Random(0).randbytes(100), to)


def draft_again(engine: Engine) -> None:
    """Until some more drafts were accepted; a step now and then, for the text must not outgrow the model meanwhile."""
    wanted, until_s = engine.num_accepted + 20, time.monotonic() + 2 * SOON_S
    while engine.num_accepted < wanted:
        assert time.monotonic() < until_s
        engine.step()
        time.sleep(0.05)


@pytest.mark.parametrize(
    "spoil",
    [cut, hold, raw_garbage("server"), raw_garbage("client")],
    ids=["cut", "held", "garbage to the server", "garbage to the engine"],
)
def test_drafting_resumes_after(engine: Engine, through: Relay, spoil: Callable[[Relay], None]) -> None:
    """Before the server is given up: after garbage a client's socket is dead for good, and another takes its place."""
    engine.draft()
    spoil(through)
    draft_again(engine)
    assert engine.counters.num_server_starts == 1
