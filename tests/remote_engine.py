"""A draft server in another process, over TCP with keys, and engines that use it: everything real but the model and vLLM."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.fake_draft_server import OFFER
from tests.fakes import FakeDraftModel
from vllm_specbranch.draft_link import DraftLink
from vllm_specbranch.keys import ClientKeys
from vllm_specbranch.messages import Commit, CommitBatch, Draft, Open, StepBegin, Terms
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.rates import MAX_MESSAGES_PER_S
from vllm_specbranch.remote_server import RemoteServer
from vllm_specbranch.transport import connect

REPOSITORY = Path(__file__).resolve().parents[1]
# Limits for a failing test; nothing here is measured.
SOON_S = 60.0
REPLY_TIMEOUT_MS = 2000.0
ANY_PORT = "tcp://127.0.0.1:0"
TERMS = Terms(OFFER.model_identity, OFFER.dtype, OFFER.num_speculative_tokens)


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

    def kill(self) -> None:
        """End the one that runs, if any."""
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGKILL)


class Engine:
    """What the proposer does with its line, for one greedy request whose target agrees with the draft model.

    Attributes:
        pause_s: between two steps.
    """

    pause_s = 0.002

    def __init__(
        self, address: str, keys: ClientKeys, terms: Terms = TERMS, vocab_size: int = 50, start: int = 0
    ) -> None:
        self.counters = EngineCounters()
        self._server = RemoteServer(address.split(","))
        self.link = DraftLink(
            self._server,
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

    @property
    def used(self) -> str | None:
        """The address of the server that drafts for it."""
        return self._server.address if self.link.is_up else None

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
            time.sleep(self.pause_s)

    def draft(self) -> None:
        """Go on until some more drafts were accepted."""
        wanted = self.num_accepted + 20
        self.run_until(lambda: self.num_accepted >= wanted)
