"""The draft steps of a draft server: which rows the next forward feeds, and what its predictions make of the token trees.

Owns the requests, their KV blocks and the one forward that may be in flight. A step has two halves, `begin_step` and `finish_step`;
between them messages may be taken in, so requests may be committed, evicted, closed or opened while the draft model computes.
Where the requests are several engines', these share each step and the blocks by `fair_shares`.
`draft_server.DraftServer` adds the messages and the replies. Pure Python, draft server process.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_pressure import give_up, relieve
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_sampling import RandomNumber, uniform
from vllm_specbranch.draft_work import MAX_DECODE_TOKENS, Limits, StepTimings, Work
from vllm_specbranch.errors import SpecBranchError
from vllm_specbranch.fair_shares import in_turns, in_view, most_rows, turn_order, who_gives
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks
from vllm_specbranch.metrics import DraftServerCounters
from vllm_specbranch.planner import Chunk, Planner
from vllm_specbranch.token_tree import Candidates

Key = tuple[bytes, str]
# One step of so many takes all rows.
FULL_STEP_PERIOD = 64
# Requests that are looked at for one step where several engines share it, of all engines together: looking takes time as well.
MOST_IN_VIEW = 256
# A step that other engines' replies wait for has a prefill in it when so many before it had none.
PREFILL_PATIENCE = 4


class Model(Protocol):
    """What the server needs of a draft model; `draft_model.DraftModel` and the fake of the tests have it."""

    vocab_size: int
    max_model_len: int

    def forward(self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        """One batched forward; see `draft_model.DraftModel.forward`."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward of the draft model: what goes in, and what for.

    Attributes:
        work: what each row is for, in the order of `rows`.
        sequences: `[num_rows]` the KV sequence that each row writes to.
        rows, copies, top_k: arguments of `Model.forward`.
        started_s: by the server's clock.
    """

    work: list[Work]
    sequences: list[int]
    rows: list[Row]
    copies: list[BlockCopy]
    top_k: int
    started_s: float


@dataclass(frozen=True, slots=True)
class Wishes:
    """What could be fed, by engine.

    Attributes:
        rows: (value, row), the most valuable first.
        prefills: all that each one lacks.
    """

    rows: dict[bytes, list[tuple[float, Work]]]
    prefills: dict[bytes, list[Work]]


def _num_prefill_tokens(work: Sequence[Work]) -> int:
    return sum(one.num_tokens for one in work if one.num_tokens > MAX_DECODE_TOKENS)


class DraftSteps:
    """Drafts for its requests; see the top of this file.

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
        self._sequence_ids = itertools.count()
        self._timings = StepTimings()
        # Engines that had to give blocks, until there are plenty again.
        self._pressed: set[bytes] = set()
        # Whose turn it was last: to be first in a step, and to have a prefill in it.
        self._led = self._prefilled = b""
        self._num_steps_without_prefill = 0
        self._view, self._num_views = 0, 1
        self._last_work: list[Work] = []
        self._in_flight: Batch | None = None
        self.num_queued_rows = 0
        self.counters = DraftServerCounters()

    def _awaited_growth(self) -> list[tuple[DraftRequest, int]]:
        """(request, node to feed) for chunks that open replies wait to see grow; these alone are fed then."""
        raise NotImplementedError

    def _awaited(self) -> set[int]:
        """The requests (by `id`) whose next chunk has not been sent."""
        raise NotImplementedError

    def _silent(self) -> Collection[bytes]:
        """Engines that may be gone, not having been heard of for a while; they give blocks before the others."""
        return ()

    # --- one step ---------------------------------------------------------------------------------------------------------

    def begin_step(self) -> Batch | None:
        """Choose what the next forward feeds, and make room for it; None if there is nothing to draft.

        The caller runs the model on the batch, and calls `finish_step` before it begins another step.
        """
        assert self._in_flight is None, "one forward at a time"
        work = self._select()
        if not work:
            return None
        self._take_turns(work)
        started_s = self._clock()
        sequences: list[int] = []
        rows: list[Row] = []
        copies: list[BlockCopy] = []
        for one in work:
            position, tokens = one.request.pending(one.leaf, one.num_tokens)
            copies += one.request.reserve(one.leaf, len(tokens))
            sequence = one.request.sequence(one.leaf)
            sequences.append(sequence)
            rows.append(Row(tokens, position, self.kv.block_ids(sequence), one.request.sampling))
        self._in_flight = Batch(work, sequences, rows, copies, self._planner.num_candidates, started_s)
        return self._in_flight

    def run_forward(self, batch: Batch) -> list[Candidates]:
        """The forward of a batch; touches nothing but the model, so that it may run in another thread."""
        return self._model.forward(batch.rows, batch.copies, batch.top_k)

    def _end_step(self, batch: Batch, candidates: Sequence[Candidates]) -> None:
        """Take in what the draft model predicts, and draft on below it."""
        assert batch is self._in_flight
        self._in_flight = None
        self._observe(batch, self._clock() - batch.started_s)
        touched: dict[int, DraftRequest] = {}
        for one, sequence, predicted in zip(batch.work, batch.sequences, candidates, strict=True):
            # Messages that were taken in meanwhile may have moved, evicted or closed the request.
            if one.request.is_complete(one.leaf, sequence):
                planner = one.request.planner
                accepted = planner.acceptance.accepted(predicted, is_sampled=one.request.is_sampled)
                one.request.fed(one.leaf, predicted, planner.score(predicted), accepted)
                touched[id(one.request)] = one.request
        awaited = self._awaited()
        for request_id, request in touched.items():
            if request_id in awaited:
                self._open_chunk(request)
            else:
                self._grow(request)

    def _expected_s(self, work: Sequence[Work]) -> float:
        num_prefill_tokens = _num_prefill_tokens(work)
        return self._timings.estimate_prefill_s(num_prefill_tokens) or self._timings.estimate_s(len(work))

    def _observe(self, batch: Batch, duration_s: float) -> None:
        num_prefill_tokens = _num_prefill_tokens(batch.work)
        if num_prefill_tokens:
            self._timings.observe_prefill(num_prefill_tokens, duration_s)
        else:
            self._timings.observe(len(batch.rows), duration_s)
        self.counters.num_steps += 1
        for counters in {id(one.request.counters): one.request.counters for one in batch.work}.values():
            counters.num_steps += 1
        for one in batch.work:
            for counters in (self.counters, one.request.counters):
                counters.num_rows += 1
                counters.num_prefill_tokens += _num_prefill_tokens([one])

    def _growth_s(self, engine: bytes, num_pending: Sequence[int], now_s: float) -> float:
        """Seconds until chunks of an engine grow whose ends lack so many tokens of KV.

        The step in flight feeds those that lack none. The next one has rows of the others too, about as many as the last one had.
        """
        num_rows = sum(count > 0 for count in num_pending)
        growth_s = 0.0
        if num_rows:
            others = Counter(one.request.engine for one in self._last_work if one.request.engine != engine)
            growth_s = self._timings.estimate_s(num_rows + sum(min(num_rows, count) for count in others.values()))
        if self._in_flight is not None:
            elapsed_s = now_s - self._in_flight.started_s
            left_s = self._expected_s(self._in_flight.work) - elapsed_s
            # One that is overdue may take half as long again.
            growth_s += left_s if left_s > 0.0 else elapsed_s / 2
        return growth_s

    # --- what to feed -----------------------------------------------------------------------------------------------------

    def _select(self) -> list[Work]:
        """The rows of the next draft step, after making room for them."""
        work = self._wanted()
        for _ in range(1, self._num_views):
            if work:
                break
            # None of those in view has anything to draft, but others may have.
            self._view += 1
            work = self._wanted()
        if self.kv.num_free > self.kv.num_blocks // 4:
            self._pressed.clear()
        while work and self._num_new_blocks(work) > self.kv.num_free:
            if self._silent_give(work):
                work = self._wanted()
                continue
            engine = self._who_gives(work)
            self._pressed.add(engine)
            own = [request for request in self._requests.values() if request.engine == engine]
            if relieve(own, {id(one.request) for one in work}, self.counters):
                work = self._wanted()
            else:
                work = give_up(work, engine, self.counters)
        return work

    def _who_gives(self, work: list[Work]) -> bytes:
        """The engine that holds the most blocks, with those that its rows need."""
        held = Counter(dict.fromkeys({request.engine for request in self._requests.values()}, 0))
        if len(held) > 1:
            for request in self._requests.values():
                held[request.engine] += request.num_blocks
            for one in work:
                held[one.request.engine] += self._num_new_blocks([one])
        return who_gives(held)

    def _silent_give(self, work: list[Work]) -> bool:
        """Let engines that may be gone give blocks for one that is there; returns whether they had any to give.

        An engine that was cut off is here twice until its former lease is over: it would be kept from blocks by itself.
        """
        silent = self._silent()
        if not silent or all(one.request.engine in silent for one in work):
            return False
        own = [request for request in self._requests.values() if request.engine in silent]
        if not relieve(own, {id(one.request) for one in work}, self.counters):
            return False
        self._pressed.update(silent)
        return True

    def _num_new_blocks(self, work: list[Work]) -> int:
        return sum(self.kv.num_new_blocks(one.request.sequence(one.leaf), one.num_tokens) for one in work)

    def _take_turns(self, work: list[Work]) -> None:
        """Note whose turn it was in a step that begins."""
        self._view += 1
        self._last_work = work
        self._led = work[0].request.engine
        # The first of them is of the engine whose turn it was.
        prefilled = next((one.request.engine for one in work if one.num_tokens > MAX_DECODE_TOKENS), None)
        if prefilled is not None:
            self._prefilled = prefilled
        self._num_steps_without_prefill = 0 if prefilled is not None else self._num_steps_without_prefill + 1

    def _wanted(self) -> list[Work]:
        waiting = self._awaited_growth()
        if not waiting:
            return self._wanted_of_all()
        self.counters.num_wait_steps += 1
        for counters in {id(one.counters): one.counters for one, _ in waiting}.values():
            counters.num_wait_steps += 1
        rows: dict[bytes, list[Work]] = {}
        for request, end in waiting:
            rows.setdefault(request.engine, []).append(Work(request, end, request.num_pending(end)))
        return self._with_others(rows)

    def _with_others(self, rows: dict[bytes, list[Work]]) -> list[Work]:
        """A step for replies that wait, in which the other engines have no fewer rows each than who has most of it.

        Args:
            rows: what is waited for, by engine; of these engines nothing else is fed.
        """
        most = max(map(len, rows.values()))
        wishes = self._wishes(rows)
        for engine, wanted in wishes.rows.items():
            rows[engine] = [work for _, work in wanted[:most]]
        is_their_turn = self._num_steps_without_prefill >= PREFILL_PATIENCE
        return self._cut(rows, self._chunk_of(wishes.prefills) if is_their_turn else [])

    def _wanted_of_all(self) -> list[Work]:
        """The rows of all requests that are worth their time, the most valuable first, and one chunk of prefills."""
        wishes = self._wishes(())
        rows = {}
        for engine, wanted in wishes.rows.items():
            count = self._planner.num_rows([value for value, _ in wanted], self._timings.row_cost)
            if self.counters.num_steps % FULL_STEP_PERIOD == 0:
                # What a row costs is only seen where their number changes.
                count = len(wanted)
            rows[engine] = [work for _, work in wanted[:count]]
        chosen = self._cut(rows, self._chunk_of(wishes.prefills))
        num_wished = sum(map(len, wishes.rows.values())) + sum(map(len, wishes.prefills.values()))
        self.num_queued_rows = num_wished - len(chosen)
        return chosen

    def _chunk_of(self, prefills: Mapping[bytes, Sequence[Work]]) -> list[Work]:
        """One chunk of prefills: of the engine whose turn it is as much as there is, of the next ones what that leaves."""
        left = self._timings.prefill_chunk(self._limits.prefill_tokens)
        chunk: list[Work] = []
        for one in itertools.chain.from_iterable(prefills[name] for name in turn_order(prefills, self._prefilled)):
            if not left:
                break
            chunk.append(replace(one, num_tokens=min(one.num_tokens, left)))
            left -= chunk[-1].num_tokens
        return chunk

    def _cut(self, rows: dict[bytes, list[Work]], prefills: Sequence[Work]) -> list[Work]:
        """A fair part of the rows that fits into one step beside a chunk of prefills."""
        count = most_rows([len(one) for one in rows.values()], self._timings.row_cost)
        return self._limits.cut(in_turns(rows, self._led)[:count], prefills)

    def _wishes(self, without: Container[bytes]) -> Wishes:
        """What could be fed of all engines but some."""
        wishes: dict[bytes, list[tuple[float, Work]]] = {}
        prefills: dict[bytes, list[Work]] = {}
        for request in self._in_view(without):
            if request.is_resting or request.price >= 1.0:
                continue
            for value, leaf in self._planner.rows(request.tree):
                if self._is_at_the_end(request, leaf):
                    continue
                num_pending = request.num_pending(leaf)
                if num_pending > MAX_DECODE_TOKENS:
                    prefills.setdefault(request.engine, []).append(Work(request, leaf, num_pending))
                else:
                    wishes.setdefault(request.engine, []).append((value, Work(request, leaf, num_pending)))
        for wanted in wishes.values():
            wanted.sort(key=lambda one: -one[0])
        return Wishes(wishes, prefills)

    def _in_view(self, without: Container[bytes]) -> Iterable[DraftRequest]:
        """The requests that are looked at for this step: all of one engine, and of several engines as many of each."""
        own: dict[bytes, list[DraftRequest]] = {}
        for request in self._requests.values():
            own.setdefault(request.engine, []).append(request)
        most = max(1, MOST_IN_VIEW // len(own) if len(own) > 1 else len(self._requests))
        self._num_views = -(-max(map(len, own.values()), default=0) // most)
        seen = (in_view(requests, most, self._view) for engine, requests in own.items() if engine not in without)
        return itertools.chain.from_iterable(seen)

    # --- what grows -------------------------------------------------------------------------------------------------------

    def _is_at_the_end(self, request: DraftRequest, leaf: int) -> bool:
        return request.tree.node(leaf).position >= self._model.max_model_len - 1

    def _open_chunk(self, request: DraftRequest) -> Chunk:
        """What could be submitted now, with the draft's choice appended where its last token has been fed.

        Always appended: were it there for some choices only (because a branch starts with it, say), a look at the drawn token would
        decide whether it is submitted (rule 2 of the design, section 3).
        """
        chunk = self._chunk(request)
        node = request.tree.node(chunk.end)
        if chunk.is_complete or node.candidates is None or request.is_evicted:
            return chunk
        request.planner.branching.grow_chunk(request.tree, request.extend(chunk.end, node.choice))
        self._count_drafted(request)
        return self._chunk(request)

    def _chunk(self, request: DraftRequest) -> Chunk:
        """What has been drafted of the chunk that could be submitted now."""
        length_class, head = request.length_class, request.planner.online_head
        if head is not None and request.asks_online_head:
            length_class = head.length_class(request.tree, is_sampled=request.is_sampled)
        return request.planner.chunk(request.tree, request.price, length_class)

    def _grow(self, request: DraftRequest) -> None:
        """Draft on for the outcomes of the verification under way: new forks, and the draft's choices below them."""
        if request.is_resting or request.price >= 1.0:
            return
        tree, end, branching = request.tree, request.chunk_end, request.planner.branching
        is_sampled = request.is_sampled
        for leaf, token in branching.extensions(tree, end, is_sampled=is_sampled, price=request.price):
            branching.grow_extension(tree, leaf, request.extend(leaf, token), is_sampled=is_sampled)
            self._count_drafted(request)
        most = 1 if request.engine in self._pressed else None
        for fork in branching.forks(tree, end, is_sampled=is_sampled, most=most):
            # An evicted chain is fed anew before anything can pass through it.
            if not request.has_kv(fork.node_id):
                continue
            self._count_drafted(request, is_fork=bool(tree.node(fork.node_id).children))
            branching.grow_fork(tree, fork, request.extend(fork.node_id, fork.token))

    def _count_drafted(self, request: DraftRequest, *, is_fork: bool = False) -> None:
        for counters in (self.counters, request.counters):
            counters.num_drafted_tokens += 1
            counters.num_forks += is_fork

    def check_integrity(self) -> None:
        """Raise unless every request and the block pool are consistent; for tests and idle moments."""
        self.kv.check_integrity()
        for request in self._requests.values():
            request.check_integrity()
        held = sum(request.num_sequences for request in self._requests.values())
        if held != self.kv.num_tables:
            raise SpecBranchError(f"{held} sequences are owned by requests, the pool has {self.kv.num_tables} tables")
