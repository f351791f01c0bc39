"""What the transport tests share: messages, limits, and small steps between a client and a server."""

import time
from collections.abc import Callable

import pytest

from vllm_specbranch.messages import (
    EngineMessage,
    Hello,
    Ready,
)
from vllm_specbranch.transport import ClientChannel, ServerEndpoint

SOON_MS = 5000.0  # For what must arrive; reached only by a failing test.
BLOCKED_S = 1.0  # No call that must not block may take this long, even on a busy machine.
HELLO = Hello("session", 151936, 4096, False, None)
READY = Ready("session", 4096, 512, 32)
GARBAGE = b"\x01garbage"


Pair = tuple[ClientChannel, ServerEndpoint]


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
