"""Faults on the draft side of a running engine, drawn from a seed; the engine streams all the while.

Run by the `run_engine` fixture as `python -m tests.e2e.faults OUT`. One engine (`AsyncLLM`), with the draft server as its child, or
on its own behind a relay. Streams are kept going: for a while without faults, then while the faults happen one after the other, and
at the end again without. Written: all answers, every fault with the time until drafts were accepted again and the longest times in
the proposer, the gaps between the outputs of a stream in each phase.
"""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from tests.e2e.relay import Conditions, Relay, Side
from tests.e2e.standalone_server import StandaloneServer
from vllm_specbranch.draft_sessions import LEASE_S
from vllm_specbranch.report import percentile

PROCESS_KINDS = ("kill", "stop", "slow")
# What a draft server of its own, and the way to it, can suffer besides.
REMOTE_KINDS = (*PROCESS_KINDS, "restart", "cut", "hold", "late", "thin", "garbage", "flip")
# A hung server is given up after 10 s, and what fails again and again is tried again after up to 30 s. A trial that a fault has
# spoiled may say that drafts cost more than they save: then there are none for some 700 rounds.
RECOVERY_TIMEOUT_S = 240.0
# So many accepted tokens more: it drafts again.
RECOVERED_TOKENS = 8
END_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Fault:
    """What is to happen.

    Attributes:
        pause_s: before it.
        seconds: how long it lasts, where that makes sense.
        is_awaited: whether the next one waits until drafts are accepted again.
        seed: of what else is random in it.
    """

    kind: str
    pause_s: float
    seconds: float
    is_awaited: bool
    seed: int


def make_faults(seed: int, count: int, kinds: Sequence[str], longest_s: float, share_awaited: float) -> list[Fault]:
    """Draw faults; every kind comes up about as often as the others.

    Args:
        seed: of everything.
        count: how many.
        kinds: of them.
        longest_s: of those that last.
        share_awaited: how many of them the next one waits for; the last one is.
    """
    rng = random.Random(seed)
    bag = [kind for _ in range(-(-count // len(kinds))) for kind in rng.sample(kinds, len(kinds))]
    return [
        Fault(
            kind=kind,
            pause_s=rng.uniform(0.1, 1.0),
            seconds=rng.uniform(0.3, longest_s),
            is_awaited=number == count - 1 or rng.random() < share_awaited,
            seed=rng.randrange(1 << 30),
        )
        for number, kind in enumerate(bag[:count])
    ]


def is_draft_server(pid: int) -> bool:
    """Whether a draft server of ours has this process id, and not somebody else by now."""
    try:
        return "draft" in " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False


class DraftServer(Protocol):
    """A draft server of its own, as the faults see it."""

    @property
    def process(self) -> Any:
        """Its `subprocess.Popen`."""

    def start(self) -> object:
        """Start it again at the same address; returns when it is ready."""


class Saboteur:
    """Does what a fault says, and takes it back: when a call returns, the draft side could work again. Its calls wait.

    Args:
        server, relay: a draft server of its own and the way to it; None where the draft server is the engine's child.
    """

    def __init__(self, server: DraftServer | None = None, relay: Relay | None = None) -> None:
        self._server = server
        self._relay = relay

    def do(self, fault: Fault, pid: int | None) -> bool:
        """Do it, if there is a draft server: the fault before may have ended it, and its successor not be there yet.

        Args:
            pid: of the draft server, where it is the engine's child.
        """
        if self._server is not None:
            pid = self._server.process.pid
        if pid is None or not is_draft_server(pid):
            return False
        rng = random.Random(fault.seed)
        deeds: dict[str, Callable[[], None]] = {
            "kill": lambda: self._kill(pid),
            "stop": lambda: self._stop(pid, fault.seconds),
            "slow": lambda: self._slow(pid, fault.seconds),
            "restart": self._restart,
            "cut": lambda: self._cut(fault.seconds * rng.randrange(2)),
            "hold": lambda: self._spoil(Conditions(is_held=True), fault.seconds),
            "late": lambda: self._spoil(Conditions(delay_s=rng.uniform(0.02, 0.4)), fault.seconds),
            "thin": lambda: self._spoil(Conditions(bytes_per_s=rng.uniform(500, 10_000)), fault.seconds),
            "garbage": lambda: self._garbage(rng),
            "flip": lambda: self._spoil(Conditions(flip_share=rng.uniform(0.02, 0.5)), fault.seconds),
        }
        deeds[fault.kind]()
        return True

    def _kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        if self._server is not None:
            self._server.process.wait(END_TIMEOUT_S)
            self._server.start()

    def _stop(self, pid: int, seconds: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        # A child that hangs for too long is killed by its engine.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _slow(self, pid: int, seconds: float) -> None:
        """A sixth of the time is left to it."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self._stop(pid, 0.1)
            time.sleep(0.02)

    def _restart(self) -> None:
        assert self._server is not None
        os.kill(self._server.process.pid, signal.SIGTERM)
        status = self._server.process.wait(END_TIMEOUT_S)
        assert status == 0, f"the draft server ended with status {status} on SIGTERM"
        self._server.start()

    def _cut(self, seconds: float) -> None:
        assert self._relay is not None
        self._relay.set(Conditions(is_refusing=seconds > 0))
        self._relay.cut()
        time.sleep(seconds)
        self._relay.set(Conditions())

    def _spoil(self, conditions: Conditions, seconds: float) -> None:
        assert self._relay is not None
        self._relay.set(conditions)
        time.sleep(seconds)
        self._relay.set(Conditions())

    def _garbage(self, rng: random.Random) -> None:
        assert self._relay is not None
        to: Side = rng.choice(("server", "client"))
        for _ in range(rng.randint(1, 3)):
            data = rng.randbytes(rng.choice((1, 9, 100, 2000)))
            if rng.random() < 0.5:
                # A whole frame of the transport's, so that it gets as far as the decoder of messages where there are no keys.
                data = data[:255]
                data = bytes([0, len(data)]) + data
            self._relay.inject(data, to)
            time.sleep(0.05)


@dataclass
class Streams:
    """Keeps requests going, each slot one after the other.

    Attributes:
        params: how to sample, and that outputs come as they are made.
        answers: (number of the prompt, token ids) of each finished request.
        gaps_s: by phase, the times between two outputs of a stream.
    """

    engine: Any
    prompts: list[list[int]]
    params: Any
    answers: list[tuple[int, list[int]]] = field(default_factory=list)
    gaps_s: dict[str, list[float]] = field(default_factory=dict)
    phase: str = ""
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    async def run(self, phase: str, num_streams: int, work: Coroutine[Any, Any, Any]) -> None:
        """Stream until some other work is done, and what has begun by then is finished."""
        self.phase = phase
        self.gaps_s.setdefault(phase, [])
        other = asyncio.ensure_future(work)
        try:
            await asyncio.gather(*(self._stream_until(other) for _ in range(num_streams)))
        finally:
            other.cancel()
        await other

    async def _stream_until(self, other: "asyncio.Future[Any]") -> None:
        while not other.done():
            await self._stream(next(self._numbers))

    async def _stream(self, number: int) -> None:
        which = number % len(self.prompts)
        token_ids: list[int] = []
        last_s: float | None = None
        prompt = {"prompt_token_ids": self.prompts[which]}
        async for output in self.engine.generate(prompt, self.params, f"stream-{number}"):
            now_s = time.perf_counter()
            token_ids += output.outputs[0].token_ids
            if last_s is not None:
                self.gaps_s[self.phase].append(now_s - last_s)
            last_s = now_s
        self.answers.append((which, token_ids))


class Trial:
    """The faults of one engine, one after the other, and what came of each."""

    def __init__(self, engine: Any, saboteur: Saboteur) -> None:
        self._engine = engine
        self._saboteur = saboteur
        self._longest_s: dict[str, float] = {}
        self.reports: list[dict[str, Any]] = []

    async def look(self) -> dict[str, Any]:
        """How the proposer stands. Mutates: the longest times in it."""
        (found,) = await self._engine.collective_rpc("look_at_proposer")
        for name, seconds in found["longest_s"].items():
            self._longest_s[name] = max(self._longest_s.get(name, 0.0), seconds)
        return dict(found)

    async def suffer(self, faults: Sequence[Fault]) -> None:
        """All of them."""
        for fault in faults:
            await asyncio.sleep(fault.pause_s)
            before, lasted_s = await self._inflict(fault)
            recovery_s = await self.recover() if fault.is_awaited else None
            after = await self.look()
            counted = {name: after["engine"][name] - count for name, count in before["engine"].items()}
            report = {"lasted_s": lasted_s, "recovery_s": recovery_s, "longest_s": self._longest_s, "counted": counted}
            self.reports.append(asdict(fault) | report)

    async def _inflict(self, fault: Fault) -> tuple[dict[str, Any], float]:
        """(how the proposer stood before, how many seconds it took); a draft server that is on its way is waited for."""
        until_s = time.monotonic() + RECOVERY_TIMEOUT_S
        while True:
            before = await self.look()
            self._longest_s = {}
            started_s = time.monotonic()
            if await asyncio.to_thread(self._saboteur.do, fault, before["server_pid"]):
                return before, time.monotonic() - started_s
            if time.monotonic() > until_s:
                raise TimeoutError(f"no draft server for {RECOVERY_TIMEOUT_S} s: {before}")
            await asyncio.sleep(0.1)

    async def recover(self) -> float:
        """Wait until drafts are accepted again; returns how many seconds that took.

        Raises:
            TimeoutError: it took too long.
        """
        started_s = time.monotonic()
        found = await self.look()
        wanted = found["engine"]["num_accepted_tokens"] + RECOVERED_TOKENS
        while not found["is_up"] or found["engine"]["num_accepted_tokens"] < wanted:
            if time.monotonic() > started_s + RECOVERY_TIMEOUT_S:
                raise TimeoutError(f"no drafts were accepted for {RECOVERY_TIMEOUT_S} s: {found}")
            await asyncio.sleep(0.1)
            found = await self.look()
        return time.monotonic() - started_s


async def run(engine_settings: dict[str, Any], job: dict[str, Any], saboteur: Saboteur) -> dict[str, Any]:
    """One engine through all phases; returns what is written."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(
        temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_settings))
    try:
        await engine.collective_rpc("watch_proposer")
        await engine.collective_rpc("slow_target_down", args=(job["slow_down_s"],))
        trial = Trial(engine, saboteur)
        streams = Streams(engine, job["prompts"], params)
        await streams.run("warming up", job["num_streams"], trial.recover())
        await streams.run("without faults", job["num_streams"], asyncio.sleep(job["calm_s"]))
        faults = make_faults(job["seed"], job["num_faults"], job["kinds"], job["longest_s"], job["share_awaited"])
        started_s = time.monotonic()
        await streams.run("with faults", job["num_streams"], trial.suffer(faults))
        seconds = time.monotonic() - started_s
        await streams.run("afterwards", job["num_streams"], trial.recover())
        return {
            "answers": streams.answers,
            "gaps_ms": {phase: summary_ms(gaps) for phase, gaps in streams.gaps_s.items()},
            "faults": trial.reports,
            "faults_s": seconds,
            "status": await settled_status(engine),
        }
    finally:
        engine.shutdown()


async def settled_status(engine: Any) -> dict[str, Any]:
    """The worker's report, once the draft server knows that the last request is gone.

    What was open on a connection that a fault has ended is closed with the lease of that session.
    """
    until_s = time.monotonic() + LEASE_S + 10.0
    while True:
        (status,) = await engine.collective_rpc("specbranch_status")
        if status["num_requests"] == 0 or time.monotonic() > until_s:
            return dict(status)
        await asyncio.sleep(0.1)


def summary_ms(gaps_s: Sequence[float]) -> dict[str, float]:
    """Of the times between two outputs of a stream."""
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
    return {"count": len(gaps_s)} | {name: 1e3 * percentile(gaps_s, share) for name, share in shares.items()}


def main() -> None:
    spec = json.load(sys.stdin)
    (job,) = spec["jobs"]
    settings: dict[str, Any] = spec["engine"] | {"worker_extension_cls": "tests.e2e.fault_worker.FaultWorker"}
    with contextlib.ExitStack() as stack:
        saboteur = Saboteur()
        if job["is_remote"]:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            # It loads beside the engine.
            server = StandaloneServer(folder, insecure=job["is_insecure"])
            stack.callback(server.end)
            relay = stack.enter_context(Relay(server.address.removeprefix("tcp://"), seed=job["seed"]))
            settings["speculative_config"] |= {"draft_placement": relay.address, "draft_keys": server.keys}
            saboteur = Saboteur(server, relay)
        result = asyncio.run(run(settings, job, saboteur))
        if job["is_remote"]:
            result["server_log"] = server.all_logs
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
