"""The engine's line to its draft server: handshake, liveness, and never waiting for the dead.

Owns the channel and the state of the line. Knows neither vLLM nor torch. Runs in the target's worker (output rank).

    starting --Ready--> up --reply late--> up, but not waited for --nothing for SILENCE_S--> silent --Ready--> up
        ^                |                                                                     |
        +----------------+---------- dead, or silent for too long: given up, begun anew -------+

Every change to `up` starts a new generation: the server then knows no request, and the proposer opens them again.
"""

import itertools
import logging
import time
from collections.abc import Callable
from typing import Protocol

from vllm_specbranch import messages
from vllm_specbranch.back_off import HUNG_S
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.transport import ClientChannel, connect

logger = logging.getLogger("vllm.specbranch.draft_link")

# No message at all for this long while replies are due: the server hangs, stop sending to it.
SILENCE_S = 1.0
# How often the life of a server is checked while its reply is awaited.
PATIENT_WAIT_MS = 100.0
FIRST_PROBE_S = 0.25
LONGEST_PROBE_S = 4.0
# What `DraftLink.state` says of a line that is no more.
LINK_GONE = {"is_alive": False, "is_ready": False, "is_breaker_open": False}


class Server(Protocol):
    """Where a draft server is: a process to start (`placement.ServerProcess`), or addresses (`remote_server.RemoteServer`).

    Attributes:
        longest_start_s: a server that has not answered the handshake for so long is begun with anew.
        longest_silence_s: one that has been probed for so long since it went silent, likewise.
        is_shared: whether other engines use it as well. It then forgets connections that are gone, with what was open on them.
    """

    longest_start_s: float
    longest_silence_s: float
    is_shared: bool

    @property
    def address(self) -> str:
        """Where the newest one listens."""

    @property
    def pid(self) -> int | None:
        """Its process id, where that is known."""

    def is_running(self) -> bool:
        """Whether there may be somebody to talk to."""

    def ensure_running(self) -> bool:
        """Begin if it does not run and its back-off is over; whether it was begun now."""

    def kill(self) -> None:
        """Give up one that does not answer."""

    def refused(self, is_final: bool) -> None:
        """It does not draft for this engine: now, or ever."""

    def stop(self) -> None:
        """End for good. Safe to call again."""


class DraftLink:
    """One line to one draft server.

    Args:
        server: where the server is; not started yet.
        vocab_size, max_model_len, wants_top_probs, terms: what to say at a handshake, as in `messages.Hello`.
        counters: updated.
        open_channel: makes a channel to an address.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        server: Server,
        *,
        vocab_size: int,
        max_model_len: int,
        counters: EngineCounters,
        wants_top_probs: bool = False,
        terms: messages.Terms | None = None,
        open_channel: Callable[[str], ClientChannel] = connect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server = server
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._wants_top_probs = wants_top_probs
        self._terms = terms
        self._counters = counters
        self._open_channel = open_channel
        self._clock = clock
        self._channel: ClientChannel | None = None
        self._sessions = itertools.count(1)
        self._session = ""
        self._refusal: str | None = None
        self._is_late = False
        self._silent_since_s: float | None = None
        self._late_since_s = 0.0
        self._greeted_s = 0.0
        self._probe_s = FIRST_PROBE_S
        self._next_probe_s = 0.0
        self._is_alive = False
        self.is_up = False
        self.generation = 0
        self.draft_max_model_len = 0

    @property
    def server_pid(self) -> int | None:
        """Process id of the newest server."""
        return self._server.pid

    @property
    def num_malformed(self) -> int:
        """Undecodable messages on the present channel."""
        return self._channel.num_dropped if self._channel else 0

    def state(self) -> dict[str, bool]:
        """Whether there was a server at the last `poll`, whether it answers, and whether it has gone silent; for the metrics."""
        return {
            "is_alive": self._is_alive,
            "is_ready": self.is_up,
            "is_breaker_open": self._silent_since_s is not None,
        }

    def poll(self) -> None:
        """Look after the line: start or restart the server, shake hands, probe a silent one. Never waits."""
        self._is_alive = self._server.is_running()
        if self._is_alive:
            self._poll_running()
        if not self._server.is_running():
            self._lose_server()
            if self._server.ensure_running():
                self._greet_new_server()

    def _poll_running(self) -> None:
        if self.is_up:
            return
        # Before anything is concluded from silence: it may have answered while the engine had no steps to look.
        self._await_ready(0.0)
        if self.is_up or not self._server.is_running():
            return
        now_s = self._clock()
        if self._silent_since_s is None and now_s - self._greeted_s > self._server.longest_start_s:
            logger.warning(
                "The draft server has not come up for %.0f s and is begun with anew.", self._server.longest_start_s
            )
            self._server.kill()
            return
        if self._silent_since_s is not None:
            if now_s - self._silent_since_s > self._server.longest_silence_s:
                logger.warning(
                    "The draft server has not answered for %.2g s and is begun with anew.", now_s - self._silent_since_s
                )
                self._server.kill()
                return
            if now_s >= self._next_probe_s:
                self._probe_s = min(2 * self._probe_s, LONGEST_PROBE_S)
                self._next_probe_s = now_s + self._probe_s
                self._probe()

    def _lose_server(self) -> None:
        if self._channel is None:
            return
        self._counters.num_server_deaths += 1
        self._channel.close()
        self._channel = None
        self.is_up = False
        self._silent_since_s = None

    def _greet_new_server(self) -> None:
        self._counters.num_server_starts += 1
        self._channel = self._open_channel(self._server.address)
        self._silent_since_s = None
        self._greeted_s = self._clock()
        self._say_hello()

    def _probe(self) -> None:
        """Say hello to a silent server, over another connection if nothing more can be sent over the present one.

        Libzmq gives a connection up for good once garbage has come over it; and one that is full holds old news only. A server that
        is ours alone would keep for ever what is open on the old one: it is begun with anew in the end.
        """
        if self._say_hello() or not self._server.is_shared:
            return
        assert self._channel is not None
        self._channel.close()
        self._channel = self._open_channel(self._server.address)
        self._say_hello()

    def _say_hello(self) -> bool:
        assert self._channel is not None
        self._session = str(next(self._sessions))
        hello = messages.Hello(self._session, self._vocab_size, self._max_model_len, self._wants_top_probs, self._terms)
        return self._channel.send(hello)

    def _await_ready(self, timeout_ms: float) -> None:
        assert self._channel is not None
        until_s = self._clock() + timeout_ms / 1e3
        while True:
            message = self._channel.recv(max(0.0, 1e3 * (until_s - self._clock())))
            if message is None:
                return
            if isinstance(message, messages.Refused) and message.session == self._session:
                self._refuse(message)
                return
            if isinstance(message, messages.Ready) and message.session == self._session:
                self._become_up(message)
                return

    def _refuse(self, refusal: messages.Refused) -> None:
        if refusal.reason != self._refusal:
            logger.error(
                "The draft server refuses to work for this engine, which goes on without drafts: %s", refusal.reason
            )
        self._refusal = refusal.reason
        self._server.refused(refusal.is_final)

    def _become_up(self, ready: messages.Ready) -> None:
        if self.generation:
            logger.warning("The draft server is back; running requests are drafted for again.")
        self.is_up = True
        self._refusal = None
        self.generation += 1
        self.draft_max_model_len = ready.max_model_len
        self._is_late = False
        self._silent_since_s = None
        self._probe_s = FIRST_PROBE_S

    def wait_until_up(self, timeout_s: float) -> bool:
        """Wait for the handshake, while the engine starts; gives up when the server dies or refuses, and there is no other."""
        until_s = self._clock() + timeout_s
        while not self.is_up and self._clock() < until_s:
            self.poll()
            if not self._server.is_running():
                break
            if not self.is_up and self._channel is not None:
                self._await_ready(100.0)
        return self.is_up

    def send(self, message: messages.EngineMessage) -> bool:
        """Send to a server that is up; a send that would block means that it no longer reads."""
        if not self.is_up or self._channel is None:
            return False
        if self._channel.send(message):
            return True
        self._counters.num_send_failures += 1
        self._fall_silent()
        return False

    def receive(self, round_number: int, timeout_ms: float) -> messages.DraftBatch | None:
        """The reply to a commit batch; if it does not come in time, what was sent ahead of it, or None. Older replies are dropped.

        After one late reply nothing is waited for until the server has said something again, so that a hung server costs
        the engine one timeout, not one per step.
        """
        if not self.is_up or self._channel is None:
            return None
        started_s = self._clock()
        ahead: messages.DraftBatch | None = None
        while True:
            until_s = started_s + (0.0 if self._is_late else timeout_ms / 1e3)
            message = self._channel.recv(max(0.0, 1e3 * (until_s - self._clock())))
            if message is None:
                if ahead is None:
                    self._be_late()
                else:
                    self._counters.num_reply_timeouts += 1
                return ahead
            self._is_late = False
            if isinstance(message, messages.DraftBatch):
                if message.round == round_number and message.is_final:
                    return message
                if message.round == round_number:
                    ahead = message
                else:
                    self._counters.num_late_replies += message.is_final
            elif isinstance(message, messages.Farewell):
                self._end_session(message.reason)
                return ahead
            elif isinstance(message, messages.Failure):
                logger.warning("The draft server could not take a message: %s", message.reason)

    def receive_patiently(self, round_number: int) -> messages.DraftBatch | None:
        """The reply to a commit batch, however long it takes; None once the server is declared dead (`HUNG_S`)."""
        until_s = self._clock() + HUNG_S
        while self.is_up and self._channel is not None and self._clock() < until_s:
            message = self._channel.recv(PATIENT_WAIT_MS)
            if isinstance(message, messages.Failure):
                logger.warning("The draft server could not take a message: %s", message.reason)
                return None
            if isinstance(message, messages.Farewell):
                self._end_session(message.reason)
                return None
            if isinstance(message, messages.DraftBatch) and message.round == round_number and message.is_final:
                return message
            if message is None and not self._server.is_running():
                return None
        if self.is_up:
            self._counters.num_reply_timeouts += 1
            self._fall_silent()
        return None

    def _be_late(self) -> None:
        now_s = self._clock()
        if not self._is_late:
            self._counters.num_reply_timeouts += 1
            self._is_late = True
            self._late_since_s = now_s
        if now_s - self._late_since_s > SILENCE_S:
            self._fall_silent()

    def _fall_silent(self) -> None:
        now_s = self._clock()
        logger.warning("The draft server does not answer; requests go on without drafts until it does.")
        self._counters.num_breaker_openings += 1
        self.is_up = False
        self._silent_since_s = now_s
        self._next_probe_s = now_s + self._probe_s

    def _end_session(self, reason: str) -> None:
        """The server knows this engine no more: ask it for a new session at the next step."""
        logger.warning("The draft server has ended the session (%s); requests go on without drafts meanwhile.", reason)
        self.is_up = False
        self._silent_since_s = self._next_probe_s = self._clock()

    def query_status(self, timeout_s: float) -> messages.Status | None:
        """Ask the server for its state; for status reports, not for the hot path."""
        if not self.is_up or self._channel is None:
            return None
        query = next(self._sessions)
        if not self._channel.send(messages.StatusQuery(query)):
            return None
        until_s = self._clock() + timeout_s
        while (left_s := until_s - self._clock()) > 0:
            message = self._channel.recv(1e3 * left_s)
            if isinstance(message, messages.Status) and message.query == query:
                return message
            if isinstance(message, messages.Farewell):
                self._end_session(message.reason)
                break
        return None

    def close(self) -> None:
        """End the line and the server. Safe to call again."""
        self.is_up = False
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._server.stop()
