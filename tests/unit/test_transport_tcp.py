"""The wire over TCP: keys, strangers, floods and what is too large, over real sockets on this machine."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from vllm_specbranch import messages, transport
from vllm_specbranch.errors import WireError
from vllm_specbranch.keys import CLIENT_PUBLIC, INSECURE, ClientKeys, load_client_keys, load_server_keys, make_keys
from vllm_specbranch.messages import Hello, Ready, StatusQuery, StepBegin, encode
from vllm_specbranch.rates import Rates
from vllm_specbranch.transport import ClientChannel, ServerEndpoint

SOON_MS = 5000.0  # For what must arrive; reached only by a failing test.
SILENT_MS = 400.0  # For what must not arrive; a handshake takes a few milliseconds.
ANY_PORT = "tcp://127.0.0.1:0"
HELLO = Hello("session", 151936, 4096, False, None)
READY = Ready("session", 4096, 512, 32)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder)
    return folder


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("others")
    make_keys(folder)
    return folder


@pytest.fixture
def ends() -> Iterator[list[ClientChannel | ServerEndpoint]]:
    """What a test puts here is closed after it."""
    found: list[ClientChannel | ServerEndpoint] = []
    yield found
    for end in found:
        end.close()


@pytest.fixture
def server(keys: Path, ends: list) -> ServerEndpoint:
    ends.append(transport.bind(ANY_PORT, load_server_keys(keys)))
    return ends[-1]


@pytest.fixture
def client(keys: Path, ends: list, server: ServerEndpoint) -> ClientChannel:
    ends.append(transport.connect(server.address, load_client_keys(keys)))
    return ends[-1]


@pytest.fixture
def raw() -> Iterator[Callable[..., zmq.Socket]]:
    """Opens bare DEALER sockets, for sending what a channel would not."""
    context = zmq.Context()

    def open_one(address: str, **options: object) -> zmq.Socket:
        port = context.socket(zmq.DEALER)
        port.setsockopt(zmq.LINGER, 0)
        port.setsockopt(zmq.SNDTIMEO, int(SOON_MS))
        for name, value in options.items():
            setattr(port, name, value)
        port.connect(address)
        return port

    yield open_one
    context.destroy(linger=0)


def curve(keys: ClientKeys) -> dict[str, object]:
    return {"curve_serverkey": keys.server, "curve_publickey": keys.public, "curve_secretkey": keys.secret}


def introduce(client: ClientChannel, server: ServerEndpoint) -> bytes:
    assert client.send(HELLO)
    arrival = server.recv(SOON_MS)
    assert arrival is not None
    assert arrival[1] == HELLO
    return arrival[0]


def test_messages_go_both_ways_between_known_keys(client: ClientChannel, server: ServerEndpoint) -> None:
    assert server.address.startswith("tcp://127.0.0.1:")
    assert not server.address.endswith(":0")
    peer = introduce(client, server)
    assert server.send(peer, READY)
    assert client.recv(SOON_MS) == READY
    assert (client.num_dropped, server.num_dropped, server.num_refused) == (0, 0, 0)


def test_what_travels_is_encrypted(keys: Path, ends: list, server: ServerEndpoint) -> None:
    """A relay between the two sees neither words nor tokens; the same relay without keys sees them."""

    def seen_by_a_relay(address: str, security: object) -> bytes:
        port = int(address.rpartition(":")[2])
        listener = socket.create_server(("127.0.0.1", 0))
        seen = bytearray()

        def pump(source: socket.socket, sink: socket.socket) -> None:
            while data := source.recv(65536):
                seen.extend(data)
                sink.sendall(data)

        def relay() -> None:
            near, _ = listener.accept()
            far = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(far, near), daemon=True).start()
            pump(near, far)

        threading.Thread(target=relay, daemon=True).start()
        client = transport.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}", security)  # type: ignore[arg-type]
        ends.append(client)
        open_server = next(one for one in ends if isinstance(one, transport._Server) and one.address == address)
        assert client.send(replace_session("a word to look for"))
        assert open_server.recv(SOON_MS) is not None
        return bytes(seen)

    assert b"a word to look for" not in seen_by_a_relay(server.address, load_client_keys(keys))
    ends.append(transport.bind(ANY_PORT, INSECURE))
    assert b"a word to look for" in seen_by_a_relay(ends[-1].address, INSECURE)


def replace_session(session: str) -> Hello:
    return Hello(session, 1, 1, False, None)


def test_a_client_with_an_unknown_key_gets_nothing_in(
    server: ServerEndpoint, client: ClientChannel, keys: Path, other_keys: Path, ends: list, caplog: object
) -> None:
    stranger = replace(load_client_keys(other_keys), server=load_client_keys(keys).server)
    ends.append(transport.connect(server.address, stranger))
    assert ends[-1].send(HELLO)
    assert server.recv(SILENT_MS) is None
    introduce(client, server)
    assert server.recv(0) is None


def test_a_client_that_is_admitted_later_gets_in(keys: Path, other_keys: Path, tmp_path: Path, ends: list) -> None:
    make_keys(tmp_path / "server")
    folder = tmp_path / "server"
    security = load_server_keys(folder)
    ends.append(transport.bind(ANY_PORT, security))
    server = ends[-1]
    stranger = replace(load_client_keys(other_keys), server=security.public)
    refused = transport.connect(server.address, stranger)
    assert refused.send(HELLO)
    assert server.recv(SILENT_MS) is None
    refused.close()
    (folder / "clients" / "second.key").write_bytes((other_keys / CLIENT_PUBLIC).read_bytes())
    ends.append(transport.connect(server.address, stranger))
    introduce(ends[-1], server)


def test_a_client_with_another_servers_key_gets_nothing_in(
    server: ServerEndpoint, client: ClientChannel, keys: Path, other_keys: Path, ends: list
) -> None:
    mistaken = replace(load_client_keys(keys), server=load_client_keys(other_keys).server)
    ends.append(transport.connect(server.address, mistaken))
    assert ends[-1].send(HELLO)
    assert server.recv(SILENT_MS) is None
    introduce(client, server)


def test_neither_end_talks_to_one_without_keys(
    server: ServerEndpoint, client: ClientChannel, keys: Path, ends: list, raw: Callable
) -> None:
    ends.append(transport.connect(server.address, INSECURE))
    assert ends[-1].send(HELLO)
    port = raw(server.address, plain_username=b"admin", plain_password=b"admin")
    port.send(encode(HELLO))
    assert server.recv(SILENT_MS) is None
    introduce(client, server)
    ends.append(transport.bind(ANY_PORT, INSECURE))
    open_server = ends[-1]
    ends.append(transport.connect(open_server.address, load_client_keys(keys)))
    assert ends[-1].send(HELLO)
    assert open_server.recv(SILENT_MS) is None


def test_without_its_authenticator_a_server_admits_nobody(
    keys: Path, ends: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq admits every key where nobody checks them; the domain that is enforced turns that round."""
    monkeypatch.setattr("vllm_specbranch.zmq_port._start_authenticator", lambda *_: None)
    ends.append(transport.bind(ANY_PORT, load_server_keys(keys)))
    server = ends[-1]
    ends.append(transport.connect(server.address, load_client_keys(keys)))
    assert ends[-1].send(HELLO)
    assert server.recv(SILENT_MS) is None


def test_strangers_that_do_not_speak_zmq_cost_nothing(server: ServerEndpoint, client: ClientChannel) -> None:
    port = int(server.address.rpartition(":")[2])
    held = []
    for content in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 1000,
        b"",
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03",
        os.urandom(5000),
    ):
        held.append(socket.create_connection(("127.0.0.1", port)))
        held[-1].sendall(content)
    introduce(client, server)
    for one in held:
        one.close()


def test_too_large_a_message_costs_the_connection_and_reaches_nobody(
    server: ServerEndpoint, client: ClientChannel, keys: Path, raw: Callable
) -> None:
    introduce(client, server)
    port = raw(server.address, **curve(load_client_keys(keys)))
    port.send(b"\x01" * (messages.MAX_MESSAGE_BYTES + 1))
    assert server.recv(SILENT_MS) is None
    assert server.num_dropped == 0, "cut off by the socket: it was never in this process's memory"
    introduce(client, server)


def test_garbage_is_dropped_and_counted(
    server: ServerEndpoint, client: ClientChannel, keys: Path, raw: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    port = raw(server.address, **curve(load_client_keys(keys)))
    for frames in ([b""], [b"\x80\x04pickle"], [encode(READY)], [encode(HELLO)] * 2, [os.urandom(100_000)]):
        port.send_multipart(frames)
    until = time.monotonic() + SOON_MS / 1e3
    while server.num_dropped < 5 and time.monotonic() < until:
        server.recv(50)
    assert server.num_dropped == 5
    assert len([one for one in caplog.records if one.levelno == logging.WARNING]) == 1
    introduce(client, server)


def test_a_peer_that_sends_too_fast_is_dropped_and_others_are_not(
    keys: Path, other_keys: Path, tmp_path: Path, ends: list, caplog: pytest.LogCaptureFixture
) -> None:
    """The flood comes over several connections of one key: what counts is who it is, not what it calls itself."""
    make_keys(tmp_path / "server")
    security = load_server_keys(tmp_path / "server")
    (security.clients / "flood.key").write_bytes((keys / CLIENT_PUBLIC).read_bytes())
    (security.clients / "calm.key").write_bytes((other_keys / CLIENT_PUBLIC).read_bytes())
    rates = Rates(messages_per_s=50.0, clock=lambda: 0.0)
    server = transport.bind(ANY_PORT, security, rates)
    ends.append(server)

    def connect(folder: Path) -> ClientChannel:
        ends.append(transport.connect(server.address, replace(load_client_keys(folder), server=security.public)))
        return ends[-1]

    num_received = 0
    for _ in range(5):
        flood = connect(keys)
        assert all(flood.send(StatusQuery(number)) for number in range(60))
        until = time.monotonic() + SOON_MS / 1e3
        wanted = num_received + rates.num_dropped + 60
        while num_received + rates.num_dropped < wanted and time.monotonic() < until:
            num_received += server.recv(20) is not None
    assert num_received + server.num_refused == 300
    assert num_received == 100, "one burst: two seconds' worth"
    assert sum("sends too fast" in record.message for record in caplog.records) == 1
    calm = connect(other_keys)
    peer = introduce(calm, server)
    assert server.send(peer, READY)
    assert calm.recv(SOON_MS) == READY


# It reads nothing until it is told to.
BUSY_SERVER = """
from vllm_specbranch import transport

server = transport.bind("tcp://127.0.0.1:0", "insecure")
print(server.address, flush=True)
input()
while server.recv(100.0) is not None:
    pass
print("lives")
"""


def test_a_busy_server_outlives_a_client_that_goes_while_its_queue_is_full(ends: list) -> None:
    """With heartbeats libzmq would abort it, at the second one after the client has gone."""
    command = [sys.executable, "-c", BUSY_SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = transport.connect(process.stdout.readline().strip(), INSECURE)
        ends.append(client)
        until = time.monotonic() + SOON_MS / 1e3
        num_sent = 0
        while num_sent < 1000 and time.monotonic() < until:
            num_sent += client.send(StatusQuery(num_sent))
        client.close()
        time.sleep(2.5)
        output, _ = process.communicate("go on\n", SOON_MS / 1e3)
    assert num_sent == 1000
    assert (output, process.returncode) == ("lives\n", 0)


def test_an_idle_connection_is_looked_after_by_the_system(ends: list) -> None:
    """On both ends: an engine must not be ended by libzmq either."""
    server = transport.bind(ANY_PORT, INSECURE)
    client = transport.connect(server.address, INSECURE)
    ends += [client, server]
    for port in (end._link._socket for end in (client, server)):  # type: ignore[attr-defined]
        assert port.getsockopt(zmq.HEARTBEAT_IVL) == 0
        assert port.getsockopt(zmq.TCP_KEEPALIVE) == 1
        assert port.getsockopt(zmq.TCP_KEEPALIVE_IDLE) + 5 * port.getsockopt(zmq.TCP_KEEPALIVE_INTVL) <= 10
        assert port.getsockopt(zmq.TCP_MAXRT) <= 10_000


def test_a_flood_of_bytes_is_dropped(keys: Path, ends: list) -> None:
    rates = Rates(bytes_per_s=100_000.0, clock=lambda: 0.0)
    server = transport.bind(ANY_PORT, load_server_keys(keys), rates)
    client = transport.connect(server.address, load_client_keys(keys))
    ends += [server, client]
    large = StepBegin([messages.Open("a", [100_000] * 10_000, None)], [])
    for _ in range(20):
        client.send(large)
    until = time.monotonic() + SOON_MS / 1e3
    num_received = 0
    while num_received + rates.num_dropped < 20 and time.monotonic() < until:
        num_received += server.recv(20) is not None
    assert num_received == 200_000 // len(encode(large))


def test_a_server_that_is_replaced_is_found_again(keys: Path, ends: list) -> None:
    server = transport.bind(ANY_PORT, load_server_keys(keys))
    address = server.address
    client = transport.connect(address, load_client_keys(keys))
    ends.append(client)
    introduce(client, server)
    server.close()
    server.close()
    assert server.recv(10) is None
    ends.append(transport.bind(address, load_server_keys(keys)))
    peer = introduce(client, ends[-1])
    assert ends[-1].send(peer, READY)
    assert client.recv(SOON_MS) == READY


def test_a_farewell_leaves_before_the_socket_closes(keys: Path, ends: list) -> None:
    server = transport.bind(ANY_PORT, load_server_keys(keys))
    client = transport.connect(server.address, load_client_keys(keys))
    ends.append(client)
    peer = introduce(client, server)
    assert server.send(peer, READY)
    server.close(linger_ms=1000)
    assert client.recv(SOON_MS) == READY


def test_a_taken_port_is_a_wire_error_and_leaves_nothing_running(server: ServerEndpoint, keys: Path) -> None:
    def num_threads() -> int:
        return threading.active_count()

    before = (len(os.listdir("/proc/self/fd")), num_threads())
    for _ in range(3):
        with pytest.raises(WireError, match="in use"):
            transport.bind(server.address, load_server_keys(keys))
    assert (len(os.listdir("/proc/self/fd")), num_threads()) <= before


def test_closing_leaves_no_thread_and_no_descriptor(keys: Path) -> None:
    before = (len(os.listdir("/proc/self/fd")), threading.active_count())
    for _ in range(3):
        server = transport.bind(ANY_PORT, load_server_keys(keys))
        client = transport.connect(server.address, load_client_keys(keys))
        introduce(client, server)
        client.close()
        server.close()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) <= before


def test_closing_an_engines_end_does_not_wait_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libzmq asks for the name of a host on its own thread, and ending a context waits for that thread."""
    waiting: list[threading.Thread] = []
    has_waited = threading.Event()

    def term(context: zmq.Context) -> None:
        waiting.append(threading.current_thread())
        has_waited.set()

    monkeypatch.setattr(zmq.Context, "term", term)
    client = transport.connect("tcp://some.host.invalid:5600", "insecure")
    client.close()
    assert has_waited.wait(SOON_MS / 1e3)
    assert threading.current_thread() not in waiting


def test_tcp_is_refused_without_keys_or_the_word(keys: Path) -> None:
    client, server = load_client_keys(keys), load_server_keys(keys)
    for security in (None, "", "secure", b"insecure", server):
        with pytest.raises(WireError, match="without ClientKeys or the word 'insecure'"):
            transport.connect("tcp://127.0.0.1:5600", security)  # type: ignore[arg-type]
    for security in (None, "", "secure", client):
        with pytest.raises(WireError, match="without ServerKeys or the word 'insecure'"):
            transport.bind(ANY_PORT, security)  # type: ignore[arg-type]


def test_unusable_addresses_are_named() -> None:
    for bad in ("tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:x", "tcp://127.0.0.1:70000"):
        with pytest.raises(WireError, match="tcp://host:port"):
            transport.connect(bad, INSECURE)
        with pytest.raises(WireError, match="tcp://host:port"):
            transport.bind(bad, INSECURE)
    for bad in ("tcp://*:5600", "tcp://127.0.0.1:0"):
        with pytest.raises(WireError, match="tcp://host:port"):
            transport.connect(bad, INSECURE)
