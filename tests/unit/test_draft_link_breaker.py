"""The line to a draft server that fails: silent, hung, dead, deaf, or never done with its start.

When the breaker opens, what brings the server back, when it is replaced, and that nobody waits for it meanwhile. With a scripted
server and a clock that stands still.
"""

import pytest

from tests.link_bench import Bench, Process, batch
from vllm_specbranch import messages
from vllm_specbranch.back_off import HUNG_S
from vllm_specbranch.draft_link import FIRST_PROBE_S, LINK_GONE, SILENCE_S
from vllm_specbranch.placement import LONGEST_START_S


def test_the_breaker_opens_after_silence_and_a_probe_brings_the_server_back() -> None:
    bench = Bench()
    bench.bring_up()
    assert bench.link.receive(1, 50.0) is None
    bench.clock.now_s += SILENCE_S + 0.01
    assert bench.link.receive(2, 50.0) is None
    assert not bench.link.is_up
    assert bench.counters.num_breaker_openings == 1
    bench.heard()
    bench.link.poll()
    assert bench.heard() == [], "no probe before its time"
    bench.clock.now_s += 0.3
    bench.link.poll()
    (hello,) = bench.heard()
    assert isinstance(hello, messages.Hello)
    bench.say(batch(1))
    bench.say(messages.Ready(hello.session, 64, 10, 4))
    bench.link.poll()
    assert bench.link.is_up
    assert bench.link.generation == 2, "a new generation: requests must be opened again"
    assert bench.process.num_kills == 0


def test_a_hung_server_is_killed_and_replaced() -> None:
    bench = Bench()
    bench.bring_up()
    bench.link.receive(1, 50.0)
    bench.clock.now_s += SILENCE_S + 0.01
    bench.link.receive(2, 50.0)
    bench.clock.now_s += HUNG_S + 0.01
    bench.link.poll()
    assert bench.process.num_kills == 1
    bench.bring_up()
    assert bench.process.num_starts == 2
    assert bench.link.generation == 2
    assert bench.counters.num_server_deaths == 1


def test_an_answer_that_came_while_the_engine_was_idle_counts() -> None:
    """Nobody polls an idle line: neither a slow start nor a long silence is held against a server that has answered by now."""
    bench = Bench()
    bench.link.poll()
    (hello,) = bench.heard()
    assert isinstance(hello, messages.Hello)
    bench.say(messages.Ready(hello.session, 64, 10, 4))
    bench.clock.now_s += LONGEST_START_S + 1
    bench.link.poll()
    assert bench.link.is_up
    bench.link.receive(1, 50.0)
    bench.clock.now_s += SILENCE_S + 0.01
    bench.link.receive(2, 50.0)
    bench.clock.now_s += 1.0
    bench.link.poll()
    probe = bench.heard()[-1]
    assert isinstance(probe, messages.Hello)
    bench.say(messages.Ready(probe.session, 64, 10, 4))
    bench.clock.now_s += HUNG_S + 1
    bench.link.poll()
    assert bench.link.is_up
    assert (bench.process.num_kills, bench.link.generation) == (0, 2)


def test_a_dead_server_is_replaced_when_its_back_off_is_over() -> None:
    bench = Bench()
    bench.bring_up()
    bench.process.running = False
    bench.process.may_start = False
    bench.link.poll()
    assert not bench.link.is_up
    assert bench.link.receive(1, 50.0) is None
    assert bench.clock.now_s == 100.0, "the dead are not waited for"
    bench.process.may_start = True
    bench.bring_up()
    assert bench.link.generation == 2


def test_the_state_tells_alive_ready_and_silent_apart() -> None:
    def state(bench: Bench) -> str:
        bench.link.poll()
        return " ".join(name.removeprefix("is_") for name, is_so in bench.link.state().items() if is_so)

    bench = Bench()
    assert state(bench) == "", "it is being started"
    assert state(bench) == "alive", "it loads its model"
    bench.bring_up()
    assert state(bench) == "alive ready"
    bench.link.receive(1, 50.0)
    bench.clock.now_s += SILENCE_S + 0.01
    bench.link.receive(2, 50.0)
    assert state(bench) == "alive breaker_open"
    bench.process.running = bench.process.may_start = False
    assert state(bench) == ""
    assert set(LINK_GONE) == set(bench.link.state()) and not any(LINK_GONE.values())


def test_a_server_that_does_not_read_opens_the_breaker() -> None:
    bench = Bench()
    bench.bring_up()
    bench.channels[-1].blocks_sends = True
    assert not bench.link.send(messages.StepBegin([], ["a"]))
    assert not bench.link.is_up
    assert (bench.counters.num_send_failures, bench.counters.num_breaker_openings) == (1, 1)


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_connection_that_takes_nothing_any_more_is_replaced_if_its_server_forgets_the_old_one(
    is_shared: bool,
) -> None:
    bench = Bench(process=Process(is_shared=is_shared))
    bench.bring_up()
    bench.channels[-1].blocks_sends = True
    assert not bench.link.send(messages.StepBegin([], ["a"]))
    bench.clock.now_s += FIRST_PROBE_S + 0.01
    bench.link.poll()
    if not is_shared:
        assert len(bench.channels) == 1, "requests that are open on it would stay so for ever"
        return
    assert len(bench.channels) == 2
    (hello,) = bench.heard()
    assert isinstance(hello, messages.Hello)
    bench.say(messages.Ready(hello.session, 64, 10, 4))
    bench.link.poll()
    assert bench.link.is_up and bench.link.generation == 2
    assert (bench.process.num_starts, bench.process.num_kills, bench.counters.num_server_deaths) == (1, 0, 0)


def test_a_server_that_never_finishes_its_start_is_replaced() -> None:
    bench = Bench()
    bench.link.poll()
    bench.clock.now_s += LONGEST_START_S + 1
    bench.link.poll()
    assert bench.process.num_kills == 1
    bench.bring_up()
