"""The engine's line to a draft server in another process, over TCP with keys: everything real but the model and vLLM."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.fake_draft_server import OFFER
from tests.fakes import FakeDraftModel
from vllm_specbranch import messages
from vllm_specbranch.draft_link import DraftLink
from vllm_specbranch.keys import CLIENT_PUBLIC, CLIENTS, ClientKeys, load_client_keys, load_server_keys, make_keys
from vllm_specbranch.messages import Commit, CommitBatch, Draft, Open, StepBegin, Terms
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.rates import MAX_MESSAGES_PER_S
from vllm_specbranch.remote_server import RemoteServer
from vllm_specbranch.transport import connect

REPOSITORY = Path(__file__).resolve().parents[2]
# Limits for a failing test; nothing here is measured.
SOON_S = 60.0
REPLY_TIMEOUT_MS = 2000.0
ANY_PORT = "tcp://127.0.0.1:0"
TERMS = Terms(OFFER.model_identity, OFFER.dtype, OFFER.num_speculative_tokens)

pytestmark = pytest.mark.timeout(240)


class Servers:
    """Starts draft servers, one after the other at the same address."""

    def __init__(self, keys: Path) -> None:
        self._keys = keys
        self.address = ANY_PORT
        self.process: subprocess.Popen[str] | None = None

    def start(self, messages_per_s: float = MAX_MESSAGES_PER_S) -> str:
        words = [self.address, str(self._keys), str(messages_per_s)]
        command = [sys.executable, "-m", "tests.fake_draft_server", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        assert self.process.stdout is not None
        word, self.address = self.process.stdout.readline().split()
        assert word == "ready"
        return self.address

    def end(self, number: int) -> int:
        """Send a signal; returns the exit status."""
        assert self.process is not None and self.process.stdout is not None
        os.kill(self.process.pid, number)
        status = self.process.wait(SOON_S)
        self.process.stdout.close()
        return status


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder)
    return folder


@pytest.fixture
def servers(keys: Path) -> Iterator[Servers]:
    found = Servers(keys)
    found.start()
    yield found
    if found.process is not None and found.process.poll() is None:
        found.end(signal.SIGKILL)


class Engine:
    """What the proposer does with its line, for one greedy request whose target agrees with the draft model."""

    def __init__(
        self, address: str, keys: ClientKeys, terms: Terms = TERMS, vocab_size: int = 50, start: int = 0
    ) -> None:
        self.counters = EngineCounters()
        self.link = DraftLink(
            RemoteServer(address),
            vocab_size=vocab_size,
            max_model_len=1000,
            counters=self.counters,
            terms=terms,
            open_channel=partial(connect, security=keys),
        )
        self.model = FakeDraftModel(1, 1)
        self.tokens = [start, start + 1, start + 2]
        self.num_accepted = 0
        self._draft: list[int] = []
        self._generation = 0
        self._is_known = False
        self._round = 0

    def step(self) -> Draft | None:
        """One engine step: verify what was drafted, commit, collect the next draft."""
        self.link.poll()
        if self.link.generation != self._generation:
            self._generation, self._is_known = self.link.generation, False
        outcome = [*self._draft, *self.model.chain(self.tokens + self._draft, 1)]
        position = len(self.tokens)
        self.tokens += outcome
        self.num_accepted += len(self._draft)
        num_draft_tokens, self._draft = len(self._draft), []
        if not self._is_known:
            self._is_known = self.link.send(StepBegin([Open("a", self.tokens, None)], []))
            return None
        self._round += 1
        commit = Commit("a", position, outcome, num_draft_tokens, None)
        if not self.link.send(CommitBatch(self._round, 100.0, [commit], None)):
            return None
        reply = self.link.receive(self._round, REPLY_TIMEOUT_MS)
        if reply is None:
            return None
        if reply.unknown:
            self._is_known = False
            return None
        (draft,) = reply.drafts
        assert draft.position == len(self.tokens)
        assert draft.tokens == self.model.chain(self.tokens, len(draft.tokens)), "drafts are of this engine's request"
        self._draft = draft.tokens
        return draft

    def run_until(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + SOON_S
        while not condition():
            assert time.monotonic() < until
            self.step()
            time.sleep(0.002)

    def draft(self) -> None:
        """Go on until some more drafts were accepted."""
        wanted = self.num_accepted + 20
        self.run_until(lambda: self.num_accepted >= wanted)


@pytest.fixture
def engine(servers: Servers, keys: Path) -> Iterator[Engine]:
    found = Engine(servers.address, load_client_keys(keys))
    yield found
    found.link.close()


def test_two_engines_with_the_same_request_id_share_a_server(servers: Servers, engine: Engine, keys: Path) -> None:
    other = Engine(servers.address, load_client_keys(keys), start=20)
    try:
        for _ in range(3):
            engine.draft()
            other.draft()
    finally:
        other.link.close()


def test_a_killed_server_is_found_again_and_requests_are_opened_from_their_history(
    servers: Servers, engine: Engine
) -> None:
    engine.draft()
    address = servers.address
    for life in range(2, 4):
        assert servers.end(signal.SIGKILL) == -signal.SIGKILL
        engine.run_until(lambda: not engine.link.is_up)
        num_tokens, num_accepted = len(engine.tokens), engine.num_accepted
        for _ in range(50):
            engine.step()
        assert len(engine.tokens) == num_tokens + 50, "plain decoding: one token a step"
        assert engine.num_accepted == num_accepted
        assert servers.start() == address
        engine.draft()
        assert engine.link.generation >= life
    assert engine.counters.num_breaker_openings >= 2


def test_a_server_that_hangs_is_not_waited_for_and_used_again_when_it_moves(servers: Servers, engine: Engine) -> None:
    engine.draft()
    assert servers.process is not None
    os.kill(servers.process.pid, signal.SIGSTOP)
    try:
        engine.run_until(lambda: not engine.link.is_up)
    finally:
        os.kill(servers.process.pid, signal.SIGCONT)
    engine.draft()
    assert engine.link.generation == 2


def test_a_server_that_is_told_to_end_takes_leave(servers: Servers, engine: Engine, caplog: object) -> None:
    """No reply times out: the engine knows at once. The next server, perhaps with another model's weights, is found."""
    engine.draft()
    assert servers.end(signal.SIGTERM) == 0
    engine.run_until(lambda: not engine.link.is_up)
    assert engine.counters.num_reply_timeouts == 0
    assert engine.counters.num_breaker_openings == 0
    servers.start()
    engine.draft()


@pytest.mark.parametrize(
    ("vocab_size", "terms", "reason"),
    [(51, TERMS, "vocabulary has 51 tokens"), (50, Terms("another", "float32", 4), "another draft model")],
)
def test_an_engine_that_does_not_fit_is_refused_with_the_reason(
    servers: Servers,
    engine: Engine,
    keys: Path,
    vocab_size: int,
    terms: Terms,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = Engine(servers.address, load_client_keys(keys), terms, vocab_size)
    try:
        other.link.poll()
        assert not other.link.wait_until_up(SOON_S)
        assert sum(reason in record.message for record in caplog.records) == 1
        for _ in range(20):
            other.step()
        assert other.num_accepted == 0
    finally:
        other.link.close()
    engine.draft()


def test_an_engine_with_an_unknown_key_decodes_without_drafts(
    servers: Servers, engine: Engine, keys: Path, tmp_path: Path
) -> None:
    make_keys(tmp_path / "other")
    stranger = replace(load_client_keys(tmp_path / "other"), server=load_server_keys(keys).public)
    other = Engine(servers.address, stranger)
    try:
        for _ in range(100):
            other.step()
            time.sleep(0.002)
        assert len(other.tokens) == 103
        assert not other.link.is_up
    finally:
        other.link.close()
    engine.draft()


def flood(address: str, keys: ClientKeys, stop: threading.Event) -> None:
    """A known engine gone wrong: many requests, garbage as fast as it is taken, and no reply is ever read."""
    channel = connect(address, keys)
    channel.send(messages.Hello("hostile", 50, 1000, False, TERMS))
    opens = [Open(f"request {number}", list(range(20)), None) for number in range(1000)]
    commits = [Commit(one.request_id, 20, [1], 0, None) for one in opens]
    channel.send(StepBegin(opens[:100], []))
    number = 0
    while not stop.is_set():
        number += 1
        if number % 20 == 0:
            time.sleep(0.001)  # Ten times too fast is enough; the processor is the test's as well.
        if number % 1000 == 0:
            channel.send(CommitBatch(number, 0.0, commits[:100], None))
        if not channel._link.send([b"garbage"]):  # type: ignore[attr-defined]
            time.sleep(0.001)
    channel.close()


def test_an_engine_gone_wrong_does_not_stop_the_others(
    keys: Path, servers: Servers, engine: Engine, tmp_path: Path
) -> None:
    make_keys(tmp_path / "other")
    hostile = replace(load_client_keys(tmp_path / "other"), server=load_server_keys(keys).public)
    (keys / CLIENTS / "hostile.key").write_bytes((tmp_path / "other" / CLIENT_PUBLIC).read_bytes())
    # A rate that a busy machine's flood exceeds too.
    servers.end(signal.SIGKILL)
    servers.start(messages_per_s=1200.0)
    engine.draft()
    stop = threading.Event()
    thread = threading.Thread(target=flood, args=(servers.address, hostile, stop))
    thread.start()
    try:
        for _ in range(5):
            engine.draft()
        engine.run_until(lambda: flooded(engine))
        engine.draft()
    finally:
        stop.set()
        thread.join()


def flooded(engine: Engine) -> bool:
    """Whether the server has dropped messages unread; asked for between two rounds."""
    status = engine.link.query_status(SOON_S)
    # None while the line is down, which a busy machine can make it be.
    return status is not None and min(status.counters[f"num_{kind}_messages"] for kind in ("flood", "malformed")) > 0


def test_an_engine_starts_without_its_server_and_finds_it_later(keys: Path, servers: Servers) -> None:
    servers.end(signal.SIGKILL)
    engine = Engine(servers.address, load_client_keys(keys))
    try:
        for _ in range(20):
            engine.step()
        assert not engine.link.is_up
        servers.start()
        engine.draft()
        assert isinstance(engine.link.query_status(SOON_S), messages.Status)
    finally:
        engine.link.close()
