"""The draft server: what it answers to each message, and when.

Owns its peers and when each of them gets its reply; the requests and the forward are in `draft_steps`. Nothing here does I/O: tests
drive it in memory, `draft_loop` serves it. Knows nothing of vLLM. Runs in the draft server process.
"""

import logging
import math
import zlib
from collections.abc import Sequence
from typing import Any

from vllm_specbranch import messages
from vllm_specbranch.draft_peers import Peer, PendingReply, Tally
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_steps import Batch, DraftSteps, Key
from vllm_specbranch.draft_work import MAX_DECODE_TOKENS
from vllm_specbranch.errors import WireError
from vllm_specbranch.planner import Chunk, Planner, WaitCosts
from vllm_specbranch.token_tree import Candidates

logger = logging.getLogger("vllm.specbranch.draft_server")

# Of so many rounds, in so many one request is drafted for although the price of verification is above its worth.
SCOUT_PERIOD = 128
SCOUT_ROUNDS = 8

OVERRUN = "this engine sends faster than its messages can be taken in"

Reply = tuple[bytes, messages.ServerMessage]


class DraftServer(DraftSteps):
    """Drafts for the requests of its peers, all the time, for the likely outcomes of the verification that is under way.

    Args:
        args, kwargs: those of `DraftSteps`.

    Attributes:
        is_stopping: whether the serving loop is to end.
        came_s: by the server's clock, the earliest time at which the message that is handled may have come.
        key: of who sent the message that is handled; the same empty one for all where there are no keys.
        turned_s: when the serving loop last looked for messages, by `time.monotonic`.
    """

    takes_messages_in_flight = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._peers: dict[bytes, Peer] = {}
        self.is_stopping = False
        self.came_s = math.inf
        self.key = ""
        self.turned_s = 0.0

    # --- messages ---------------------------------------------------------------------------------------------------------

    def handle(self, peer: bytes, message: messages.EngineMessage) -> list[Reply]:
        """Take in one message; return what can be answered now.

        Raises:
            WireError: the message names a token outside the vocabulary. Of it, only the closes were carried out.
        """
        match message:
            case messages.Hello():
                return self._greet(peer, message)
            case messages.StepBegin():
                self._begin_step(peer, message)
            case messages.CommitBatch():
                self._commit_batch(peer, message)
                return self.replies_due()
            case messages.StatusQuery():
                return [(peer, self._status(peer, message.query))]
            case messages.Shutdown():
                self.is_stopping = True
        return []

    def overrun(self, peer: bytes) -> list[Reply]:
        """An engine has sent more than could be taken in, some of it is lost: it has to begin anew."""
        for key in [key for key in self._requests if key[0] == peer]:
            self._close(key)
        if peer in self._peers:
            self._peers[peer].pending = None
        return [(peer, messages.Farewell(OVERRUN))]

    def look_around(self) -> None:
        """What is due at some time, whether messages come or not; called at every turn of the loop."""

    def has_session(self, peer: bytes) -> bool:
        """Whether an engine has been admitted; who started this server is, whatever it says."""
        del peer
        return True

    def lost(self, peer: bytes) -> None:
        """A reply could not be sent: the engine is gone, or reads no more. The next one may find another at its other end."""

    def _greet(self, peer: bytes, hello: messages.Hello) -> list[Reply]:
        for key in [key for key in self._requests if key[0] == peer]:
            self._close(key)
        known = self._meet(peer)
        self._peers[peer] = Peer(known.planner, hello.wants_top_probs, known.tally)
        if hello.vocab_size != self._model.vocab_size:
            reason = f"the target's vocabulary has {hello.vocab_size} tokens, the draft's {self._model.vocab_size}"
            return [(peer, messages.Refused(hello.session, reason, True))]
        ready = messages.Ready(hello.session, self._model.max_model_len, self.kv.num_blocks, self.kv.block_size)
        return [(peer, ready)]

    def _meet(self, peer: bytes) -> Peer:
        """What is known of an engine, which may be new."""
        known = self._peers.get(peer)
        if known is None:
            tally = Tally(others=self.counters.as_dict())
            known = self._peers[peer] = Peer(self._planner_of_newcomer(), tally=tally)
        return known

    def _planner_of_newcomer(self) -> Planner:
        """What an engine that is new here begins with: where there is but one, it is that one, by another connection."""
        return self._planner

    def _begin_step(self, peer: bytes, message: messages.StepBegin) -> None:
        for request_id in message.closes:
            self._close((peer, request_id))
        for opened in message.opens:
            self._check_tokens(opened.tokens)
        for opened in message.opens:
            key = (peer, opened.request_id)
            self._close(key)
            engine = self._meet(peer)
            request = self._requests[key] = DraftRequest(
                opened.tokens, self.kv, engine.planner, self._sequence_ids, opened.sampling, self._random_number
            )
            request.engine, request.counters = peer, engine.tally.counters

    def refuse(self, error: WireError) -> messages.Failure:
        """Count and log a message that was not taken in; returns the answer to it."""
        self.counters.num_refused_messages += 1
        logger.warning("Refused a message: %s", error)
        return messages.Failure(str(error))

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if tokens and max(tokens) >= self._model.vocab_size:
            raise WireError(f"token {max(tokens)} is outside the vocabulary of {self._model.vocab_size}")

    def _close(self, key: Key) -> None:
        request = self._requests.pop(key, None)
        if request is not None:
            request.evict()

    def _commit_batch(self, peer_id: bytes, message: messages.CommitBatch) -> None:
        for commit in message.commits:
            self._check_tokens(commit.tokens)
        peer = self._meet(peer_id)
        now_s = self._clock()
        head = peer.planner.online_head
        peer.observe_round(
            now_s,
            message,
            is_head_ready=head is not None and head.is_ready,
            is_catching_up=self._is_catching_up(peer_id, message.commits),
        )
        slack_s = message.pace.slack_us / 1e6 if message.pace else 0.0
        # The engine counts from when it sent this: a server that was busy meanwhile has less time left, or none.
        came_s = min(now_s, self.came_s)
        pending = PendingReply(message.round, {}, [], came_s + message.max_wait_ms / 1e3, came_s + slack_s)
        prices = self._prices(peer, message.commits)
        for commit, price in zip(message.commits, prices, strict=True):
            hit = self._commit((peer_id, commit.request_id), commit, price, asks_online_head=peer.gate.is_on)
            if hit is None:
                pending.unknown.append(commit.request_id)
            else:
                pending.hits[commit.request_id] = hit
        for counters in (self.counters, peer.tally.counters):
            counters.num_unknown_requests += len(pending.unknown)
        peer.pending = pending

    def _is_catching_up(self, peer_id: bytes, commits: Sequence[messages.Commit]) -> bool:
        """Whether the draft model has yet to read more than a row of what some request committed long ago."""
        found = (self._requests.get((peer_id, one.request_id)) for one in commits)
        return any(one.num_unread > MAX_DECODE_TOKENS for one in found if one is not None and not one.is_resting)

    def _prices(self, peer: Peer, commits: Sequence[messages.Commit]) -> list[float]:
        """The price of verification for each request of a batch.

        Where speculation does not pay, one request at a time is still drafted for now and then: how often its drafts are accepted
        may change. Where no drafting at all was measured to be faster, nothing is worth its price.
        """
        if not peer.planner.weighs_load:
            return [0.0] * len(commits)
        if not peer.load.is_on:
            for counters in (self.counters, peer.tally.counters):
                counters.num_paused_rounds += 1
            return [math.inf] * len(commits)
        prices = [peer.price] * len(commits)
        period, phase = divmod(peer.num_rounds, SCOUT_PERIOD)
        if phase < SCOUT_ROUNDS and commits:
            # The same request for as long as it is there, whatever comes and goes beside it.
            ranks = [zlib.crc32(f"{period} {one.request_id}".encode()) for one in commits]
            prices[ranks.index(min(ranks))] = 0.0
        return prices

    def _commit(self, key: Key, commit: messages.Commit, price: float, *, asks_online_head: bool) -> bool | None:
        request = self._requests.get(key)
        if request is None:
            return None
        request.price, request.length_class = price, commit.head_class
        request.asks_online_head = asks_online_head
        self._observe_outcome(request, commit)
        tree = request.tree
        line, num_nodes = self._main_line(request), len(tree)
        result = request.commit(commit.position, commit.tokens)
        if result is None:
            self._close(key)
            return None
        # The requests are kept in the order of their last commit: the first is the first to be evicted.
        self._requests[key] = self._requests.pop(key)
        self._count(request, result.hit, result.num_matched, line, num_nodes - len(tree))
        if not self._fits(request):
            request.evict()
        else:
            request.readmit()
            self._open_chunk(request)
        return result.hit

    def _observe_outcome(self, request: DraftRequest, commit: messages.Commit) -> None:
        """Learn from what the target said after each node that had been fed."""
        tree = request.tree
        if commit.position != tree.num_tokens:
            request.examples.clear()
            return
        if request.planner.online_head is not None:
            request.planner.online_head.observe(
                request.examples, tree, commit.tokens, commit.num_draft_tokens, is_sampled=request.is_sampled
            )
        node = tree.node(tree.root)
        for index, token in enumerate(commit.tokens):
            if node.candidates is None:
                return
            request.planner.acceptance.observe(
                node.candidates,
                token,
                is_sampled=request.is_sampled,
                is_inside=index < commit.num_draft_tokens,
                is_accepted=index < len(commit.tokens) - 1,
            )
            child = node.children.get(token)
            if child is None:
                return
            node = tree.node(child)

    def _main_line(self, request: DraftRequest) -> int:
        """How many drafted tokens lie on the line of first choices below the root."""
        node = request.tree.node(request.tree.root)
        count = 0
        while node.children:
            node = request.tree.node(next(iter(node.children.values())))
            count += 1
        return count

    def _count(self, request: DraftRequest, hit: bool, num_matched: int, line: int, num_dropped: int) -> None:
        rollback = 0 if hit else max(0, line - num_matched)
        for counters in (self.counters, request.counters):
            counters.num_rounds += 1
            counters.num_hits += hit
            counters.num_misses += not hit
            counters.num_kept_tokens += num_matched
            counters.num_rollback_tokens += rollback
            counters.num_branch_tokens_dropped += max(0, num_dropped - num_matched - rollback)

    def _fits(self, request: DraftRequest) -> bool:
        num_blocks = -(-(request.tree.num_tokens + 1) // self.kv.block_size)
        return request.tree.num_tokens < self._model.max_model_len and num_blocks <= self.kv.num_blocks

    def _counters_for(self, peer_id: bytes) -> dict[str, int]:
        """What an engine that asks is told."""
        del peer_id
        return self.counters.as_dict()

    def _status(self, peer_id: bytes, query: int) -> messages.Status:
        timings = {f"step_{rows}_rows": 1e6 * value for rows, value in sorted(self._timings.step_s_by_rows.items())}
        for index, peer in enumerate(self._peers.values()):
            timings[f"peer_{index}_token"] = 1e6 * peer.token_s
            timings[f"peer_{index}_verification_token"] = 1e6 * peer.verification.slope_s
        return messages.Status(
            query, len(self._requests), self.kv.num_held, self.kv.num_blocks, self._counters_for(peer_id), timings
        )

    def report(self, peer_id: bytes) -> messages.Report | None:
        """How this server stands with an engine, as it rides on a reply to it; None for one that it does not know (any more)."""
        peer = self._peers.get(peer_id)
        if peer is None:
            return None
        tally = peer.tally
        own = [request for key, request in self._requests.items() if key[0] == peer_id]
        is_alone = len(own) == len(self._requests)
        return messages.Report(
            tally.life,
            len(own),
            self.num_queued_rows,
            self.kv.num_held if is_alone else len(set().union(*(one.block_ids() for one in own))),
            self.kv.num_blocks,
            tally.as_dict(self.counters),
        )

    # --- replies ----------------------------------------------------------------------------------------------------------

    def _growing(self, peer_id: bytes, pending: PendingReply) -> list[tuple[DraftRequest, Chunk]]:
        """The requests of a reply whose chunk would be longer after one more draft step, and that the rules let wait."""
        growing = []
        for request_id, hit in pending.hits.items():
            request = self._requests.get((peer_id, request_id))
            if request is None or request.is_resting:
                continue
            chunk = self._open_chunk(request)
            if not request.planner.wants_more(chunk, hit=hit) or self._is_at_the_end(request, chunk.end):
                continue
            if request.num_pending(chunk.end) <= MAX_DECODE_TOKENS:
                growing.append((request, chunk))
        return growing

    def _waits_for(self, peer_id: bytes, pending: PendingReply) -> list[tuple[DraftRequest, int]]:
        """(request, end of its chunk) where a reply waits for the next draft step to make a chunk longer; none if it is due now."""
        growing = self._growing(peer_id, pending)
        if not growing:
            return []
        now_s = self._clock()
        step_s = self._growth_s(peer_id, [request.num_pending(chunk.end) for request, chunk in growing], now_s)
        if now_s + step_s > pending.deadline_s:
            return []
        peer = self._peers[peer_id]
        delay_s = now_s + step_s - max(now_s, pending.free_until_s)
        one_s = self._timings.estimate_s(1)
        costs = WaitCosts(
            max(0.0, delay_s),
            peer.token_s,
            peer.planner.acceptance.mean,
            max(1, len(pending.hits)),
            peer.verification_s / one_s if one_s and peer.verification_s else math.inf,
            peer.price if peer.planner.weighs_load else 0.0,
        )
        if not peer.planner.worth_waiting([chunk for _, chunk in growing], costs):
            return []
        return [(request, chunk.end) for request, chunk in growing]

    def _awaited_growth(self) -> list[tuple[DraftRequest, int]]:
        """As decided at the end of the last step, or when the batch came; without what was closed or evicted since."""
        pending = [peer.pending for peer in self._peers.values() if peer.pending is not None]
        return [one for each in pending for one in each.growing if not one[0].is_resting]

    def _awaited(self) -> set[int]:
        return {
            id(self._requests.get((peer_id, request_id)))
            for peer_id, peer in self._peers.items()
            if peer.pending is not None
            for request_id in peer.pending.hits
        }

    def replies_due(self) -> list[Reply]:
        """Answer every commit batch that does not wait (any more); send sampled drafts ahead for one that does."""
        replies: list[Reply] = []
        for peer_id, peer in self._peers.items():
            if peer.pending is None:
                continue
            peer.pending.growing = self._waits_for(peer_id, peer.pending)
            if peer.pending.growing:
                replies += self._send_ahead(peer_id, peer.pending)
            else:
                replies.append((peer_id, self._reply(peer_id, peer.pending)))
                peer.pending = None
        return replies

    def _reply(self, peer_id: bytes, pending: PendingReply) -> messages.DraftBatch:
        drafts = []
        with_top_probs = self._peers[peer_id].wants_top_probs
        for request_id, hit in pending.hits.items():
            request = self._requests.get((peer_id, request_id))
            if request is None:
                continue
            request.chunk_end = self._open_chunk(request).end
            request.planner.branching.revalue(request.tree, request.chunk_end, is_sampled=request.is_sampled)
            drafts.append(request.draft(request_id, hit, with_top_probs=with_top_probs))
            self._expect(request)
            self._grow(request)
        return messages.DraftBatch(pending.round, True, drafts, pending.unknown, None, self._peers[peer_id].is_full)

    def _expect(self, request: DraftRequest) -> None:
        """Note what was known of a chunk that goes out, for the head that is learned while serving."""
        head = request.planner.online_head
        example = None if head is None else head.example(request.tree, is_sampled=request.is_sampled)
        if example is not None:
            request.examples.append(example)

    def _send_ahead(self, peer_id: bytes, pending: PendingReply) -> list[Reply]:
        """The sampled drafts of a batch that waits, whenever one has grown."""
        drafts = []
        has_grown = False
        with_top_probs = self._peers[peer_id].wants_top_probs
        for request_id, hit in pending.hits.items():
            request = self._requests.get((peer_id, request_id))
            if request is None or request.sampling is None:
                continue
            chunk = self._open_chunk(request)
            has_grown |= chunk.num_tokens > pending.sent.get(request_id, 0)
            pending.sent[request_id] = chunk.num_tokens
            if chunk.num_tokens:
                drafts.append(request.draft(request_id, hit, chunk.end, with_top_probs=with_top_probs))
        return [(peer_id, messages.DraftBatch(pending.round, False, drafts, []))] if has_grown else []

    # --- drafting ---------------------------------------------------------------------------------------------------------

    def finish_step(self, batch: Batch, candidates: Sequence[Candidates]) -> list[Reply]:
        """The second half of a draft step.

        Args:
            batch: what `begin_step` returned.
            candidates: what the model predicts, per row.

        Returns:
            The replies that became due.
        """
        self._end_step(batch, candidates)
        return self.replies_due()

    def longest_pause_ms(self, most: float) -> float:
        """How long the server may pause, at most `most`, before it looks again at the replies that wait."""
        deadlines = [peer.pending.deadline_s for peer in self._peers.values() if peer.pending is not None]
        return max(0.0, min(most, *(1e3 * (one - self._clock()) for one in deadlines))) if deadlines else most

    @property
    def has_pending(self) -> bool:
        """Whether a commit batch waits for its reply."""
        return any(peer.pending is not None for peer in self._peers.values())

    def step(self) -> tuple[list[Reply], bool]:
        """One whole draft step: at most one batched forward.

        Returns:
            (replies that became due, whether anything was fed; if not, there is nothing to do until the next message).
        """
        batch = self.begin_step()
        # A reply that still waits is looked at again soon, even when nothing could be fed for want of blocks.
        replies = self.replies_due() if batch is None else self.finish_step(batch, self.run_forward(batch))
        return replies, batch is not None or self.has_pending
