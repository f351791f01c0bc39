"""Ends of the wire for the tests of `transport`, closed after each; and a machine that is never busy."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from tests.transport_ends import SOON_MS, Pair
from vllm_specbranch import transport
from vllm_specbranch.transport import ClientChannel, ServerEndpoint


@pytest.fixture(autouse=True)
def quiet_machine() -> Iterator[None]:
    """Benchmarks warn of a busy machine, which the one that runs the tests is.

    By a monkeypatch of its own: a test's is undone before the fixtures that the test asked for first.
    """
    with pytest.MonkeyPatch.context() as own:
        own.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
        yield


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
