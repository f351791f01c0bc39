"""A line with several draft servers to go to: which one it uses, when it leaves it, and that it never waits meanwhile.

In memory, on a clock that only receives move. Over real sockets: test_remote_link.
"""

from collections.abc import Callable

import pytest

from tests.link_bench import Clock, Waiting
from vllm_specbranch import messages
from vllm_specbranch.back_off import FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S
from vllm_specbranch.draft_link import SILENCE_S, DraftLink
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.remote_server import (
    LONGEST_HANDSHAKE_BESIDE_OTHERS_S,
    LONGEST_SILENCE_BESIDE_OTHERS_S,
    RemoteServer,
)
from vllm_specbranch.transport import ClientChannel, ServerEndpoint, memory_pair

A, B, C = ADDRESSES = ("tcp://a:1", "tcp://b:2", "tcp://c:3")


class Fleet:
    """Servers by address, each of which answers, refuses, or is silent; and an engine's line to them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.counters = EngineCounters()
        self.silent: set[str] = set()
        self.refusing: dict[str, bool] = {}
        self.greeted: list[str] = []
        self._ends: dict[str, list[ServerEndpoint]] = {address: [] for address in ADDRESSES}
        self.server = RemoteServer(ADDRESSES, clock=self.clock)
        self.link = DraftLink(
            self.server,
            vocab_size=50,
            max_model_len=100,
            counters=self.counters,
            open_channel=self._open,
            clock=self.clock,
        )

    def _open(self, address: str) -> ClientChannel:
        client, endpoint = memory_pair()
        self._ends[address].append(endpoint)
        return Waiting(client, self.clock, on_wait=self.serve)

    def serve(self) -> None:
        """Let every server answer what it has got."""
        for address, ends in self._ends.items():
            for end in ends:
                while (item := end.recv(0.0)) is not None:
                    peer, message = item
                    if isinstance(message, messages.Hello):
                        self.greeted.append(address)
                    if address in self.silent:
                        continue
                    if isinstance(message, messages.Hello) and address in self.refusing:
                        end.send(peer, messages.Refused(message.session, "no", self.refusing[address]))
                    elif isinstance(message, messages.Hello):
                        end.send(peer, messages.Ready(message.session, 64, 10, 4))
                    elif isinstance(message, messages.CommitBatch):
                        end.send(peer, messages.DraftBatch(message.round, True, [], []))

    def say(self, address: str, message: messages.ServerMessage) -> None:
        assert self._ends[address][-1].send(b"memory", message)

    def step(self, number: int = 1) -> messages.DraftBatch | None:
        """An engine step: look after the line, commit, collect."""
        self.link.poll()
        self.serve()
        self.link.send(messages.CommitBatch(number, 0.0, [], None))
        self.serve()
        return self.link.receive(number, 50.0)

    def step_until(self, condition: Callable[[], bool], step_s: float = 0.05, most: int = 2000) -> float:
        """Steps of so many seconds each, until the condition holds; returns how long that took."""
        started_s = self.clock.now_s
        for _ in range(most):
            if condition():
                return self.clock.now_s - started_s
            self.step()
            self.clock.now_s += step_s
        pytest.fail("never")

    @property
    def used(self) -> str | None:
        return self.server.address if self.link.is_up else None


@pytest.fixture
def fleet() -> Fleet:
    return Fleet()


def test_the_first_one_is_used_for_as_long_as_it_answers(fleet: Fleet) -> None:
    fleet.step_until(lambda: fleet.link.is_up)
    for number in range(200):
        assert fleet.step(number) is not None
        fleet.clock.now_s += 1.0
    assert fleet.greeted == [A]


def test_one_that_is_not_there_is_left_for_the_next(fleet: Fleet) -> None:
    fleet.silent = {A, B}
    taken_s = fleet.step_until(lambda: fleet.link.is_up)
    assert fleet.used == C
    assert taken_s < 2 * LONGEST_HANDSHAKE_BESIDE_OTHERS_S + 0.5
    assert fleet.link.generation == 1
    assert fleet.counters.num_reply_timeouts == 0, "nothing was waited for"


def test_the_start_of_an_engine_waits_for_the_first_that_answers(fleet: Fleet) -> None:
    fleet.silent, fleet.refusing = {A}, {B: True}
    fleet.link.poll()
    assert fleet.link.wait_until_up(60.0)
    assert fleet.used == C
    assert fleet.clock.now_s - 100.0 < LONGEST_HANDSHAKE_BESIDE_OTHERS_S + 1.0


def test_the_start_does_not_wait_for_ever_where_nobody_answers(fleet: Fleet) -> None:
    fleet.silent = set(ADDRESSES)
    assert not fleet.link.wait_until_up(2.0)
    assert fleet.clock.now_s - 100.0 < 2.5


def test_one_that_goes_silent_costs_one_timeout_and_is_left(fleet: Fleet) -> None:
    fleet.step_until(lambda: fleet.link.is_up)
    fleet.silent = {A}
    taken_s = fleet.step_until(lambda: fleet.used == B)
    assert taken_s < SILENCE_S + LONGEST_SILENCE_BESIDE_OTHERS_S + 0.5
    assert fleet.counters.num_reply_timeouts == 1
    assert fleet.link.generation == 2, "the requests are opened there from their history"
    assert fleet.step() is not None
    fleet.silent = {B}
    fleet.step_until(lambda: fleet.used == C)
    fleet.silent = {C}
    fleet.step_until(lambda: fleet.used == A)


@pytest.mark.parametrize("is_final", [False, True])
def test_one_that_refuses_is_left_for_the_next(fleet: Fleet, is_final: bool) -> None:
    fleet.refusing = {A: is_final, B: is_final}
    fleet.step_until(lambda: fleet.link.is_up)
    assert fleet.used == C
    assert fleet.greeted == [A, B, C]


def test_one_that_ends_is_left_at_once(fleet: Fleet) -> None:
    fleet.step_until(lambda: fleet.link.is_up)
    fleet.say(A, messages.Farewell("this draft server ends"))
    fleet.refusing = {A: False}
    taken_s = fleet.step_until(lambda: fleet.used == B, step_s=0.01)
    assert taken_s < LONGEST_SILENCE_BESIDE_OTHERS_S
    assert fleet.counters.num_reply_timeouts == 0


def test_one_that_lost_the_session_is_asked_for_another_before_others_are(fleet: Fleet) -> None:
    fleet.step_until(lambda: fleet.link.is_up)
    fleet.say(A, messages.Farewell("there is no session for this connection"))
    fleet.step()
    fleet.step_until(lambda: fleet.link.is_up, step_s=0.01)
    assert (fleet.used, fleet.greeted) == (A, [A, A])


def test_each_has_its_own_back_off(fleet: Fleet) -> None:
    """While none answers they are tried in turn, and less and less often; none is asked for anything in between."""
    fleet.silent = set(ADDRESSES)
    fleet.step_until(lambda: len(fleet.greeted) == 6)
    assert fleet.greeted == [A, B, C, A, B, C]
    fleet.step_until(lambda: len(fleet.greeted) == 15)
    started_s, count = fleet.clock.now_s, len(fleet.greeted)
    for _ in range(600):
        fleet.step()
        fleet.clock.now_s += 1.0
    per_minute = (len(fleet.greeted) - count) / ((fleet.clock.now_s - started_s) / 60)
    assert per_minute <= 3 * (60 / LONGEST_BACK_OFF_S) + 1
    assert fleet.counters.num_reply_timeouts == 0
    fleet.silent = {A, C}
    fleet.step_until(lambda: fleet.link.is_up, step_s=1.0)
    assert fleet.used == B


def test_one_that_failed_is_not_tried_before_its_back_off_is_over() -> None:
    clock = Clock()
    server = RemoteServer([A, B], clock=clock)
    used = []
    for _ in range(3):
        if server.ensure_running():
            used.append(server.address)
            server.kill()
    assert used == [A, B], "the third try comes later"
    clock.now_s += FIRST_BACK_OFF_S
    assert server.ensure_running()
    assert server.address == A
