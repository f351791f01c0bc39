"""The limits of `messages`: each number, name, list and distribution in them has a range, and what is out of it is refused."""

import pytest

from tests.made_messages import Decode, refused
from vllm_specbranch import messages
from vllm_specbranch.errors import WireError
from vllm_specbranch.messages import (
    Commit,
    CommitBatch,
    Draft,
    DraftBatch,
    Hello,
    Open,
    Ready,
    StepBegin,
    decode_for_engine,
    decode_for_server,
    encode,
)

pytestmark = pytest.mark.timeout(120)  # Hostile bytes must not hang the decoder.


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


@pytest.mark.parametrize("wrong", [None, True, 1.0, "1", -1, 2**31, [1]])
def test_wrong_tokens_are_refused(wrong: object) -> None:
    refused(decode_for_server, ["StepBegin", [["Open", "a", [1, wrong], None]], []])
    refused(decode_for_server, ["CommitBatch", 7, 2.5, [["Commit", "a", 12, [wrong], 0, None]], None])
    refused(decode_for_engine, ["DraftBatch", 7, True, [["Draft", "a", 12, [wrong, 2], True, b"", b"", []]], []])


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
