"""One message of each kind for tests of the wire, and values that are none: packed as if they were, and refused."""

from collections.abc import Callable

import msgspec
import pytest

from vllm_specbranch import messages
from vllm_specbranch.errors import WireError
from vllm_specbranch.messages import (
    Commit,
    CommitBatch,
    Draft,
    DraftBatch,
    Failure,
    Farewell,
    Hello,
    Message,
    Open,
    Pace,
    Ready,
    Refused,
    Report,
    Sampling,
    Shutdown,
    Status,
    StatusQuery,
    StepBegin,
    Terms,
    decode_for_engine,
    decode_for_server,
)

VERSION = bytes([messages.PROTOCOL_VERSION])
# One message of each kind, with nothing empty in it: the material of the systematic tests.
TO_SERVER: list[Message] = [
    Hello("session", 151936, 4096, True, Terms("identity", "bfloat16", 8)),
    StepBegin([Open("a", [1, 2, 70000], Sampling(0.5, 64, 12345))], ["b"]),
    CommitBatch(7, 2.5, [Commit("a", 12, [5, 6], 3, 2)], Pace(9, 20000.5, 100.0)),
    StatusQuery(3),
    Shutdown(),
]
TO_ENGINE: list[Message] = [
    Ready("session", 4096, 512, 32),
    DraftBatch(
        7,
        True,
        [Draft("a", 14, [8, 9], True, b"qids", b"qpro", [0.5, 0.25])],
        ["b"],
        Report(5, 1, 2, 3, 4, {"num_hits": 6}),
        True,
    ),
    Status(3, 1, 2, 512, {"hits": 4}, {"forward": 1.5}),
    Failure("out of memory"),
    Refused("session", "another vocabulary", True),
    Farewell("the server ends"),
]
ALL = [(message, decode_for_server) for message in TO_SERVER] + [(message, decode_for_engine) for message in TO_ENGINE]
Decode = Callable[[bytes], Message]


def pack(value: object) -> bytes:
    """Any value as if it were a message."""
    return VERSION + msgspec.msgpack.encode(value)


def refused(decode: Decode, value: object) -> str:
    """Checks that a value is refused; returns the reason."""
    with pytest.raises(WireError) as caught:
        decode(pack(value))
    return str(caught.value)
