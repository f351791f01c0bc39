"""The line to the draft server from handshake to close: its start, its terms, refusals and farewells.

With a scripted server and a clock that stands still. When the server fails: test_draft_link_breaker; which replies count:
test_draft_link_replies.
"""

import pytest

from tests.link_bench import Bench
from vllm_specbranch import messages


def test_the_first_poll_starts_the_server_and_the_handshake_brings_it_up() -> None:
    bench = Bench()
    assert not bench.link.is_up
    assert not bench.link.send(messages.StatusQuery(1)), "nothing is sent to a server that is not up"
    bench.bring_up()
    assert (bench.link.generation, bench.link.draft_max_model_len, bench.counters.num_server_starts) == (1, 64, 1)


def test_a_ready_of_another_session_does_not_count() -> None:
    bench = Bench()
    bench.link.poll()
    bench.heard()
    bench.say(messages.Ready("another", 64, 10, 4))
    bench.link.poll()
    assert not bench.link.is_up


def test_a_refusal_is_final() -> None:
    bench = Bench()
    bench.link.poll()
    (hello,) = bench.heard()
    assert isinstance(hello, messages.Hello)
    bench.say(messages.Failure("a message that was refused earlier"))
    bench.link.poll()
    assert bench.process.refusals == [], "only the answer to this handshake counts"
    bench.say(messages.Refused(hello.session, "another vocabulary", True))
    bench.link.poll()
    assert bench.process.refusals == [True]
    bench.link.poll()
    assert bench.process.num_starts == 1
    assert not bench.link.wait_until_up(10.0)


def test_a_refusal_for_now_is_asked_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    for _ in range(3):
        bench.link.poll()
        hello = bench.heard()[-1]
        assert isinstance(hello, messages.Hello)
        bench.say(messages.Refused(hello.session, "no room for another engine", False))
        bench.link.poll()
        assert not bench.link.is_up
    assert bench.process.refusals == [False] * 3
    assert sum("no room for another engine" in record.message for record in caplog.records) == 1
    bench.link.poll()
    bench.bring_up()


@pytest.mark.parametrize("ask", ["receive", "receive_patiently", "query_status"])
def test_a_farewell_ends_the_session_at_once_and_another_is_asked_for(ask: str) -> None:
    bench = Bench()
    bench.bring_up()
    bench.link.send(messages.CommitBatch(1, 0.0, [], None))
    bench.heard()
    bench.say(messages.Farewell("the server ends"))
    before_s = bench.clock.now_s
    if ask == "receive":
        assert bench.link.receive(1, 50.0) is None
    elif ask == "receive_patiently":
        assert bench.link.receive_patiently(1) is None
    else:
        assert bench.link.query_status(2.0) is None
    assert not bench.link.is_up
    assert bench.clock.now_s == before_s, "nobody waits for a server that has said that it will not answer"
    assert bench.process.num_kills == 0
    generation = bench.link.generation
    bench.bring_up()
    assert bench.link.generation == generation + 1, "the requests are opened again"


def test_what_came_ahead_of_a_farewell_is_used() -> None:
    bench = Bench()
    bench.bring_up()
    bench.link.send(messages.CommitBatch(1, 0.0, [], None))
    bench.heard()
    ahead = messages.DraftBatch(1, False, [], [])
    bench.say(ahead)
    bench.say(messages.Farewell("the server ends"))
    assert bench.link.receive(1, 50.0) == ahead


def test_the_terms_are_part_of_the_handshake() -> None:
    terms = messages.Terms("identity", "float32", 8)
    bench = Bench(terms=terms)
    bench.link.poll()
    (hello,) = bench.heard()
    assert isinstance(hello, messages.Hello)
    assert hello.terms == terms


def test_waiting_for_the_start_ends_when_the_server_dies() -> None:
    bench = Bench()
    bench.link.poll()

    def die() -> None:
        """Its back-off begins, as that of a real one does."""
        bench.process.running = bench.process.may_start = False

    bench.channels[-1].on_wait = die
    started_s = bench.clock.now_s
    assert not bench.link.wait_until_up(180.0)
    assert bench.clock.now_s - started_s < 1.0


def test_status_is_asked_for_with_a_limit() -> None:
    bench = Bench()
    bench.bring_up()
    assert bench.link.query_status(2.0) is None
    assert bench.clock.now_s == pytest.approx(102.0)


def test_closing_twice_is_fine() -> None:
    bench = Bench()
    bench.bring_up()
    bench.link.close()
    bench.link.close()
    assert bench.process.is_stopped
    assert not bench.link.is_up


def test_the_handshake_asks_for_top_probabilities_only_when_told_to() -> None:
    for wanted in (False, True):
        bench = Bench(wants_top_probs=wanted)
        bench.link.poll()
        (hello,) = bench.heard()
        assert isinstance(hello, messages.Hello) and hello.wants_top_probs is wanted
