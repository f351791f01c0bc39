"""The fault driver without an engine: its lists of faults, that each is done and taken back, its streams and its waits."""

import asyncio
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.e2e.faults import (
    PROCESS_KINDS,
    RECOVERED_TOKENS,
    REMOTE_KINDS,
    Fault,
    Saboteur,
    Streams,
    Trial,
    is_draft_server,
    make_faults,
    summary_ms,
)
from tests.e2e.relay import Conditions, Relay, parse_place
from tests.unit.test_remote_link import Servers, keys, servers

__all__ = ["keys", "servers"]

SOON_S = 30.0


def test_a_list_is_its_seed_s_and_has_all_kinds() -> None:
    faults = make_faults(3, 40, REMOTE_KINDS, 2.0, 0.5)
    assert faults == make_faults(3, 40, REMOTE_KINDS, 2.0, 0.5) != make_faults(4, 40, REMOTE_KINDS, 2.0, 0.5)
    assert set(Counter(one.kind for one in faults).values()) == {4}
    assert all(one.seconds <= 2.0 for one in faults)
    assert faults[-1].is_awaited
    assert 5 < sum(one.is_awaited for one in faults) < 35
    assert all(one.is_awaited for one in make_faults(3, 9, PROCESS_KINDS, 2.0, 1.0))


@pytest.fixture
def relay(servers: Servers) -> Iterator[Relay]:
    with Relay(servers.address.removeprefix("tcp://")) as found:
        yield found


def greets(relay: Relay) -> bool:
    """Whether a draft server is there, and the way to it is free."""
    with socket.create_connection(parse_place(relay.address.removeprefix("tcp://")), SOON_S) as line:
        line.settimeout(1.0)
        try:
            return line.recv(1) == b"\xff"
        except OSError:
            return False


@pytest.mark.parametrize("kind", REMOTE_KINDS)
def test_each_fault_is_taken_back(kind: str, servers: Servers, relay: Relay) -> None:
    assert servers.process is not None
    pid = servers.process.pid
    for seed in range(2):
        assert Saboteur(servers, relay).do(Fault(kind, 0.0, 0.2, True, seed), None)
        until_s = time.monotonic() + SOON_S
        while not greets(relay):
            assert time.monotonic() < until_s
    assert (servers.process.pid != pid) == (kind in ("kill", "restart"))


def test_what_is_no_draft_server_of_ours_is_left_alone(servers: Servers) -> None:
    assert servers.process is not None
    assert is_draft_server(servers.process.pid)
    servers.end(signal.SIGKILL)
    assert not is_draft_server(servers.process.pid)
    assert not Saboteur().do(Fault("kill", 0.0, 0.2, True, 0), servers.process.pid)


def test_a_held_line_does_not_greet(relay: Relay) -> None:
    """Else the test above would say nothing."""
    relay.set(Conditions(is_held=True))
    assert not greets(relay)


class FakeEngine:
    """Two steps for each request; a proposer that is up again at the fourth look."""

    def __init__(self) -> None:
        self.num_looks = 0
        self.num_running = 0
        self.most_running = 0

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        for token in prompt["prompt_token_ids"]:
            await asyncio.sleep(0.001)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[token])])
        self.num_running -= 1

    async def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        assert method == "look_at_proposer"
        self.num_looks += 1
        is_up = self.num_looks > 3
        engine = {"num_accepted_tokens": RECOVERED_TOKENS * is_up}
        longest_s = {"propose": 0.1 * self.num_looks if self.num_looks < 3 else 0.0}
        return [{"is_up": is_up, "server_pid": 1, "longest_s": longest_s, "engine": engine}]


def test_streams_go_on_until_the_work_is_done_and_then_finish() -> None:
    engine = FakeEngine()
    streams = Streams(engine, [[1, 2], [3, 4]], None)
    asyncio.run(streams.run("faults", 4, asyncio.sleep(0.05)))
    assert engine.most_running == 4
    assert engine.num_running == 0
    assert len(streams.answers) > 4
    assert all(tokens == [[1, 2], [3, 4]][which] for which, tokens in streams.answers)
    assert len(streams.gaps_s["faults"]) == len(streams.answers)


def test_an_error_in_the_work_ends_the_run() -> None:
    async def fail() -> None:
        raise TimeoutError("never drafted again")

    with pytest.raises(TimeoutError, match="never"):
        asyncio.run(Streams(FakeEngine(), [[1, 2]], None).run("faults", 2, fail()))


def test_a_fault_is_reported_with_its_recovery_and_the_longest_times() -> None:
    done: list[str] = []

    def do(fault: Fault, pid: int) -> bool:
        done.append(fault.kind)
        return True

    saboteur = SimpleNamespace(do=do)
    trial = Trial(FakeEngine(), saboteur)  # type: ignore[arg-type]
    asyncio.run(trial.suffer([Fault("kill", 0.0, 0.0, True, 0)]))
    (report,) = trial.reports
    assert done == ["kill"] == [report["kind"]]
    assert report["recovery_s"] >= 0.1
    assert report["counted"] == {"num_accepted_tokens": RECOVERED_TOKENS}
    assert report["longest_s"] == {"propose": 0.2}, "of the looks since it began"


def test_a_fault_waits_for_a_draft_server_to_befall() -> None:
    outcomes = [True, False, False]
    saboteur = SimpleNamespace(do=lambda fault, pid: outcomes.pop())
    trial = Trial(FakeEngine(), saboteur)  # type: ignore[arg-type]
    asyncio.run(trial.suffer([Fault("kill", 0.0, 0.0, False, 0)]))
    assert not outcomes
    assert len(trial.reports) == 1


def test_gaps_are_summed_up() -> None:
    found = summary_ms([0.01, 0.02, 0.03])
    assert (found["count"], found["p50"], found["longest"]) == (3, pytest.approx(20.0), pytest.approx(30.0))
