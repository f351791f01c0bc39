"""Tests of `messages`: every message survives the wire, and one with anything missing, extra or of another type raises WireError.

Limits of what is in it: test_messages_ranges; random bytes: test_messages_fuzz.
"""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings

from tests.made_messages import ALL, TO_ENGINE, TO_SERVER, Decode, pack, refused
from tests.message_strategies import engine_messages, server_messages
from vllm_specbranch import messages
from vllm_specbranch.errors import WireError
from vllm_specbranch.messages import (
    Commit,
    Draft,
    Failure,
    Message,
    Open,
    StatusQuery,
    StepBegin,
    decode_for_engine,
    decode_for_server,
    encode,
)

pytestmark = pytest.mark.timeout(120)  # Hostile bytes must not hang the decoder.

each_message = pytest.mark.parametrize(("message", "decode"), ALL, ids=[type(message).__name__ for message, _ in ALL])


def plain(message: Message) -> list[Any]:
    """What the message is on the wire, as nested lists that a test can spoil."""
    return msgspec.msgpack.decode(encode(message)[1:])


# Round trips.


@settings(deadline=None)
@given(engine_messages)
def test_engine_messages_survive(message: Message) -> None:
    assert decode_for_server(encode(message)) == message


@settings(deadline=None)
@given(server_messages)
def test_server_messages_survive(message: Message) -> None:
    assert decode_for_engine(encode(message)) == message


def test_layout_on_the_wire_is_fixed() -> None:
    """A change here needs a new PROTOCOL_VERSION."""
    assert messages.PROTOCOL_VERSION == 4
    assert encode(StatusQuery(3)) == b"\x04\x92\xabStatusQuery\x03"
    assert plain(TO_SERVER[2]) == [
        "CommitBatch",
        7,
        2.5,
        [["Commit", "a", 12, [5, 6], 3, 2]],
        ["Pace", 9, 20000.5, 100.0],
    ]
    assert plain(TO_ENGINE[1]) == [
        "DraftBatch",
        7,
        True,
        [["Draft", "a", 14, [8, 9], True, b"qids", b"qpro", [0.5, 0.25]]],
        ["b"],
        ["Report", 5, 1, 2, 3, 4, {"num_hits": 6}],
        True,
    ]


def test_messages_cannot_be_changed() -> None:
    for message, _ in ALL:
        for name in message.__struct_fields__:
            with pytest.raises(AttributeError):
                setattr(message, name, None)


# Envelope: version, direction, size.


@pytest.mark.parametrize("decode", [decode_for_server, decode_for_engine])
def test_empty_is_refused(decode: Decode) -> None:
    with pytest.raises(WireError, match="empty"):
        decode(b"")


@each_message
@pytest.mark.parametrize("version", [0, 1, 2, 255])
def test_other_version_is_refused_and_both_are_named(message: Message, decode: Decode, version: int) -> None:
    with pytest.raises(WireError, match=rf"version {version}; this side speaks {messages.PROTOCOL_VERSION}"):
        decode(bytes([version]) + encode(message)[1:])


@each_message
def test_wrong_direction_is_refused(message: Message, decode: Decode) -> None:
    other = decode_for_engine if decode is decode_for_server else decode_for_server
    with pytest.raises(WireError, match=type(message).__name__):
        other(encode(message))


def test_entries_are_not_messages() -> None:
    for entry in (Open("a", [1], None), Commit("a", 1, [1], 3, None), Draft("a", 1, [1], True, b"", b"", [])):
        for decode in (decode_for_server, decode_for_engine):
            refused(decode, entry)


def test_size_limit_is_exact() -> None:
    limit = messages.MAX_MESSAGE_BYTES
    overhead = len(encode(Failure("x" * 70000))) - 70000
    largest = encode(Failure("x" * (limit - overhead)))
    assert len(largest) == limit
    assert isinstance(decode_for_engine(largest), Failure)
    with pytest.raises(WireError, match=rf"Failure of {limit + 1} bytes is over the limit of {limit}"):
        encode(Failure("x" * (limit - overhead + 1)))
    too_large = pack(["Failure", "x" * (limit - overhead + 1)])
    assert len(too_large) == limit + 1
    with pytest.raises(WireError, match=rf"{limit + 1} bytes, over the limit of {limit}"):
        decode_for_engine(too_large)


@pytest.mark.parametrize(
    "message",
    [StatusQuery(2**64), StepBegin([], ["\ud800"]), StatusQuery(object()), StepBegin([Open("a", [{1j}], None)], [])],
)
def test_what_cannot_be_carried_is_a_wire_error(message: Message) -> None:
    with pytest.raises(WireError, match=f"cannot encode a {type(message).__name__}"):
        encode(message)


def test_reasons_stay_short_and_printable() -> None:
    reason = refused(decode_for_server, ["evil\n\x1b[31m" * 100_000])
    assert len(reason) < 1000
    assert reason.isprintable()


# Structure: every entry of every struct.


def test_every_prefix_and_every_extension_is_refused() -> None:
    for message, decode in ALL:
        data = encode(message)
        for end in range(len(data)):
            with pytest.raises(WireError):
                decode(data[:end])
        for extra in range(256):
            with pytest.raises(WireError):
                decode(data + bytes([extra]))


def structs_in(value: object) -> list[list[Any]]:
    """All arrays in a spoilable message that are structs: they start with the name of a type."""
    if not isinstance(value, list):
        return []
    inner = [found for item in value for found in structs_in(item)]
    is_struct = bool(value) and isinstance(value[0], str) and hasattr(messages, value[0])
    return [value, *inner] if is_struct else inner


@each_message
def test_extra_and_missing_entries_are_refused(message: Message, decode: Decode) -> None:
    for index in range(len(structs_in(plain(message)))):
        for extra in (None, 0, "x", []):
            spoilt = plain(message)
            structs_in(spoilt)[index].append(extra)
            refused(decode, spoilt)
        spoilt = plain(message)
        struct = structs_in(spoilt)[index]
        struct.pop()
        if struct[:1] == ["DraftBatch"]:
            # Its last two may be missing, the one before them may not.
            for _ in range(2):
                assert decode(pack(spoilt))
                struct.pop()
        refused(decode, spoilt)


@each_message
def test_wrong_types_are_refused(message: Message, decode: Decode) -> None:
    """Each entry of each struct, in turn, becomes a value of each other type."""
    for index, struct in enumerate(structs_in(plain(message))):
        for entry in range(len(struct)):
            for wrong in (None, True, 1, 1.5, "x", b"x", [None], {"x": None}, [["x"]]):
                if type(wrong) is type(struct[entry]) or (type(struct[entry]), wrong) == (float, 1):
                    continue  # A whole number is a fine duration.
                optional = (["Sampling"], ["Pace"], ["Terms"], ["Report"])
                if wrong is None and isinstance(struct[entry], list) and struct[entry][:1] in optional:
                    continue  # Greedy drafts; a step with a prefill; a server of the engine's own; a reply in memory.
                if (struct[0], entry, wrong) in (("Commit", 5, None), ("Commit", 5, 1)):
                    continue  # Without a head there is no class; 1 is one.
                spoilt = plain(message)
                structs_in(spoilt)[index][entry] = wrong
                refused(decode, spoilt)
