"""Which reply the line takes for which round, and how long it waits for it.

Late ones, those that were sent ahead, and waits that end with the reply or with its server only. With a scripted server and a
clock that stands still.
"""

import pytest

from tests.link_bench import Bench, batch
from vllm_specbranch import messages
from vllm_specbranch.back_off import HUNG_S


def test_replies_of_older_rounds_are_dropped() -> None:
    bench = Bench()
    bench.bring_up()
    bench.say(batch(1))
    bench.say(batch(2))
    reply = bench.link.receive(2, 50.0)
    assert reply is not None
    assert reply.round == 2
    assert bench.counters.num_late_replies == 1


def test_a_silent_server_costs_one_timeout_then_nothing() -> None:
    bench = Bench()
    bench.bring_up()
    started_s = bench.clock.now_s
    assert bench.link.receive(1, 50.0) is None
    assert bench.clock.now_s - started_s == pytest.approx(0.05)
    for number in range(2, 10):
        assert bench.link.receive(number, 50.0) is None
    assert bench.clock.now_s - started_s == pytest.approx(0.05)
    assert bench.counters.num_reply_timeouts == 1
    assert bench.link.is_up


def test_a_late_server_is_waited_for_again_once_it_has_spoken() -> None:
    bench = Bench()
    bench.bring_up()
    assert bench.link.receive(1, 50.0) is None
    bench.say(batch(1))
    started_s = bench.clock.now_s
    waiting = bench.channels[-1]
    waiting.on_wait = lambda: (
        bench.say(batch(2)) if bench.clock.now_s == started_s and not waiting.channel.num_dropped else None
    )
    reply = bench.link.receive(2, 50.0)
    assert reply is not None
    assert reply.round == 2


def ahead(number: int, num_tokens: int) -> messages.DraftBatch:
    draft = messages.Draft("a", 5, list(range(num_tokens)), True, b"", b"", [])
    return messages.DraftBatch(number, False, [draft], [])


def test_what_was_sent_ahead_counts_when_the_reply_is_late() -> None:
    bench = Bench()
    bench.bring_up()
    bench.say(ahead(1, 4))
    bench.say(ahead(2, 1))
    bench.say(ahead(2, 2))
    reply = bench.link.receive(2, 50.0)
    assert reply is not None
    assert [draft.tokens for draft in reply.drafts] == [[0, 1]], "the newest of this round"
    started_s = bench.clock.now_s
    assert bench.link.receive(3, 50.0) is None
    assert bench.clock.now_s - started_s == pytest.approx(0.05), "the server has spoken: it is waited for again"
    assert bench.counters.num_reply_timeouts == 2
    assert bench.counters.num_late_replies == 0, "no reply was due for the first round any more"


def test_the_reply_replaces_what_was_sent_ahead() -> None:
    bench = Bench()
    bench.bring_up()
    bench.say(ahead(1, 2))
    bench.say(batch(1))
    assert bench.link.receive(1, 50.0) == batch(1)
    assert bench.counters.num_reply_timeouts == 0


def test_a_patient_wait_ends_with_the_reply() -> None:
    bench = Bench()
    bench.bring_up()
    waiting = bench.channels[-1]
    started_s = bench.clock.now_s
    waiting.on_wait = lambda: bench.say(batch(1)) if bench.clock.now_s - started_s > 3.0 else None
    assert bench.link.receive_patiently(1) == batch(1)
    assert bench.clock.now_s - started_s > 3.0
    assert bench.link.is_up
    assert bench.counters.num_reply_timeouts == 0


def test_a_patient_wait_ends_with_the_death_of_the_server_or_when_it_counts_as_dead() -> None:
    bench = Bench()
    bench.bring_up()
    waiting = bench.channels[-1]
    waiting.on_wait = bench.process.kill
    started_s = bench.clock.now_s
    assert bench.link.receive_patiently(1) is None
    assert bench.clock.now_s - started_s < 0.5
    bench = Bench()
    bench.bring_up()
    started_s = bench.clock.now_s
    assert bench.link.receive_patiently(1) is None
    assert bench.clock.now_s - started_s == pytest.approx(HUNG_S, abs=0.2)
    assert not bench.link.is_up


def test_a_patient_wait_ends_with_a_refusal() -> None:
    bench = Bench()
    bench.bring_up()
    bench.say(messages.Failure("no"))
    started_s = bench.clock.now_s
    assert bench.link.receive_patiently(1) is None
    assert bench.clock.now_s == started_s
    assert bench.link.is_up
