"""The line to the draft server under every kind of failure, with a scripted server and a clock that stands still."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from vllm_specbranch import messages
from vllm_specbranch.back_off import HUNG_S
from vllm_specbranch.draft_link import FIRST_PROBE_S, LINK_GONE, SILENCE_S, DraftLink
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.placement import LONGEST_START_S
from vllm_specbranch.transport import ClientChannel, ServerEndpoint, memory_pair


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Process:
    """A server process that starts when asked and dies when told."""

    running: bool = False
    may_start: bool = True
    num_starts: int = 0
    num_kills: int = 0
    is_stopped: bool = False
    pid: int | None = None
    longest_start_s: float = LONGEST_START_S
    longest_silence_s: float = HUNG_S
    is_shared: bool = False
    refusals: list[bool] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"memory-{self.num_starts}"

    def is_running(self) -> bool:
        return self.running

    def ensure_running(self) -> bool:
        if self.running or not self.may_start:
            return False
        self.running = True
        self.num_starts += 1
        return True

    def kill(self) -> None:
        self.running = False
        self.num_kills += 1

    def refused(self, is_final: bool) -> None:
        self.running = False
        self.may_start = not is_final
        self.refusals.append(is_final)

    def stop(self) -> None:
        self.running = False
        self.is_stopped = True


@dataclass
class Waiting:
    """A channel whose blocking receive moves the clock instead of the world."""

    channel: ClientChannel
    clock: Clock
    blocks_sends: bool = False
    on_wait: Callable[[], None] | None = None

    @property
    def num_dropped(self) -> int:
        return self.channel.num_dropped

    def send(self, message: messages.EngineMessage) -> bool:
        return not self.blocks_sends and self.channel.send(message)

    def recv(self, timeout_ms: float) -> messages.ServerMessage | None:
        if self.on_wait is not None:
            self.on_wait()
        found = self.channel.recv(0.0)
        if found is None:
            self.clock.now_s += timeout_ms / 1e3
        return found

    def drain(self) -> None:
        self.channel.drain()

    def close(self) -> None:
        self.channel.close()


@dataclass
class Bench:
    wants_top_probs: bool = False
    terms: messages.Terms | None = None
    clock: Clock = field(default_factory=Clock)
    process: Process = field(default_factory=Process)
    counters: EngineCounters = field(default_factory=EngineCounters)
    endpoints: list[ServerEndpoint] = field(default_factory=list)
    channels: list[Waiting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.link = DraftLink(
            self.process,
            vocab_size=50,
            max_model_len=100,
            counters=self.counters,
            wants_top_probs=self.wants_top_probs,
            terms=self.terms,
            open_channel=self.open_channel,
            clock=self.clock,
        )

    def open_channel(self, address: str) -> ClientChannel:
        assert address == self.process.address
        client, endpoint = memory_pair()
        self.endpoints.append(endpoint)
        self.channels.append(Waiting(client, self.clock))
        return self.channels[-1]

    def heard(self) -> list[messages.EngineMessage]:
        found = []
        while (item := self.endpoints[-1].recv(0.0)) is not None:
            self.peer = item[0]
            found.append(item[1])
        return found

    def say(self, message: messages.ServerMessage) -> None:
        assert self.endpoints[-1].send(self.peer, message)

    def bring_up(self) -> None:
        self.link.poll()
        hello = self.heard()[-1]
        assert isinstance(hello, messages.Hello)
        self.say(messages.Ready(hello.session, 64, 10, 4))
        self.link.poll()
        assert self.link.is_up


def batch(number: int) -> messages.DraftBatch:
    return messages.DraftBatch(number, True, [], [])


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


def test_the_handshake_asks_for_top_probabilities_only_when_told_to() -> None:
    for wanted in (False, True):
        bench = Bench(wants_top_probs=wanted)
        bench.link.poll()
        (hello,) = bench.heard()
        assert isinstance(hello, messages.Hello) and hello.wants_top_probs is wanted
