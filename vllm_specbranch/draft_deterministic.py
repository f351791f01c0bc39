"""A draft server whose drafts depend on what it was told, never on when (`deterministic`, section 10 of the design).

Owns the pace: after each reply a fixed number of draft steps is owed, and the next message waits until they are done; a reply
waits for a fixed number of tokens, whatever that costs. All else is `DraftServer`'s. Pure Python, draft server process.

    CommitBatch -> reply -> owed steps, all of them -> StepBegin, CommitBatch, ... taken in, in the order of their arrival

The free server drafts for as long as the target verifies, so how far ahead it gets is a matter of time, and with it the length of
the next chunk, and with that how many random numbers the target draws for it.
"""

from collections import deque
from typing import Any

from vllm_specbranch import messages
from vllm_specbranch.draft_peers import PendingReply
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_server import DraftServer, Reply
from vllm_specbranch.draft_work import MAX_DECODE_TOKENS, Work
from vllm_specbranch.errors import WireError

# Beside one step per token of a chunk: the branch point's own, and one for the first tokens of the branches.
MORE_STEPS = 2


class DeterministicDraftServer(DraftServer):
    """See the top of this file. Repeats itself for one engine that sends the same messages.

    Args:
        chunk_tokens: most tokens of a chunk; the owed steps are enough for one chunk below every branch.
    """

    takes_messages_in_flight = False

    def __init__(self, *args: Any, chunk_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps_per_round = chunk_tokens + MORE_STEPS
        self._steps_owed = 0
        self._is_prefilling = False
        self._queue: deque[tuple[bytes, messages.EngineMessage]] = deque()

    def handle(self, peer: bytes, message: messages.EngineMessage) -> list[Reply]:
        """Take in one message when its turn has come; see `DraftServer.handle`. Only questions are answered out of turn."""
        if isinstance(message, messages.StepBegin | messages.CommitBatch):
            self._queue.append((peer, message))
            return self._take_in()
        if isinstance(message, messages.Hello):
            self._queue = deque(one for one in self._queue if one[0] != peer)
        return super().handle(peer, message)

    def _take_in(self) -> list[Reply]:
        """Take in queued messages until one owes draft steps or a reply, or opens a request that has to be prefilled.

        How far a prefill has come when the next message arrives is a matter of time, and their order changes what is drafted.
        """
        replies: list[Reply] = []
        while self._queue and not self._steps_owed and not self.has_pending and not self._has_prefill():
            peer, message = self._queue.popleft()
            try:
                replies += super().handle(peer, message)
            except WireError as error:
                replies.append((peer, self.refuse(error)))
        return replies

    def step(self) -> tuple[list[Reply], bool]:
        """One draft step, of those that are owed or waited for; see `DraftServer.step`."""
        replies = self._take_in()
        owed = self._steps_owed
        more, worked = super().step()
        if owed and not self._is_prefilling:
            self._steps_owed = owed - 1 if worked else 0
        return replies + more, worked or bool(self._queue)

    def _reply(self, peer_id: bytes, pending: PendingReply) -> messages.DraftBatch:
        self._steps_owed = self._steps_per_round
        return super()._reply(peer_id, pending)

    def _send_ahead(self, peer_id: bytes, pending: PendingReply) -> list[Reply]:
        """Nothing: the engine waits for the reply however long it takes."""
        return []

    def _waits_for(self, peer_id: bytes, pending: PendingReply) -> list[tuple[DraftRequest, int]]:
        """The requests that still lack tokens, or their prefill, whatever that costs."""
        waiting = [(request, chunk.end) for request, chunk in self._growing(peer_id, pending)]
        prefills = [one for one in self._of(peer_id, pending) if self._prefill_work(one) is not None]
        return waiting + [(one, one.tree.root) for one in prefills]

    def _of(self, peer_id: bytes, pending: PendingReply) -> list[DraftRequest]:
        found = (self._requests.get((peer_id, request_id)) for request_id in pending.hits)
        return [one for one in found if one is not None and not one.is_evicted]

    def _wanted(self) -> list[Work]:
        """Prefills by themselves, so that their chunks do not depend on what else there is to do; then what is owed."""
        for request in self._requests.values():
            work = self._prefill_work(request)
            if work is not None:
                self._is_prefilling = True
                return [work]
        self._is_prefilling = False
        if self.has_pending or self._steps_owed:
            return super()._wanted()
        return []

    def _has_prefill(self) -> bool:
        return any(self._prefill_work(one) is not None for one in self._requests.values())

    def _prefill_work(self, request: DraftRequest) -> Work | None:
        """The next chunk of a request's prefill, of a fixed size."""
        if request.is_resting:
            return None
        leaf = request.tree.leaves()[0]
        num_pending = request.num_pending(leaf)
        if num_pending <= MAX_DECODE_TOKENS:
            return None
        return Work(request, leaf, min(num_pending, self._limits.prefill_tokens))
