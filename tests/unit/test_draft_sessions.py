"""A draft server that several engines share: who gets in, with how much, for how long. Fake model, clock that stands still."""

import logging
from dataclasses import replace

import pytest

from tests.draft_engine import BLOCK_SIZE, Clock
from tests.fakes import FakeDraftModel
from vllm_specbranch import draft_sessions, messages
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_sessions import LEASE_S, Offer, SharedDraftServer
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.errors import WireError
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.messages import (
    Commit,
    CommitBatch,
    DraftBatch,
    Farewell,
    Hello,
    Open,
    Ready,
    Refused,
    StepBegin,
    Terms,
)

OFFER = Offer("identity", "float32", 4)
TERMS = Terms("identity", "float32", 4)
ONE, TWO = b"one", b"two"


class Bench:
    def __init__(self, max_model_len: int = 10_000, on_miss: str = "auto", offer: Offer = OFFER) -> None:
        self.clock = Clock()
        self.model = FakeDraftModel(400, BLOCK_SIZE, max_model_len=max_model_len)
        config = SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": 4, "on_miss": on_miss})
        kv = KVBlocks(400, BLOCK_SIZE)
        server = make_server(config, self.model, kv, Limits(), self.clock, offer=offer)
        assert isinstance(server, SharedDraftServer)
        self.server = server

    def say(self, peer: bytes, message: messages.EngineMessage) -> list[messages.ServerMessage]:
        replies = self.server.handle(peer, message)
        self.server.check_integrity()
        assert {to for to, _ in replies} <= {peer}
        return [reply for _, reply in replies]

    def greet(self, peer: bytes, terms: Terms | None = TERMS, vocab_size: int = 50) -> messages.ServerMessage:
        (reply,) = self.say(peer, Hello("s", vocab_size, 500, False, terms))
        return reply

    def open(self, peer: bytes, *names: str, num_tokens: int = 3) -> None:
        assert self.say(peer, StepBegin([Open(name, list(range(num_tokens)), None) for name in names], [])) == []

    def commit(self, peer: bytes, name: str, position: int = 3, tokens: tuple[int, ...] = (7,)) -> DraftBatch:
        (reply,) = self.say(peer, CommitBatch(1, 0.0, [Commit(name, position, list(tokens), 0, None)], None))
        assert isinstance(reply, DraftBatch)
        return reply

    def run(self) -> None:
        while self.server.step()[1]:
            self.server.check_integrity()


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("terms", "vocab_size", "reason"),
    [
        (TERMS, 51, "vocabulary has 51 tokens, the draft's 50"),
        (Terms("another", "float32", 4), 50, "another draft model"),
        (Terms("identity", "bfloat16", 4), 50, "expects a draft model in 'bfloat16', this server's is in float32"),
        (Terms("identity", "float32", 3), 50, "takes at most 3 draft tokens, this server drafts up to 4"),
        (None, 50, "does not say what it expects"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_the_reason(
    bench: Bench, terms: Terms | None, vocab_size: int, reason: str
) -> None:
    assert isinstance(bench.greet(ONE), Ready)
    refusal = bench.greet(TWO, terms, vocab_size)
    assert isinstance(refusal, Refused)
    assert refusal.is_final
    assert reason in refusal.reason
    assert bench.server.num_sessions == 1
    assert bench.say(TWO, StepBegin([Open("a", [1], None)], [])) == [Farewell(draft_sessions.NO_SESSION)]
    bench.open(ONE, "a")
    assert bench.commit(ONE, "a").unknown == []


@pytest.mark.parametrize("terms", [Terms("", "float32", 4), Terms("identity", "float32", 64)])
def test_an_engine_that_does_not_know_or_takes_more_fits(bench: Bench, terms: Terms) -> None:
    assert isinstance(bench.greet(ONE, terms), Ready)


def test_a_refusal_ends_the_session_that_there_was(bench: Bench) -> None:
    bench.greet(ONE)
    bench.open(ONE, "a")
    assert isinstance(bench.greet(ONE, vocab_size=51), Refused)
    assert (bench.server.num_sessions, bench.server.kv.num_held) == (0, 0)


def test_engines_with_the_same_request_ids_do_not_meet(bench: Bench) -> None:
    for peer in (ONE, TWO):
        bench.greet(peer)
    bench.open(ONE, "a", num_tokens=3)
    bench.open(TWO, "a", num_tokens=5)
    bench.run()
    first = bench.commit(ONE, "a", 3).drafts[0]
    second = bench.commit(TWO, "a", 5).drafts[0]
    assert (first.position, second.position) == (4, 6)
    bench.say(TWO, StepBegin([], ["a"]))
    assert bench.commit(TWO, "a", 6).unknown == ["a"]
    assert bench.commit(ONE, "a", 4).unknown == []


def test_who_has_no_session_is_told_so(bench: Bench) -> None:
    for message in (StepBegin([Open("a", [1], None)], []), CommitBatch(1, 0.0, [], None), messages.StatusQuery(1)):
        assert bench.say(ONE, message) == [Farewell(draft_sessions.NO_SESSION)]
    assert bench.server.num_sessions == 0


def test_no_engine_can_end_the_server(bench: Bench) -> None:
    for peer in (ONE, TWO):
        bench.greet(peer)
    assert bench.say(ONE, messages.Shutdown()) == []
    assert not bench.server.is_stopping


def test_an_engine_that_vanishes_leaves_nothing_after_its_lease(bench: Bench) -> None:
    for peer in (ONE, TWO):
        bench.greet(peer)
    bench.open(ONE, "a", "b")
    bench.open(TWO, "a")
    bench.run()
    for _ in range(4):
        bench.clock.now_s += 0.3 * LEASE_S
        bench.commit(TWO, "a", 3)
    bench.say(TWO, StepBegin([], ["a"]))
    assert bench.server.kv.num_held == 0
    assert bench.server.counters.num_expired_requests == 2
    assert bench.commit(ONE, "a").unknown == ["a"], "it has its session, and opens its requests again"


def test_a_place_goes_to_a_newcomer_when_its_engine_is_gone() -> None:
    bench = Bench(offer=replace(OFFER, max_engines=2))
    for peer in (ONE, TWO):
        assert isinstance(bench.greet(peer), Ready)
    refusal = bench.greet(b"three")
    assert isinstance(refusal, Refused)
    assert not refusal.is_final, "it may try again"
    assert refusal.reason == "this server serves 2 engines already"
    assert isinstance(bench.greet(ONE), Ready), "who has a place keeps it"
    bench.clock.now_s += 0.9 * LEASE_S
    bench.open(ONE, "a")
    bench.clock.now_s += 0.2 * LEASE_S
    assert isinstance(bench.greet(b"three"), Ready)
    assert bench.say(TWO, StepBegin([], [])) == [Farewell(draft_sessions.NO_SESSION)]
    assert bench.commit(ONE, "a").unknown == []


def keyed(bench: Bench, peer: bytes, key: str, vocab_size: int = 50) -> list[tuple[bytes, str]]:
    """A hello with this key; returns who is told what."""
    bench.server.key = key
    replies = bench.server.handle(peer, Hello("s", vocab_size, 500, False, TERMS))
    return [(to, type(reply).__name__) for to, reply in replies]


def test_no_key_keeps_another_out_and_one_alone_may_have_all() -> None:
    bench = Bench(offer=replace(OFFER, max_engines=6))
    crowd = [f"c{number}".encode() for number in range(6)]
    for peer in crowd:
        assert keyed(bench, peer, "crowd") == [(peer, "Ready")]
    assert keyed(bench, b"c6", "crowd") == [(b"c6", "Refused")], "its own key has them all"
    bench.clock.now_s += 1.0
    bench.open(crowd[0], "a")
    assert keyed(bench, b"x", "other", vocab_size=51) == [(b"x", "Refused")], "who is not served takes nobody's place"
    assert bench.server.num_sessions == 6
    assert keyed(bench, b"o1", "other") == [(crowd[1], "Farewell"), (b"o1", "Ready")], "of those silent longest"
    assert bench.say(crowd[1], StepBegin([], [])) == [Farewell(draft_sessions.NO_SESSION)]
    assert keyed(bench, crowd[1], "crowd") == [(crowd[1], "Refused")], "and does not take it back"
    for peer, gone in ((b"o2", crowd[2]), (b"o3", crowd[3])):
        assert keyed(bench, peer, "other") == [(gone, "Farewell"), (peer, "Ready")]
    assert keyed(bench, b"o4", "other") == [(b"o4", "Refused")], "each has half"
    assert keyed(bench, b"t", "third") == [(crowd[4], "Farewell"), (b"t", "Ready")]
    assert keyed(bench, b"c7", "crowd") == [(b"c7", "Refused")], "two and three: they would only take turns"
    assert bench.commit(crowd[0], "a").unknown == [], "who is at work keeps its place"
    assert bench.server.num_sessions == 6
    assert set(bench.server._keys) == set(bench.server._heard_s)


def test_what_is_over_an_engines_limits_stays_unknown() -> None:
    bench = Bench(offer=replace(OFFER, max_requests=3, max_tokens=20))
    for peer in (ONE, TWO):
        bench.greet(peer)
    bench.open(ONE, "a", "b", "c", "d")
    assert bench.commit(ONE, "d").unknown == ["d"]
    assert bench.commit(ONE, "c").unknown == []
    bench.open(TWO, "a", "b")
    assert bench.commit(TWO, "b").unknown == [], "each engine has its own"
    bench.open(TWO, "c", num_tokens=15)
    assert bench.commit(TWO, "c", 15).unknown == ["c"]
    bench.open(TWO, "a", num_tokens=15)
    assert bench.commit(TWO, "a", 15).unknown == [], "opened anew, a request counts once"
    bench.say(ONE, StepBegin([Open("d", [1, 2, 3], None)], ["a"]))
    assert bench.commit(ONE, "d").unknown == []
    assert bench.server.counters.num_turned_away == 2


def test_a_full_engine_is_told_so_until_it_closes_something() -> None:
    """It would otherwise open at every step, with their whole history, what the server has no place for."""
    bench = Bench(offer=replace(OFFER, max_requests=2))
    for peer in (ONE, TWO):
        bench.greet(peer)
    bench.open(ONE, "a", "b")
    assert not bench.commit(ONE, "a").is_full, "nothing has been turned away"
    bench.open(ONE, "c")
    reply = bench.commit(ONE, "c")
    assert (reply.is_full, reply.unknown) == (True, ["c"])
    assert not bench.commit(TWO, "c").is_full, "another engine is not"
    bench.say(ONE, StepBegin([Open("d", [1], None), Open("e", [1], None)], ["a"]))
    assert bench.commit(ONE, "d", 1).unknown == [], "what is closed makes room in the same step"
    assert bench.commit(ONE, "e", 1).is_full
    bench.say(ONE, StepBegin([], ["d"]))
    assert not bench.commit(ONE, "e", 1).is_full
    bench.open(ONE, "e")
    assert bench.commit(ONE, "e").unknown == []


def test_a_full_engine_is_full_no_more_when_a_request_goes_because_its_commit_does_not_fit() -> None:
    bench = Bench(offer=replace(OFFER, max_requests=2))
    bench.greet(ONE)
    bench.open(ONE, "a", "b", "c")
    assert bench.commit(ONE, "a").is_full
    reply = bench.commit(ONE, "b", position=9)
    assert (reply.is_full, reply.unknown) == (False, ["b"])
    bench.open(ONE, "c")
    assert bench.commit(ONE, "c").unknown == []


def test_what_is_learned_of_one_engine_is_not_believed_of_another(bench: Bench) -> None:
    """Else one whose target accepts nothing, or that makes its outcomes up, would have the others' chunks cut."""
    for peer in (ONE, TWO):
        bench.greet(peer)
        bench.open(peer, "a")
        bench.run()
    before = bench.server._peers[TWO].planner.acceptance.mean
    for position in range(3, 40):
        bench.say(ONE, CommitBatch(1, 0.0, [Commit("a", position, [49], 4, None)], None))
        bench.run()
    assert bench.server._peers[ONE].planner.acceptance.mean < before
    assert bench.server._peers[TWO].planner.acceptance.mean == before
    learned = bench.server._peers[ONE].planner
    bench.greet(ONE)
    assert bench.server._peers[ONE].planner is learned, "a new session of the same engine goes on with it"


def test_who_sends_too_fast_begins_anew(bench: Bench) -> None:
    bench.greet(ONE)
    bench.open(ONE, "a")
    bench.run()
    assert [type(reply) for _, reply in bench.server.overrun(ONE)] == [Farewell]
    assert (bench.server.num_sessions, bench.server.kv.num_held) == (0, 0)
    assert isinstance(bench.greet(ONE), Ready)


def test_who_reads_no_replies_is_not_drafted_for(bench: Bench) -> None:
    for peer in (ONE, TWO):
        bench.greet(peer)
        bench.open(peer, "a")
    bench.run()
    bench.server.lost(ONE)
    bench.server.lost(b"a stranger, who was refused")
    assert bench.server.num_sessions == 1
    bench.run()
    assert {key[0] for key in bench.server._requests} == {TWO}
    assert bench.say(ONE, StepBegin([], [])) == [Farewell(draft_sessions.NO_SESSION)]
    assert isinstance(bench.greet(ONE), Ready)


def test_a_busy_server_answers_with_what_it_has_rather_than_late() -> None:
    """What an engine sent while the server was busy has waited already: of the time that it allows, so much is gone."""
    lengths = {}
    for busy_s in (0.0, 0.011):
        bench = Bench(on_miss="wait:4")
        bench.greet(ONE)
        bench.open(ONE, "a")
        bench.server.came_s = bench.clock.now_s
        bench.clock.now_s += busy_s
        waiting = CommitBatch(9, 10.0, [Commit("a", 3, [49], 0, None)], None)
        replies = bench.say(ONE, waiting)
        while not replies:
            replies = [reply for _, reply in bench.server.step()[0]]
        (reply,) = replies
        assert isinstance(reply, DraftBatch)
        lengths[busy_s] = len(reply.drafts[0].tokens)
    assert lengths == {0.0: 4, 0.011: 0}


def test_the_log_is_not_for_engines_to_fill(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        bench.greet(ONE, Terms("identity", "float64\nforged line", 4))
        bench.server.refuse(WireError("a token outside the vocabulary"))
    assert bench.server.counters.num_refused_messages == 50

    def ours() -> list[logging.LogRecord]:
        return [one for one in caplog.records if one.name == draft_sessions.logger.name]

    (record,) = ours()
    assert "\n" not in record.message
    bench.clock.now_s += draft_sessions.WARNING_PERIOD_S
    bench.server.refuse(WireError("a token outside the vocabulary"))
    assert len(ours()) == 2


def test_no_sequence_outgrows_the_model(bench: Bench) -> None:
    bench = Bench(max_model_len=16)
    bench.greet(ONE)
    bench.open(ONE, "long", num_tokens=16)
    assert bench.commit(ONE, "long", 16).unknown == ["long"]
    bench.open(ONE, "a", num_tokens=15)
    assert bench.commit(ONE, "a", 15, (7,)).unknown == []
    assert [draft.tokens for draft in bench.commit(ONE, "a", 16, tuple(range(10))).drafts] == [[]]
    assert bench.server.kv.num_held == 0
    assert bench.commit(ONE, "a", 26).unknown == ["a"]


def test_draining_answers_what_is_open_and_takes_leave() -> None:
    bench = Bench(on_miss="wait:4")
    for peer in (ONE, TWO):
        bench.greet(peer)
    bench.open(ONE, "a")
    waiting = CommitBatch(9, 10_000.0, [Commit("a", 3, [49], 0, None)], None)
    assert bench.say(ONE, waiting) == [], "nothing is drafted yet: the reply waits"
    bench.server.is_stopping = True
    refusal = bench.greet(b"three")
    assert isinstance(refusal, Refused)
    assert not refusal.is_final
    replies = bench.server.drain("the end")
    assert [(peer, type(reply)) for peer, reply in replies] == [(TWO, Farewell), (ONE, DraftBatch), (ONE, Farewell)]
    assert isinstance(replies[1][1], DraftBatch)
    assert (replies[1][1].round, replies[1][1].is_final) == (9, True)
    assert (bench.server.num_sessions, bench.server.kv.num_held) == (0, 0)
    assert bench.server.drain("the end") == []
