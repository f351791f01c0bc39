"""Tests of `messages`: every message survives the wire, and whatever else arrives raises WireError only."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.message_strategies import engine_messages, server_messages
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
    encode,
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

pytestmark = pytest.mark.timeout(120)  # Hostile bytes must not hang the decoder.

each_message = pytest.mark.parametrize(("message", "decode"), ALL, ids=[type(message).__name__ for message, _ in ALL])


def plain(message: Message) -> list[Any]:
    """What the message is on the wire, as nested lists that a test can spoil."""
    return msgspec.msgpack.decode(encode(message)[1:])


def pack(value: object) -> bytes:
    """Any value as if it were a message."""
    return VERSION + msgspec.msgpack.encode(value)


def refused(decode: Decode, value: object) -> str:
    """Checks that a value is refused; returns the reason."""
    with pytest.raises(WireError) as caught:
        decode(pack(value))
    return str(caught.value)


def check_harmless(data: bytes) -> None:
    """Checks that bytes are refused, or are a message that can be sent on and is the same then."""
    for decode in (decode_for_server, decode_for_engine):
        try:
            message = decode(data)
        except WireError:
            continue
        assert decode(encode(message)) == message


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


def test_a_round_commits_no_more_than_a_chunk_and_a_token() -> None:
    """A longer list would only cost the server time."""
    longest = [1] * (messages.MAX_CHUNK + 1)
    for tokens, is_fine in ((longest, True), ([*longest, 1], False)):
        data = encode(CommitBatch(1, 0.0, [Commit("a", 3, tokens, 0, None)], None))
        if is_fine:
            assert decode_for_server(data)
        else:
            with pytest.raises(WireError):
                decode_for_server(data)


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


@pytest.mark.parametrize("wrong", [None, True, 1.0, "1", -1, 2**31, [1]])
def test_wrong_tokens_are_refused(wrong: object) -> None:
    refused(decode_for_server, ["StepBegin", [["Open", "a", [1, wrong], None]], []])
    refused(decode_for_server, ["CommitBatch", 7, 2.5, [["Commit", "a", 12, [wrong], 0, None]], None])
    refused(decode_for_engine, ["DraftBatch", 7, True, [["Draft", "a", 12, [wrong, 2], True, b"", b"", []]], []])


# Ranges.


@pytest.mark.parametrize(
    ("decode", "value"),
    [
        (decode_for_server, ["CommitBatch", -1, 2.5, [], None]),
        (decode_for_server, ["CommitBatch", 2**63, 2.5, [], None]),
        (decode_for_server, ["CommitBatch", 1, -0.5, [], None]),
        (decode_for_server, ["CommitBatch", 1, 60_000.5, [], None]),
        (decode_for_server, ["CommitBatch", 1, float("nan"), [], None]),
        (decode_for_server, ["CommitBatch", 1, float("inf"), [], None]),
        (decode_for_server, ["CommitBatch", 1, 2.5, [["Commit", "a", -1, [1], 0, None]], None]),
        (decode_for_server, ["CommitBatch", 1, 2.5, [["Commit", "a", 2**31, [1], 0, None]], None]),
        (decode_for_server, ["CommitBatch", 1, 2.5, [["Commit", "a", 1, [], 0, None]], None]),
        (decode_for_server, ["CommitBatch", 1, 2.5, [["Commit", "a", 1, [1], 0, -1]], None]),
        (decode_for_server, ["CommitBatch", 1, 2.5, [["Commit", "a", 1, [1], 0, 3]], None]),
        (decode_for_server, ["StepBegin", [["Open", "a", [], None]], []]),
        (decode_for_server, ["Hello", "s", 0, 1, False]),
        (decode_for_server, ["Hello", "s", 1, 0, False]),
        (decode_for_server, ["Hello", "s", -5, 1, False]),
        (decode_for_server, ["StatusQuery", -1]),
        (decode_for_engine, ["Ready", "s", 0, 1, 1]),
        (decode_for_engine, ["Ready", "s", 1, 0, 1]),
        (decode_for_engine, ["Ready", "s", 1, 1, 0]),
        (decode_for_engine, ["DraftBatch", -1, [], []]),
        (decode_for_engine, ["DraftBatch", 1, True, [["Draft", "a", -1, [], True, b"", b"", []]], []]),
        (decode_for_engine, ["DraftBatch", 1, True, [["Draft", "a", 1, [1], True, b"", b"", [1.5]]], []]),
        (decode_for_engine, ["DraftBatch", 1, True, [["Draft", "a", 1, [1], True, b"", b"", [-0.5]]], []]),
        (decode_for_engine, ["DraftBatch", 1, True, [["Draft", "a", 1, [1], True, b"", b"", [float("nan")]]], []]),
        (decode_for_engine, ["DraftBatch", 1, True, [["Draft", "a", 1, [1], True, b"", b"", [0.5] * 65]], []]),
        (decode_for_engine, ["Status", -1, 0, 0, 0, {}, {}]),
        (decode_for_engine, ["Status", 0, -1, 0, 0, {}, {}]),
        (decode_for_engine, ["Status", 0, 0, -1, 0, {}, {}]),
        (decode_for_engine, ["Status", 0, 0, 0, -1, {}, {}]),
        (decode_for_engine, ["Status", 0, 0, 0, 0, {"x": -1}, {}]),
        (decode_for_engine, ["Status", 0, 0, 0, 0, {"x": 1.5}, {}]),
        (decode_for_engine, ["Status", 0, 0, 0, 0, {}, {"x": -0.5}]),
        (decode_for_engine, ["Status", 0, 0, 0, 0, {}, {"x": float("nan")}]),
        (decode_for_engine, ["Status", 0, 0, 0, 0, {}, {"x": float("inf")}]),
        (decode_for_engine, ["Status", 0, 0, 0, 0, {1: 1}, {}]),
    ],
)
def test_out_of_range_is_refused(decode: Decode, value: object) -> None:
    refused(decode, value)


def test_id_length_limit_is_exact() -> None:
    longest, too_long = "é" * 256, "é" * 257
    assert messages.MAX_ID_LENGTH == 256
    for make, decode in (
        (lambda name: Hello(name, 1, 1, False, None), decode_for_server),
        (lambda name: StepBegin([Open(name, [1], None)], []), decode_for_server),
        (lambda name: StepBegin([], [name]), decode_for_server),
        (lambda name: CommitBatch(1, 2.5, [Commit(name, 1, [1], 3, None)], None), decode_for_server),
        (lambda name: Ready(name, 1, 1, 1), decode_for_engine),
        (lambda name: DraftBatch(1, True, [Draft(name, 1, [1], True, b"", b"", [])], []), decode_for_engine),
        (lambda name: DraftBatch(1, True, [], [name]), decode_for_engine),
    ):
        assert decode(encode(make(longest))) == make(longest)
        with pytest.raises(WireError, match="256"):
            decode(encode(make(too_long)))


def test_list_length_limit_is_exact() -> None:
    assert messages.MAX_ENTRIES == 4096
    for make, decode in (
        (lambda n: StepBegin([Open("a", [1], None)] * n, []), decode_for_server),
        (lambda n: StepBegin([], ["a"] * n), decode_for_server),
        (lambda n: CommitBatch(1, 2.5, [Commit("a", 1, [1], 3, None)] * n, None), decode_for_server),
        (lambda n: DraftBatch(1, True, [Draft("a", 1, [1], True, b"", b"", [])] * n, []), decode_for_engine),
        (lambda n: DraftBatch(1, True, [], ["a"] * n), decode_for_engine),
    ):
        assert decode(encode(make(4096))) == make(4096)
        with pytest.raises(WireError, match="4096"):
            decode(encode(make(4097)))


def test_long_prompts_are_not_limited_by_their_number_of_tokens() -> None:
    message = StepBegin([Open("a", [151_000] * 300_000, None)], [])
    assert decode_for_server(encode(message)) == message


# Fuzzing.

EDIT_KINDS = ("flip", "delete", "insert", "replace", "cut", "repeat")
edits = st.tuples(st.sampled_from(EDIT_KINDS), st.integers(0, 2**16), st.binary(min_size=1, max_size=6))


def mutate(data: bytes, edit: tuple[str, int, bytes]) -> bytes:
    """Does one edit at one place."""
    kind, where, content = edit
    at = where % (len(data) + 1)
    if kind == "flip":
        return data[:at] + bytes(byte ^ content[0] for byte in data[at : at + 1]) + data[at + 1 :]
    if kind == "delete":
        return data[:at] + data[at + len(content) :]
    if kind == "insert":
        return data[:at] + content + data[at:]
    if kind == "replace":
        return data[:at] + content + data[at + len(content) :]
    if kind == "cut":
        return data[:at]
    return data[:at] + data[at : at + 8] * len(content) + data[at:]


@settings(max_examples=800, deadline=None)
@given(engine_messages | server_messages, st.lists(edits, min_size=1, max_size=4))
def test_mutated_messages_are_harmless(message: Message, edits: list[tuple[str, int, bytes]]) -> None:
    data = encode(message)
    for edit in edits:
        data = mutate(data, edit)
    check_harmless(data)


@settings(max_examples=300, deadline=None)
@given(engine_messages | server_messages, engine_messages | server_messages, st.integers(0), st.integers(0))
def test_spliced_messages_are_harmless(first: Message, second: Message, end: int, start: int) -> None:
    head, tail = encode(first), encode(second)
    check_harmless(head[: end % (len(head) + 1)] + tail[start % (len(tail) + 1) :])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
@example(b"\x91" * 100_000)  # Nested 100,000 deep.
@example(b"\xa5Hello")
@example(b"\x92\xa7Failure\xa1\xff")  # Not UTF-8: msgspec's one error of another kind.
@example(b"\x97\xa6Status\x00\x00\x00\x00\x81\xa1\xff\x00\x80")
@example(b"\x92\xabStatusQuery\xc1")  # An opcode that msgpack never uses.
@example(b"\x93\xa9StepBegin\xdd\xff\xff\xff\xff\x90")  # Claims 4 billion entries.
@example(b"\x92\xa7Failure\xdb\xff\xff\xff\xff")  # Claims 4 GiB of text.
def test_arbitrary_bytes_are_harmless(body: bytes) -> None:
    check_harmless(body)
    check_harmless(VERSION + body)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)
tags = st.sampled_from([type(message).__name__ for message, _ in ALL])


@settings(max_examples=300, deadline=None)
@given(tags, st.lists(anything, max_size=7))
def test_well_formed_nonsense_is_harmless(tag: str, entries: list[object]) -> None:
    check_harmless(pack([tag, *entries]))


@pytest.mark.parametrize(
    "wrong",
    [
        (0.0, 64, 1),
        (-1.0, 64, 1),
        (2e6, 64, 1),
        (float("nan"), 64, 1),
        (1.0, 0, 1),
        (1.0, 1025, 1),
        (1.0, 64, -1),
        (1.0, 64, 2**63),
    ],
)
def test_sampling_out_of_range_is_refused(wrong: tuple[float, int, int]) -> None:
    refused(decode_for_server, ["StepBegin", [["Open", "a", [1], ["Sampling", *wrong]]], []])


def test_distributions_have_a_limit() -> None:
    most = b"x" * (4 * messages.MAX_CHUNK * messages.MAX_TOP_M)
    assert decode_for_engine(encode(DraftBatch(1, True, [Draft("a", 1, [1], True, most, most, [])], [])))
    refused(decode_for_engine, ["DraftBatch", 1, True, [["Draft", "a", 1, [1], True, most + b"x", b"", []]], []])
