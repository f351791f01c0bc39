"""A draft server that several engines share, none of which started it: who is admitted, with how much, and for how long.

Owns the sessions of its engines. What is drafted, and when it is sent, is the plain server's. No engine is trusted: each holds
requests, tokens and time up to a limit, and none can end the server. Pure Python, draft server process.

    Hello --fits?--> session --nothing heard for LEASE_S--> its requests are closed; the session stays until its place is needed
      |  no: Refused, with the reason                       message without a session: Farewell, upon which the engine says Hello
"""

import logging
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from vllm_specbranch import messages
from vllm_specbranch.draft_server import DraftServer, Reply
from vllm_specbranch.errors import WireError

logger = logging.getLogger("vllm.specbranch.draft_sessions")

# An engine with open requests sends every step. One that comes back later is told that they are unknown, and opens them again.
LEASE_S = 30.0
MAX_SESSIONS = 256
# Four times vLLM's largest default of max_num_seqs.
MAX_REQUESTS_PER_SESSION = 4096
# Committed tokens of all requests of an engine: 500 requests of 8k tokens, some 150 MiB of memory.
MAX_TOKENS_PER_SESSION = 4_000_000
WARNING_PERIOD_S = 1.0
NO_SESSION = "there is no session for this connection"


@dataclass(frozen=True, slots=True)
class Offer:
    """What the server has, to be compared with an engine's terms.

    Attributes:
        model_identity: of its draft model (`draft_identity`); empty if not known.
        dtype: of the draft model, by torch's name.
        num_speculative_tokens: most draft tokens of its chunks.
    """

    model_identity: str
    dtype: str
    num_speculative_tokens: int

    def objection(self, terms: messages.Terms | None) -> str | None:
        """Why an engine with these terms cannot be drafted for; None if it can."""
        if terms is None:
            return "the engine does not say what it expects, as one must of a server that it did not start"
        if terms.model_identity and self.model_identity and terms.model_identity != self.model_identity:
            return (
                "the engine was configured with another draft model: its config or tokenizer differs from this server's"
            )
        if terms.dtype != self.dtype:
            return f"the engine expects a draft model in {terms.dtype!a}, this server's is in {self.dtype}"
        if terms.num_speculative_tokens < self.num_speculative_tokens:
            return (
                f"the engine takes at most {terms.num_speculative_tokens} draft tokens, this server drafts up to "
                f"{self.num_speculative_tokens}: give it a num_speculative_tokens of at most {terms.num_speculative_tokens}"
            )
        return None


class SharedDraftServer(DraftServer):
    """A `DraftServer` for engines that come and go.

    Args:
        args, kwargs: those of `DraftServer`.
        offer: what it has.
    """

    def __init__(self, *args: Any, offer: Offer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._offer = offer
        # By when they were last heard of, the latest last.
        self._heard_s: OrderedDict[bytes, float] = OrderedDict()
        self._looked_s = self._clock()
        self._warned_s = -math.inf

    @property
    def num_sessions(self) -> int:
        """Engines with a session."""
        return len(self._heard_s)

    def handle(self, peer: bytes, message: messages.EngineMessage) -> list[Reply]:
        """As of `DraftServer`, for engines with a session; what others say is answered with `Farewell`."""
        self._end_leases()
        if isinstance(message, messages.Hello):
            return self._admit(peer, message)
        if peer not in self._heard_s:
            return [(peer, messages.Farewell(NO_SESSION))]
        self._hear(peer)
        match message:
            case messages.Shutdown():
                self._warn("An engine asked this server to end, which is not for engines to decide.")
                return []
            case messages.StepBegin():
                opens = self._within_limits(peer, message)
                return super().handle(peer, messages.StepBegin(opens, message.closes))
            case messages.CommitBatch():
                replies = super().handle(peer, message)
                self._close_what_outgrew_the_model(peer, message)
                return replies
        return super().handle(peer, message)

    def drain(self, reason: str) -> list[Reply]:
        """Answer what is open with what there is, and take leave of everybody."""
        replies: list[Reply] = []
        for peer_id in list(self._heard_s):
            pending = self._peers[peer_id].pending
            if pending is not None:
                replies.append((peer_id, self._reply(peer_id, pending)))
            replies.append((peer_id, messages.Farewell(reason)))
            self._end_session(peer_id)
        return replies

    def refuse(self, error: WireError) -> messages.Failure:
        """As of `DraftServer`, with fewer lines in the log."""
        self.counters.num_refused_messages += 1
        self._warn("Refused a message: %s", error)
        return messages.Failure(str(error))

    def _warn(self, text: str, *args: object) -> None:
        """Log what engines make this server say, at most once in a while: the log must not be theirs to fill."""
        now_s = self._clock()
        if now_s - self._warned_s >= WARNING_PERIOD_S:
            self._warned_s = now_s
            logger.warning(text, *args)

    # --- who is admitted --------------------------------------------------------------------------------------------------

    def _admit(self, peer: bytes, hello: messages.Hello) -> list[Reply]:
        objection = None
        if hello.vocab_size == self._model.vocab_size:
            objection = self._offer.objection(hello.terms)
        is_final = objection is not None
        if self.is_stopping:
            objection, is_final = "this server is about to end", False
        elif objection is None and not self._has_room_for(peer):
            objection, is_final = f"this server serves {MAX_SESSIONS} engines already", False
        if objection is not None:
            self._end_session(peer)
            self._warn("Refused an engine: %s.", objection)
            return [(peer, messages.Refused(hello.session, objection, is_final))]
        replies = super().handle(peer, hello)
        if any(isinstance(reply, messages.Refused) for _, reply in replies):
            self._end_session(peer)
        else:
            self._hear(peer)
        return replies

    def _has_room_for(self, peer: bytes) -> bool:
        """Whether there is a place, if need be that of an engine not heard of for longer than a lease."""
        if peer in self._heard_s or len(self._heard_s) < MAX_SESSIONS:
            return True
        oldest = next(iter(self._heard_s))
        if self._clock() - self._heard_s[oldest] <= LEASE_S:
            return False
        self._end_session(oldest)
        return True

    # --- with how much ----------------------------------------------------------------------------------------------------

    def _within_limits(self, peer: bytes, message: messages.StepBegin) -> list[messages.Open]:
        """The requests that may be opened; the others stay unknown, and are decoded without drafts."""
        if not message.opens:
            return []
        closed = set(message.closes)
        held = {
            request_id: request.tree.num_tokens
            for (owner, request_id), request in self._requests.items()
            if owner == peer and request_id not in closed
        }
        num_tokens = sum(held.values())
        opens = []
        for one in message.opens:
            num_tokens += len(one.tokens) - held.get(one.request_id, 0)
            held[one.request_id] = len(one.tokens)
            fits = len(held) <= MAX_REQUESTS_PER_SESSION and num_tokens <= MAX_TOKENS_PER_SESSION
            if fits and len(one.tokens) < self._model.max_model_len:
                opens.append(one)
                continue
            num_tokens -= held.pop(one.request_id)
            # What is open under this name has been given up by the engine.
            self._close((peer, one.request_id))
            self.counters.num_turned_away += 1
        return opens

    def _close_what_outgrew_the_model(self, peer: bytes, message: messages.CommitBatch) -> None:
        """An engine stops by itself before this; a trunk that grows for ever would be memory that does."""
        for commit in message.commits:
            request = self._requests.get((peer, commit.request_id))
            if request is not None and request.tree.num_tokens > self._model.max_model_len:
                self._close((peer, commit.request_id))

    # --- for how long -----------------------------------------------------------------------------------------------------

    def _hear(self, peer: bytes) -> None:
        self._heard_s[peer] = self._clock()
        self._heard_s.move_to_end(peer)

    def _end_leases(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s < LEASE_S / 30:
            return
        self._looked_s = now_s
        gone = {peer for peer, heard_s in self._heard_s.items() if now_s - heard_s > LEASE_S}
        expired = [key for key in self._requests if key[0] in gone]
        for key in expired:
            self._close(key)
        self.counters.num_expired_requests += len(expired)

    def _end_session(self, peer: bytes) -> None:
        for key in [key for key in self._requests if key[0] == peer]:
            self._close(key)
        self._heard_s.pop(peer, None)
        self._peers.pop(peer, None)
