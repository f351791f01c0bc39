"""The loop of a draft server: messages in, replies out, and drafting in between. The only place where it waits.

Owns the two threads of the process. Forwards run on the calling thread, the one that loaded the model; messages, trees and replies
belong to a second one, which goes on working while a forward is under way. So a reply never waits for a draft step that has just
begun, which at the pace of a large draft model is several milliseconds. Runs in the draft server process.

    server thread   recv, handle, send .. begin_step ---- recv, handle, send ---- finish_step, send .. begin_step
    calling thread                              [ forward on the draft device ]                              [ ...
"""

import contextlib
import logging
import os
import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from vllm_specbranch import messages
from vllm_specbranch.draft_server import DraftServer, Reply
from vllm_specbranch.draft_steps import Batch
from vllm_specbranch.errors import WireError
from vllm_specbranch.message_turns import MessageTurns
from vllm_specbranch.token_tree import Candidates
from vllm_specbranch.transport import ServerEndpoint

logger = logging.getLogger("vllm.specbranch.draft_loop")

IDLE_WAIT_MS = 500.0
# How long messages are received before one is handled, and handled before drafting goes on: no flood keeps the server from work.
RECEIVE_S = 0.002
TURN_S = 0.005
# Of so many engines it is measured how long their answers take; one that went in the middle of a round would stay for ever.
MAX_TIMED = 1024
# A forward that takes this long never ends: the device hangs. What has been silent for so long is killed by the engine as well.
LONGEST_FORWARD_S = 10.0
# Exit status of a process whose forward hangs; its supervisor starts another.
EXIT_HUNG = 70


def end_process() -> None:
    """End this process at once: a thread that hangs in a forward cannot be ended by itself."""
    logger.error("A forward of the draft model has not ended for %.0f s; the draft server ends.", LONGEST_FORWARD_S)
    os._exit(EXIT_HUNG)


def serve(server: DraftServer, endpoint: ServerEndpoint, on_hang: Callable[[], None] = end_process) -> None:
    """Answer messages and draft in between, until told to shut down.

    Blocks while there is nothing to draft.

    Args:
        on_hang: called when a forward does not end.
    """
    if not server.takes_messages_in_flight:
        _serve_by_turns(server, _Post(server, endpoint))
        return
    forwards = _Forwards(server)
    with contextlib.closing(forwards), ThreadPoolExecutor(1, "server") as pool:
        endpoint.watch(forwards.done_fd)
        served = pool.submit(_serve_in_flight, server, _Post(server, endpoint), forwards, on_hang)
        forwards.run()
        served.result()


class _Forwards:
    """Hands batches from the server thread to the calling one, and the predictions back."""

    def __init__(self, server: DraftServer) -> None:
        self._server = server
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Candidates]] = queue.SimpleQueue()
        # Readable from the end of a forward until its result is taken: what the server thread polls beside its socket.
        self.done_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.is_over = False

    def run(self) -> None:
        """Run forwards until `stop`; raises what a forward raises."""
        try:
            while (batch := self._batches.get()) is not None:
                self._results.put(self._server.run_forward(batch))
                os.eventfd_write(self.done_fd, 1)
        finally:
            self.is_over = True
            os.eventfd_write(self.done_fd, 1)

    def start(self, batch: Batch) -> None:
        """Let a forward begin."""
        self._batches.put(batch)

    def stop(self) -> None:
        """End `run`, once what was started is done."""
        self._batches.put(None)

    def take(self) -> list[Candidates] | None:
        """What the forward that was started last predicts; None while it is under way."""
        try:
            os.eventfd_read(self.done_fd)
        except BlockingIOError:
            return None
        # It was put there before the descriptor became readable. None is there when a forward has failed.
        return None if self.is_over else self._results.get()

    def close(self) -> None:
        """Let go of the descriptor."""
        os.close(self.done_fd)


def _serve_in_flight(server: DraftServer, post: "_Post", forwards: _Forwards, on_hang: Callable[[], None]) -> None:
    """The server thread."""
    try:
        while not server.is_stopping:
            batch = server.begin_step()
            if batch is None:
                # A reply that still waits is looked at again soon, even when nothing could be fed for want of blocks.
                post.send(server.replies_due())
                post.take_in(0.0 if server.has_pending else IDLE_WAIT_MS)
                continue
            forwards.start(batch)
            hangs_at_s = time.monotonic() + LONGEST_FORWARD_S
            while (candidates := forwards.take()) is None:
                if forwards.is_over:
                    return
                if time.monotonic() > hangs_at_s:
                    on_hang()
                    return
                post.take_in(server.longest_pause_ms(IDLE_WAIT_MS))
                # What waits to grow is answered when its time is over, whatever the forward does.
                post.send(server.replies_due())
            post.send(server.finish_step(batch, candidates))
            post.take_in(0.0)
    finally:
        forwards.stop()


def _serve_by_turns(server: DraftServer, post: "_Post") -> None:
    """One thread: messages between draft steps only, for servers whose drafts must not depend on when a message comes."""
    worked = False
    while not server.is_stopping:
        post.take_in(0.0 if worked else IDLE_WAIT_MS)
        replies, worked = server.step()
        post.send(replies)


class _Post:
    """What comes in and what goes out, whose turn it is, and how long the engines wait for it in between."""

    def __init__(self, server: DraftServer, endpoint: ServerEndpoint) -> None:
        self._server = server
        self._endpoint = endpoint
        self._turns = MessageTurns()
        # By engine: when the turn of the commit batch came that has no reply yet.
        self._taken_s: dict[bytes, float] = {}

    def take_in(self, wait_ms: float) -> None:
        """Handle messages, after waiting for the first, for about `TURN_S`; answer at once what can be."""
        self._server.turned_s = time.monotonic()
        self._server.look_around()
        self._collect(0.0 if self._turns.is_waiting else wait_ms)
        until_s = time.perf_counter() + TURN_S
        while (taken := self._turns.take()) is not None:
            peer, message, self._server.came_s, self._server.key = taken
            started_s = time.perf_counter()
            self._handle(peer, message, started_s)
            now_s = time.perf_counter()
            self._turns.charge(peer, now_s - started_s)
            if now_s >= until_s:
                return
            self._collect(0.0)

    def _collect(self, wait_ms: float) -> None:
        """Let what has arrived wait for its turn; if nothing has, wait for it."""
        began_s = started_s = time.perf_counter()
        received = self._endpoint.recv(0.0)
        if received is None and wait_ms > 0.0:
            received = self._endpoint.recv(wait_ms)
            self._turns.caught_up()
            began_s = started_s = time.perf_counter()
        while received is not None:
            peer, message = received
            now_s = time.perf_counter()
            # A long message has taken its time already.
            self._turns.charge(peer, now_s - started_s)
            has_session = self._server.has_session(peer)
            for overrun in self._turns.put(peer, message, self._endpoint.key, has_session=has_session):
                self.send(self._server.overrun(overrun))
            if now_s - began_s > RECEIVE_S:
                return
            started_s = now_s
            received = self._endpoint.recv(0.0)
        self._turns.caught_up()

    def _handle(self, peer: bytes, message: messages.EngineMessage, started_s: float) -> None:
        is_batch = isinstance(message, messages.CommitBatch)
        if is_batch:
            self._note_taken(peer, started_s)
        try:
            replies = self._server.handle(peer, message)
        except WireError as error:
            replies = [(peer, self._server.refuse(error))]
            self._taken_s.pop(peer, None)
        if is_batch:
            self._server.counters.handling_us += _us_since(started_s)
        self.send(replies)

    def _note_taken(self, peer: bytes, started_s: float) -> None:
        self._taken_s[peer] = started_s
        if len(self._taken_s) > MAX_TIMED:
            del self._taken_s[next(iter(self._taken_s))]

    def send(self, replies: Iterable[Reply]) -> None:
        """Send replies; on those that end a round rides how the server stands."""
        for peer, reply in replies:
            if isinstance(reply, messages.DraftBatch) and reply.is_final:
                if (taken_s := self._taken_s.pop(peer, None)) is not None:
                    self._server.counters.num_answers += 1
                    self._server.counters.answer_us += _us_since(taken_s)
                self._server.counters.num_malformed_messages = self._endpoint.num_dropped
                self._server.counters.num_flood_messages = self._endpoint.num_refused
                reply = msgspec.structs.replace(reply, report=self._server.report(peer))
            if not self._endpoint.send(peer, reply):
                self._server.lost(peer)


def _us_since(started_s: float) -> int:
    return round(1e6 * (time.perf_counter() - started_s))
