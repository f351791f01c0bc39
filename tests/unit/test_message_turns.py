"""Whose message is next: order within an engine, fair time between engines, and limits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft_engine import Clock
from vllm_specbranch import message_turns
from vllm_specbranch.message_turns import MOST_TOKENS, MOST_WAITING, MOST_WAITING_OF_STRANGERS, MessageTurns
from vllm_specbranch.messages import Commit, CommitBatch, Hello, Open, StatusQuery, StepBegin

NAMES = [b"a", b"b", b"c"]
costs = st.integers(1, 40).map(lambda tenths: tenths / 10)


def take_all(turns: MessageTurns, cost_s: dict[bytes, float]) -> list[tuple[bytes, int]]:
    """Handle what waits, each message for what its engine's cost; returns (engine, number of its message)."""
    taken = []
    while (found := turns.take()) is not None:
        peer, message = found.peer, found.message
        assert isinstance(message, StatusQuery)
        turns.charge(peer, cost_s[peer])
        taken.append((peer, message.query))
    return taken


@given(st.lists(st.sampled_from(NAMES), max_size=60), st.fixed_dictionaries(dict.fromkeys(NAMES, costs)))
def test_each_engines_messages_are_all_taken_in_their_order(senders: list[bytes], cost_s: dict[bytes, float]) -> None:
    turns = MessageTurns()
    sent = [(peer, number) for number, peer in enumerate(senders)]
    for peer, number in sent:
        assert turns.put(peer, StatusQuery(number)) == []
    taken = take_all(turns, cost_s)
    assert not turns.is_waiting
    for name in NAMES:
        assert [one for one in taken if one[0] == name] == [one for one in sent if one[0] == name]


@settings(deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(NAMES, costs)), st.integers(10, 60))
def test_while_all_have_messages_their_time_is_equal_but_for_one_message(
    cost_s: dict[bytes, float], count: int
) -> None:
    turns = MessageTurns()
    for name in NAMES:
        for number in range(count):
            turns.put(name, StatusQuery(number))
    used_s, left = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, count)
    while min(left.values()) > 0:
        found = turns.take()
        assert found is not None
        turns.charge(found[0], cost_s[found[0]])
        used_s[found[0]] += cost_s[found[0]]
        left[found[0]] -= 1
        assert max(used_s.values()) - min(used_s.values()) <= max(cost_s.values()) + 1e-9


@settings(deadline=None)
@given(st.integers(0, 50), costs)
def test_a_small_engine_waits_for_one_message_of_a_large_one_at_most(num_before: int, cost_s: float) -> None:
    """However long the large one has been at it, and though it always has another message."""
    turns = MessageTurns()
    for number in range(MOST_WAITING):
        turns.put(b"large", StatusQuery(number))
    for number in range(num_before):
        assert turns.take() is not None
        turns.charge(b"large", cost_s)
        turns.put(b"large", StatusQuery(number))
    for number in range(10):
        turns.put(b"small", StatusQuery(number))
        waits = 0
        while (found := turns.take()) is not None and found[0] != b"small":
            turns.charge(found[0], cost_s)
            waits += 1
        assert waits <= 1
        turns.charge(b"small", cost_s / 10)


def test_who_was_away_has_saved_nothing_up() -> None:
    turns = MessageTurns()
    turns.put(b"a", StatusQuery(0))
    assert take_all(turns, {b"a": 1.0})
    for number in range(50):
        turns.put(b"b", StatusQuery(number))
    take_all(turns, {b"b": 1.0})
    for number in range(10):
        turns.put(b"a", StatusQuery(number))
        turns.put(b"b", StatusQuery(number))
    first = [peer for peer, _ in take_all(turns, dict.fromkeys((b"a", b"b"), 1.0))[:8]]
    assert first.count(b"b") >= 3


def test_so_many_wait_and_no_more() -> None:
    turns = MessageTurns()
    assert not any(turns.put(b"a", StatusQuery(number)) for number in range(MOST_WAITING))
    assert turns.put(b"b", StatusQuery(0)) == [], "another engine's are counted for themselves"
    assert turns.put(b"a", StatusQuery(0)) == [b"a"]
    turns.forget(b"c")
    assert [peer for peer, _ in take_all(turns, {b"b": 1.0})] == [b"b"], "of whom too much waits, nothing is left"
    assert turns.put(b"a", StatusQuery(0)) == []


def test_so_many_tokens_wait_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_turns, "MOST_WAITING_TOKENS", 30)
    turns = MessageTurns()
    ten = StepBegin([Open("r", [1] * 10, None)], [])
    assert [turns.put(b"a", ten) for _ in range(3)] == [[], [], []]
    assert turns.put(b"b", ten) == []
    assert turns.take() is not None and turns.take() is not None
    assert turns.put(b"a", ten) == [], "what is taken waits no more"
    assert turns.put(b"c", StepBegin([Open("r", [1] * 31, None)], [])) == [b"c"]
    turns.forget(b"a")
    assert [turns.put(b"a", ten) for _ in range(4)] == [[], [], [], [b"a"]]


def test_what_names_many_requests_takes_memory_without_any_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_turns, "MOST_WAITING_TOKENS", 1000)
    names = [str(number) for number in range(200)]
    for message in (
        StepBegin([], names),
        StepBegin([Open(name, [], None) for name in names], []),
        CommitBatch(1, 0.0, [Commit(name, 1, [1], 0, None) for name in names], None),
    ):
        assert MessageTurns().put(b"a", message) == [b"a"]


def test_so_much_waits_of_all_together_and_who_has_most_of_it_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_turns, "MOST_WAITING_TOKENS_IN_ALL", 100)
    turns = MessageTurns()

    def put(peer: bytes, num_tokens: int, key: str) -> list[bytes]:
        return turns.put(peer, StepBegin([Open("r", [1] * num_tokens, None)], []), key)

    assert put(b"large", 40, "honest") == []
    crowd = [f"{number}".encode() for number in range(6)]
    assert [put(peer, 10, "crowd") for peer in crowd[:5]] == [[]] * 5
    assert put(crowd[5], 20, "crowd") == [crowd[5]], "the key that has most gives its largest, though each has little"
    assert put(b"large", 30, "honest") == [b"large"]
    assert {peer for peer, _, _, _ in iter(turns.take, None)} == set(crowd[:5])  # type: ignore[misc]
    assert (turns._num_tokens_in_all, sum(turns._num_tokens.values())) == (0, 0)
    assert put(b"large", 90, "honest") == [], "what was taken or dropped waits no more"
    assert put(b"small", 95, "crowd") == [b"small"], "as many as must give do"


def test_little_waits_of_who_has_no_session_but_its_hello_does(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = MessageTurns()
    for number in range(MOST_WAITING_OF_STRANGERS):
        assert turns.put(b"a", StatusQuery(number), has_session=False) == []
    assert turns.put(b"a", StatusQuery(0), has_session=False) == [b"a"]
    monkeypatch.setattr(message_turns, "MOST_WAITING_TOKENS_OF_STRANGERS", 50)
    large = StepBegin([Open("r", [1] * 51, None)], [])
    assert turns.put(b"a", large, has_session=False) == [b"a"]
    assert turns.put(b"a", large) == []
    hello = Hello("s", 50, 500, False, None)
    assert turns.put(b"a", hello, has_session=False) == [], "what it meant for another server is no reason to miss it"
    assert [turn.message for turn in iter(turns.take, None)] == [hello]  # type: ignore[union-attr]


@given(st.lists(st.integers(1, 15_000), max_size=12), st.lists(st.just("x"), max_size=1))
def test_what_opens_much_is_handled_in_parts(sizes: list[int], closes: list[str]) -> None:
    """All of it, in its order, before what the engine says next; no part is more than it may be, or one request."""
    turns = MessageTurns()
    opens = [Open(str(index), [1] * size, None) for index, size in enumerate(sizes)]
    turns.put(b"a", StepBegin(opens, closes))
    turns.put(b"a", StatusQuery(1))
    parts = []
    while (found := turns.take()) is not None:
        parts.append(found[1])
    assert parts.pop() == StatusQuery(1)
    begins = [part for part in parts if isinstance(part, StepBegin)]
    assert begins == parts
    assert [one for part in begins for one in part.opens] == opens
    assert [part.closes for part in begins] == [closes, *([[]] * (len(begins) - 1))]
    assert all(sum(len(one.tokens) for one in part.opens) <= MOST_TOKENS or len(part.opens) == 1 for part in begins)
    assert len(begins) <= 1 + 2 * sum(sizes) // MOST_TOKENS


def test_another_engines_message_comes_between_the_parts() -> None:
    turns = MessageTurns()
    turns.put(b"a", StepBegin([Open(str(index), [1] * MOST_TOKENS, None) for index in range(5)], []))
    assert turns.take() is not None
    turns.charge(b"a", 1.0)
    turns.put(b"b", StatusQuery(1))
    found = turns.take()
    assert found is not None and found[0] == b"b"
    assert turns.is_waiting


def test_a_message_may_have_come_as_soon_as_all_before_it_were_in() -> None:
    clock = Clock()
    turns = MessageTurns(clock)
    clock.now_s = 5.0
    turns.caught_up()
    clock.now_s = 7.0
    turns.put(b"a", StatusQuery(0))
    clock.now_s = 8.0
    turns.caught_up()
    turns.put(b"a", StatusQuery(1))
    came = []
    while (found := turns.take()) is not None:
        came.append(round(found[2]))
    assert came == [5, 8]


def test_names_are_free_and_so_not_all_kept() -> None:
    turns = MessageTurns()
    turns.put(b"waiting", StatusQuery(0))
    for number in range(message_turns.MAX_KNOWN + 50):
        turns.charge(str(number).encode(), 1.0)
    assert len(turns._used_s) <= message_turns.MAX_KNOWN
    found = turns.take()
    assert found is not None and found[0] == b"waiting"
