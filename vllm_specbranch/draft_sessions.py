"""A draft server that several engines share, none of which started it: who is admitted, with how much, and for how long.

Owns the sessions of its engines. What is drafted, and when it is sent, is the plain server's. No engine is trusted: each holds
requests, tokens and time up to a limit, and what it says cannot end the server. Pure Python, draft server process.

    Hello --fits?--> session --nothing heard for LEASE_S--> its requests are closed; the session stays until its place is needed
      |  no: Refused, with the reason                       message without a session: Farewell, upon which the engine says Hello
"""

import itertools
import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vllm_specbranch import messages
from vllm_specbranch.draft_server import OVERRUN, DraftServer, Reply
from vllm_specbranch.draft_steps import Key
from vllm_specbranch.errors import WireError
from vllm_specbranch.planner import Planner

logger = logging.getLogger("vllm.specbranch.draft_sessions")

# An engine with open requests sends every step. One that comes back later is told that they are unknown, and opens them again.
LEASE_S = 30.0
MAX_ENGINES = 256
# A message about so many takes some 20 ms, by which it may delay another engine's.
MAX_REQUESTS_PER_ENGINE = 256
# Committed tokens of all requests of an engine: 500 requests of 8k tokens, some 150 MiB of memory.
MAX_TOKENS_PER_ENGINE = 4_000_000
WARNING_PERIOD_S = 1.0
# An engine with open requests that is silent for so long may be gone: when blocks run short it gives first.
SILENT_S = 3.0
NO_SESSION = "there is no session for this connection"
MADE_ROOM = "this server is full, and made room for an engine whose key has fewer sessions"


@dataclass(frozen=True, slots=True)
class Offer:
    """What the server has, to be compared with an engine's terms, and how much of it there is.

    Attributes:
        model_identity: of its draft model (`draft_identity`); empty if not known.
        dtype: of the draft model, by torch's name.
        num_speculative_tokens: most draft tokens of its chunks.
        max_engines: most engines at a time.
        max_requests, max_tokens: most open requests of one engine, and most committed tokens of them together.
    """

    model_identity: str
    dtype: str
    num_speculative_tokens: int
    max_engines: int = MAX_ENGINES
    max_requests: int = MAX_REQUESTS_PER_ENGINE
    max_tokens: int = MAX_TOKENS_PER_ENGINE

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

    Attributes:
        num_engines: heard of within a lease, as of a second ago at most. Sessions stay for longer.
    """

    def __init__(self, *args: Any, offer: Offer, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._offer = offer
        # By when they were last heard of, the latest last.
        self._heard_s: OrderedDict[bytes, float] = OrderedDict()
        # Whose they are: who has several connections has one key, and what it calls itself costs nothing to change.
        self._keys: dict[bytes, str] = {}
        self._looked_s = self._clock()
        self.num_engines = 0
        self._warned_s = -math.inf

    @property
    def num_sessions(self) -> int:
        """Engines with a session."""
        return len(self._heard_s)

    @property
    def num_requests(self) -> int:
        """Open requests of all engines."""
        return len(self._requests)

    def look_around(self) -> None:
        """As of `DraftServer`: leases end when their time is over, also while nobody says anything."""
        self._end_leases()

    def has_session(self, peer: bytes) -> bool:
        """As of `DraftServer`: who has said `Hello` and was not refused."""
        return peer in self._heard_s

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
                opens, is_full = self._within_limits(peer, message)
                super().handle(peer, messages.StepBegin(opens, message.closes))
                # Only now: what it closes with the same message has been reckoned with.
                self._peers[peer].is_full |= is_full
                return []
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
        has_vocabulary = hello.vocab_size == self._model.vocab_size
        if has_vocabulary:
            objection = self._offer.objection(hello.terms)
        is_final = objection is not None
        farewells: list[Reply] | None = []
        if self.is_stopping:
            objection, is_final = "this server is about to end", False
        elif objection is None and has_vocabulary:
            # Only for who will be served: nobody loses a place to an engine that does not get it.
            farewells = self._make_room_for(peer)
            if farewells is None:
                objection, is_final = f"this server serves {self._offer.max_engines} engines already", False
        if objection is not None:
            self._end_session(peer)
            self._warn("Refused an engine: %s.", objection)
            return [(peer, messages.Refused(hello.session, objection, is_final))]
        replies = super().handle(peer, hello)
        if any(isinstance(reply, messages.Refused) for _, reply in replies):
            self._end_session(peer)
        else:
            self._hear(peer)
            self._keys[peer] = self.key
        return [*(farewells or ()), *replies]

    def _make_room_for(self, peer: bytes) -> list[Reply] | None:
        """What is said to whom the place is taken from, if to anybody; None if there is no place.

        First comes that of an engine not heard of for longer than a lease, then the one silent longest of the key that has most, if
        this key keeps no fewer than the other then has. So no key keeps another out, one alone may have all, and none takes turns.
        """
        if peer in self._heard_s or len(self._heard_s) < self._offer.max_engines:
            return []
        oldest = next(iter(self._heard_s))
        if self._clock() - self._heard_s[oldest] > LEASE_S:
            self._end_session(oldest)
            return []
        counts = Counter(self._keys.values())
        key, count = counts.most_common(1)[0]
        if counts[self.key] + 1 > count - 1:
            return None
        oldest = next(one for one in self._heard_s if self._keys[one] == key)
        self._end_session(oldest)
        return [(oldest, messages.Farewell(MADE_ROOM))]

    # --- with how much ----------------------------------------------------------------------------------------------------

    def _within_limits(self, peer: bytes, message: messages.StepBegin) -> tuple[list[messages.Open], bool]:
        """(the requests that may be opened, whether others would exceed what the engine may hold).

        The others stay unknown, and are decoded without drafts.
        """
        if not message.opens:
            return [], False
        closed = set(message.closes)
        held = {
            request_id: request.tree.num_tokens
            for (owner, request_id), request in self._requests.items()
            if owner == peer and request_id not in closed
        }
        num_tokens = sum(held.values())
        opens = []
        is_full = False
        for one in message.opens:
            num_tokens += len(one.tokens) - held.get(one.request_id, 0)
            held[one.request_id] = len(one.tokens)
            fits = len(held) <= self._offer.max_requests and num_tokens <= self._offer.max_tokens
            is_full |= not fits
            if fits and len(one.tokens) < self._model.max_model_len:
                opens.append(one)
                continue
            num_tokens -= held.pop(one.request_id)
            # What is open under this name has been given up by the engine.
            self._close((peer, one.request_id))
            self.counters.num_turned_away += 1
        return opens, is_full

    def _close(self, key: Key) -> None:
        if key in self._requests and key[0] in self._peers:
            self._peers[key[0]].is_full = False
        super()._close(key)

    def _close_what_outgrew_the_model(self, peer: bytes, message: messages.CommitBatch) -> None:
        """An engine stops by itself before this; a trunk that grows for ever would be memory that does."""
        for commit in message.commits:
            request = self._requests.get((peer, commit.request_id))
            if request is not None and request.tree.num_tokens > self._model.max_model_len:
                self._close((peer, commit.request_id))

    def _counters_for(self, peer_id: bytes) -> dict[str, int]:
        """What happened to its own requests, and else what happened to the server since it came."""
        return self._peers[peer_id].tally.as_dict(self.counters)

    def _planner_of_newcomer(self) -> Planner:
        """Each its own: how often drafts are accepted is a matter of its target and its prompts, and of nobody else's."""
        return self._planner.unlearned()

    def overrun(self, peer: bytes) -> list[Reply]:
        """As of `DraftServer`, and its session ends."""
        if peer not in self._heard_s:
            return [(peer, messages.Farewell(NO_SESSION))]
        replies = super().overrun(peer)
        self._warn("An engine's session ends: %s.", OVERRUN)
        self._end_session(peer)
        return replies

    def lost(self, peer: bytes) -> None:
        """Who does not read its replies is not drafted for. If it reads after all, its next message is answered by `Farewell`."""
        if peer in self._heard_s:
            self._warn("An engine takes no more replies; its session ends.")
            self._end_session(peer)

    # --- for how long -----------------------------------------------------------------------------------------------------

    def _hear(self, peer: bytes) -> None:
        self._heard_s[peer] = self._clock()
        self._heard_s.move_to_end(peer)

    def _silent(self) -> Collection[bytes]:
        now_s = self._clock()
        is_silent = itertools.takewhile(lambda heard: now_s - heard[1] > SILENT_S, self._heard_s.items())
        return {peer for peer, _ in is_silent}

    def _end_leases(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s < LEASE_S / 30:
            return
        self._looked_s = now_s
        self.num_engines = sum(now_s - heard_s <= LEASE_S for heard_s in self._heard_s.values())
        gone = {peer for peer, heard_s in self._heard_s.items() if now_s - heard_s > LEASE_S}
        expired = [key for key in self._requests if key[0] in gone]
        for key in expired:
            self._close(key)
        self.counters.num_expired_requests += len(expired)

    def _end_session(self, peer: bytes) -> None:
        for key in [key for key in self._requests if key[0] == peer]:
            self._close(key)
        self._heard_s.pop(peer, None)
        self._keys.pop(peer, None)
        self._peers.pop(peer, None)
