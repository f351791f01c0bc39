"""The draft server: what it answers to each message, and one draft step.

Owns the requests of all its peers and the KV blocks of the draft model. `handle` and `step` do no I/O and are driven in memory by
tests; `serve` is the only loop. Knows nothing of vLLM. Runs in the draft server process.
"""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_specbranch import messages
from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_peers import Peer, PendingReply
from vllm_specbranch.draft_pressure import relieve
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_sampling import RandomNumber, uniform
from vllm_specbranch.draft_work import MAX_DECODE_TOKENS, Limits, StepTimings, Work
from vllm_specbranch.errors import SpecBranchError, WireError
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks
from vllm_specbranch.metrics import DraftServerCounters
from vllm_specbranch.planner import Chunk, Planner, WaitCosts
from vllm_specbranch.token_tree import Candidates
from vllm_specbranch.transport import ServerEndpoint

logger = logging.getLogger("vllm.specbranch.draft_server")

IDLE_WAIT_MS = 500.0

Key = tuple[bytes, str]
Reply = tuple[bytes, messages.ServerMessage]


class Model(Protocol):
    """What the server needs of a draft model; `draft_model.DraftModel` and the fake of the tests have it."""

    vocab_size: int
    max_model_len: int

    def forward(self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        """One batched forward; see `draft_model.DraftModel.forward`."""
        ...


class DraftServer:
    """Drafts for the requests of its peers, all the time, for the likely outcomes of the verification that is under way.

    Args:
        model: the draft model.
        kv: its block pool.
        planner: the policy.
        limits: sizes of a draft step.
        clock: seconds, monotonic.
        random_number: of a request's stream, for (key, hash of the prefix).
    """

    def __init__(
        self,
        model: Model,
        kv: KVBlocks,
        planner: Planner,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.perf_counter,
        random_number: RandomNumber = uniform,
    ) -> None:
        self._model = model
        self.kv = kv
        self._planner = planner
        self._limits = limits
        self._clock = clock
        self._random_number = random_number
        self._requests: dict[Key, DraftRequest] = {}
        self._peers: dict[bytes, Peer] = {}
        self._sequence_ids = itertools.count()
        self._timings = StepTimings()
        self._is_pressed = False
        self.counters = DraftServerCounters()
        self.is_stopping = False

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
                return self._replies_due()
            case messages.StatusQuery():
                return [(peer, self._status(message.query))]
            case messages.Shutdown():
                self.is_stopping = True
        return []

    def _greet(self, peer: bytes, hello: messages.Hello) -> list[Reply]:
        for key in [key for key in self._requests if key[0] == peer]:
            self._close(key)
        self._peers[peer] = Peer()
        if hello.vocab_size != self._model.vocab_size:
            reason = f"the target's vocabulary has {hello.vocab_size} tokens, the draft's {self._model.vocab_size}"
            return [(peer, messages.Refused(hello.session, reason))]
        ready = messages.Ready(hello.session, self._model.max_model_len, self.kv.num_blocks, self.kv.block_size)
        return [(peer, ready)]

    def _begin_step(self, peer: bytes, message: messages.StepBegin) -> None:
        for request_id in message.closes:
            self._close((peer, request_id))
        for opened in message.opens:
            self._check_tokens(opened.tokens)
        for opened in message.opens:
            key = (peer, opened.request_id)
            self._close(key)
            self._requests[key] = DraftRequest(
                opened.tokens, self.kv, self._sequence_ids, opened.sampling, self._random_number
            )

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
        peer = self._peers.setdefault(peer_id, Peer())
        now_s = self._clock()
        peer.observe_round(now_s, len(message.commits), sum(len(one.tokens) for one in message.commits))
        pending = PendingReply(message.round, {}, [], now_s + message.max_wait_ms / 1e3)
        for commit in message.commits:
            hit = self._commit(peer, (peer_id, commit.request_id), commit)
            if hit is None:
                pending.unknown.append(commit.request_id)
            else:
                pending.hits[commit.request_id] = hit
        self.counters.num_unknown_requests += len(pending.unknown)
        peer.pending = pending

    def _commit(self, peer: Peer, key: Key, commit: messages.Commit) -> bool | None:
        request = self._requests.pop(key, None)
        if request is None:
            return None
        tree = request.tree
        line, num_nodes = self._main_line(request), len(tree)
        result = request.commit(commit.position, commit.tokens)
        if result is None:
            request.evict()
            return None
        # The requests are kept in the order of their last commit: the first is the first to be evicted.
        self._requests[key] = request
        self._count(result.hit, result.num_matched, line, num_nodes - len(tree))
        peer.observe_outcome(commit.num_draft_tokens, min(commit.num_draft_tokens, len(commit.tokens) - 1))
        if not self._fits(request):
            request.evict()
        else:
            request.readmit()
            self._open_chunk(request)
        return result.hit

    def _main_line(self, request: DraftRequest) -> int:
        """How many drafted tokens lie on the line of first choices below the root."""
        node = request.tree.node(request.tree.root)
        count = 0
        while node.children:
            node = request.tree.node(next(iter(node.children.values())))
            count += 1
        return count

    def _count(self, hit: bool, num_matched: int, line: int, num_dropped: int) -> None:
        counters = self.counters
        counters.num_rounds += 1
        counters.num_hits += hit
        counters.num_misses += not hit
        counters.num_kept_tokens += num_matched
        rollback = 0 if hit else max(0, line - num_matched)
        counters.num_rollback_tokens += rollback
        counters.num_branch_tokens_dropped += max(0, num_dropped - num_matched - rollback)

    def _fits(self, request: DraftRequest) -> bool:
        num_blocks = -(-(request.tree.num_tokens + 1) // self.kv.block_size)
        return request.tree.num_tokens < self._model.max_model_len and num_blocks <= self.kv.num_blocks

    def _status(self, query: int) -> messages.Status:
        timings = {f"step_{rows}_rows": 1e6 * value for rows, value in sorted(self._timings.step_s_by_rows.items())}
        for index, peer in enumerate(self._peers.values()):
            timings[f"peer_{index}_token"] = 1e6 * peer.token_s
        return messages.Status(
            query, len(self._requests), self.kv.num_held, self.kv.num_blocks, self.counters.as_dict(), timings
        )

    # --- replies ----------------------------------------------------------------------------------------------------------

    def _growing(self, peer_id: bytes, pending: PendingReply) -> list[tuple[DraftRequest, Chunk]]:
        """The requests of a reply whose chunk would be longer after one more draft step, and that the rules let wait."""
        growing = []
        for request_id, hit in pending.hits.items():
            request = self._requests.get((peer_id, request_id))
            if request is None or request.is_evicted:
                continue
            chunk = self._open_chunk(request)
            if not self._planner.wants_more(chunk, hit=hit) or self._is_at_the_end(request, chunk.end):
                continue
            if request.num_pending(chunk.end) <= MAX_DECODE_TOKENS:
                growing.append((request, chunk))
        return growing

    def _is_at_the_end(self, request: DraftRequest, leaf: int) -> bool:
        return request.tree.node(leaf).position >= self._model.max_model_len - 1

    def _waits_for(self, peer_id: bytes, pending: PendingReply) -> list[DraftRequest]:
        """The requests whose chunks the next draft step should make longer before the reply; none if it is due now."""
        growing = self._growing(peer_id, pending)
        step_s = self._timings.estimate_s(len(growing))
        if self._clock() + step_s > pending.deadline_s:
            return []
        peer = self._peers[peer_id]
        costs = WaitCosts(step_s, peer.token_s, peer.acceptance, max(1, len(pending.hits)))
        if not self._planner.worth_waiting([chunk for _, chunk in growing], costs):
            return []
        return [request for request, _ in growing]

    def _replies_due(self) -> list[Reply]:
        """Answer every commit batch that does not wait (any more); send sampled drafts ahead for one that does."""
        replies: list[Reply] = []
        for peer_id, peer in self._peers.items():
            if peer.pending is None:
                continue
            if self._waits_for(peer_id, peer.pending):
                replies += self._send_ahead(peer_id, peer.pending)
            else:
                replies.append((peer_id, self._reply(peer_id, peer.pending)))
                peer.pending = None
        return replies

    def _reply(self, peer_id: bytes, pending: PendingReply) -> messages.DraftBatch:
        drafts = []
        for request_id, hit in pending.hits.items():
            request = self._requests.get((peer_id, request_id))
            if request is None:
                continue
            request.chunk_end = self._open_chunk(request).end
            drafts.append(request.draft(request_id, hit))
            self._grow(request)
        return messages.DraftBatch(pending.round, True, drafts, pending.unknown)

    def _send_ahead(self, peer_id: bytes, pending: PendingReply) -> list[Reply]:
        """The sampled drafts of a batch that waits, whenever one has grown."""
        drafts = []
        has_grown = False
        for request_id, hit in pending.hits.items():
            request = self._requests.get((peer_id, request_id))
            if request is None or request.sampling is None:
                continue
            chunk = self._open_chunk(request)
            has_grown |= chunk.num_tokens > pending.sent.get(request_id, 0)
            pending.sent[request_id] = chunk.num_tokens
            if chunk.num_tokens:
                drafts.append(request.draft(request_id, hit, chunk.end))
        return [(peer_id, messages.DraftBatch(pending.round, False, drafts, []))] if has_grown else []

    # --- drafting ---------------------------------------------------------------------------------------------------------

    def step(self) -> tuple[list[Reply], bool]:
        """One draft step: at most one batched forward.

        Returns:
            (replies that became due, whether anything was fed; if not, there is nothing to do until the next message).
        """
        work = self._select()
        if work:
            self._feed(work)
        replies = self._replies_due()
        # A reply that still waits is looked at again soon, even when nothing could be fed for want of blocks.
        return replies, bool(work) or any(peer.pending is not None for peer in self._peers.values())

    def _select(self) -> list[Work]:
        """The rows of the next draft step, after making room for them."""
        work = self._wanted()
        if not self._is_pressed or self.kv.num_free > self.kv.num_blocks // 4:
            self._is_pressed = False
        while work and self._num_new_blocks(work) > self.kv.num_free:
            self._is_pressed = True
            if relieve(self._requests.values(), {id(one.request) for one in work}, self.counters):
                work = self._wanted()
            else:
                work = self._give_up(work)
        return work

    def _give_up(self, work: list[Work]) -> list[Work]:
        """Without any other request to evict: draft shallower, and when even one row does not fit, evict its request."""
        last = work.pop()
        if not work:
            last.request.evict()
            self.counters.num_evictions += 1
        return work

    def _num_new_blocks(self, work: list[Work]) -> int:
        return sum(self.kv.num_new_blocks(one.request.sequence(one.leaf), one.num_tokens) for one in work)

    def _wanted(self) -> list[Work]:
        waiting = [
            request
            for peer_id, peer in self._peers.items()
            if peer.pending is not None
            for request in self._waits_for(peer_id, peer.pending)
        ]
        if waiting:
            self.counters.num_wait_steps += 1
            ends = ((request, self._planner.chunk(request.tree).end) for request in waiting)
            return self._limits.cut([Work(request, end, request.num_pending(end)) for request, end in ends], None)
        return self._wanted_of_all()

    def _wanted_of_all(self) -> list[Work]:
        """First choices of all requests before their second ones, and one chunk of one prefill."""
        by_rank: list[list[Work]] = []
        prefill: Work | None = None
        chunk = self._timings.prefill_chunk(self._limits.prefill_tokens)
        for request in self._requests.values():
            if request.is_evicted:
                continue
            for rank, leaf in enumerate(self._planner.rows(request.tree, request.chunk_end)):
                num_pending = request.num_pending(leaf)
                if self._is_at_the_end(request, leaf):
                    continue
                if num_pending > MAX_DECODE_TOKENS:
                    prefill = prefill or Work(request, leaf, min(num_pending, chunk))
                    continue
                while len(by_rank) <= rank:
                    by_rank.append([])
                by_rank[rank].append(Work(request, leaf, num_pending))
        if by_rank and len(by_rank[0]) > self._limits.num_rows:
            # Not all requests fit: the one with the least drafted so far comes first, so that all get their turn.
            by_rank[0].sort(key=lambda one: one.request.depth(one.leaf))
        return self._limits.cut(list(itertools.chain.from_iterable(by_rank)), prefill)

    def _feed(self, work: list[Work]) -> None:
        started_s = self._clock()
        rows: list[Row] = []
        copies: list[BlockCopy] = []
        for one in work:
            position, tokens = one.request.pending(one.leaf, one.num_tokens)
            copies += one.request.reserve(one.leaf, len(tokens))
            rows.append(Row(tokens, position, self.kv.block_ids(one.request.sequence(one.leaf)), one.request.sampling))
        candidates = self._model.forward(rows, copies, self._planner.num_candidates)
        duration_s = self._clock() - started_s
        num_prefill_tokens = sum(one.num_tokens for one in work if one.num_tokens > MAX_DECODE_TOKENS)
        if num_prefill_tokens:
            self._timings.observe_prefill(num_prefill_tokens, duration_s)
        else:
            self._timings.observe(len(rows), duration_s)
        self.counters.num_steps += 1
        self.counters.num_rows += len(rows)
        touched: dict[int, DraftRequest] = {}
        self.counters.num_prefill_tokens += num_prefill_tokens
        for one, predicted in zip(work, candidates, strict=True):
            if one.request.num_pending(one.leaf) == 0:
                one.request.fed(one.leaf, predicted, self._planner.score(predicted))
                touched[id(one.request)] = one.request
        awaited = self._awaited()
        for request_id, request in touched.items():
            if request_id in awaited:
                self._open_chunk(request)
            else:
                self._grow(request)

    def _awaited(self) -> set[int]:
        """The requests (by `id`) that an open reply waits for."""
        return {
            id(self._requests.get((peer_id, request_id)))
            for peer_id, peer in self._peers.items()
            if peer.pending is not None
            for request_id in peer.pending.hits
        }

    def _open_chunk(self, request: DraftRequest) -> Chunk:
        """What could be submitted now, with the draft's choice appended where its last token has been fed.

        Always appended: were it there for some choices only (because a branch starts with it, say), a look at the drawn token would
        decide whether it is submitted (rule 2 of the design, section 3).
        """
        chunk = self._planner.chunk(request.tree)
        node = request.tree.node(chunk.end)
        if chunk.is_complete or node.candidates is None or request.is_evicted:
            return chunk
        request.extend(chunk.end, node.choice)
        self.counters.num_drafted_tokens += 1
        return self._planner.chunk(request.tree)

    def _grow(self, request: DraftRequest) -> None:
        """Draft on below the branch point: candidates at the branch point itself, the draft's choices below them."""
        if request.is_evicted or not request.has_kv(request.chunk_end):
            return
        tree, branch_point = request.tree, request.chunk_end
        for leaf, token in self._planner.extensions(tree, branch_point):
            request.extend(leaf, token)
            self.counters.num_drafted_tokens += 1
        has_branch = bool(tree.node(branch_point).children)
        for token in self._planner.forks(tree, branch_point, most=1 if self._is_pressed else None):
            request.extend(branch_point, token)
            self.counters.num_forks += has_branch
            self.counters.num_drafted_tokens += 1
            has_branch = True

    def check_integrity(self) -> None:
        """Raise unless every request and the block pool are consistent; for tests and idle moments."""
        self.kv.check_integrity()
        for request in self._requests.values():
            request.check_integrity()
        held = sum(request.num_sequences for request in self._requests.values())
        if held != self.kv.num_tables:
            raise SpecBranchError(f"{held} sequences are owned by requests, the pool has {self.kv.num_tables} tables")


def serve(server: DraftServer, endpoint: ServerEndpoint) -> None:
    """Answer messages and draft in between, until told to shut down. The only loop of the server.

    Blocks while there is nothing to draft; polls between draft steps otherwise.
    """
    worked = False
    while not server.is_stopping:
        received = endpoint.recv(0.0 if worked else IDLE_WAIT_MS)
        while received is not None:
            peer, message = received
            try:
                replies = server.handle(peer, message)
            except WireError as error:
                replies = [(peer, server.refuse(error))]
            for to, reply in replies:
                endpoint.send(to, reply)
            received = endpoint.recv(0.0)
        replies, worked = server.step()
        for to, reply in replies:
            endpoint.send(to, reply)
