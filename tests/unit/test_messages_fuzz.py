"""Random bytes for the decoders of `messages`: spoilt messages, spliced ones, arbitrary bytes, and well-formed nonsense.

Each is refused, or is a message. Against a real server: test_wire_fuzz.
"""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.made_messages import ALL, VERSION, pack
from tests.message_strategies import engine_messages, server_messages
from vllm_specbranch.errors import WireError
from vllm_specbranch.messages import Message, decode_for_engine, decode_for_server, encode

pytestmark = pytest.mark.timeout(120)  # Hostile bytes must not hang the decoder.


def check_harmless(data: bytes) -> None:
    """Checks that bytes are refused, or are a message that can be sent on and is the same then."""
    for decode in (decode_for_server, decode_for_engine):
        try:
            message = decode(data)
        except WireError:
            continue
        assert decode(encode(message)) == message


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
