"""Peers that are missing, hung, dead or hostile, over real sockets."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from tests.transport_ends import BLOCKED_S, HELLO, READY, SOON_MS, introduce, timed_ms, wait_for
from vllm_specbranch import addresses, messages, transport
from vllm_specbranch.errors import WireError
from vllm_specbranch.messages import (
    Draft,
    DraftBatch,
    Failure,
    Hello,
    Open,
    Ready,
    StatusQuery,
    StepBegin,
    encode,
)
from vllm_specbranch.zmq_port import QUEUE_LENGTH

pytestmark = pytest.mark.timeout(60)


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
