"""The target's KV blocks when they run short: what only rejected draft tokens had needed goes back to the pool.

Owns who gives up blocks, how many, and how the workers learn of it; and how many draft tokens the blocks have room for. vLLM keeps
the blocks that rejected tokens took, and preempts a request when another one's next token finds no block. Works on vLLM's own
KV-cache manager, never on the contents of a block. Runs in the engine core, before each step is scheduled.

    held blocks     |#######|#######|###----|-------|      # committed tokens, - slots for drafts
                                            ^ surplus: needed by nothing that is committed

A worker's block table only ever grows, so a request that gave up a block is sent to the workers whole at its next step, in the way
in which vLLM sends a request that comes back from preemption: its row is dropped and made again.

Losslessness: nothing here looks at a drafted token, nor at how many there are (rule 2 of the design, section 3). What a request
holds is a matter of rounds that are over.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_specbranch.metrics import SchedulerCounters

# A block that its request itself needs within so many tokens stays: it would only come back, and the row be made anew twice.
SPARED_TOKENS = 2


def why_not(scheduler: Scheduler) -> str | None:
    """Why blocks cannot be taken back under a scheduler; None if they can.

    Everything that keeps block ids of a running request outside the workers' block tables, or writes blocks outside the order of
    the steps, is a reason.
    """
    if scheduler.connector is not None:
        return "a KV connector reads and writes blocks that the scheduler has handed out"
    if scheduler.aux_output_connector is not None:
        return "a connector for auxiliary outputs follows the requests' blocks"
    if scheduler.vllm_config.max_concurrent_batches > 1:
        return "steps overlap (asynchronous scheduling or pipeline parallelism)"
    if scheduler.use_v2_model_runner:
        return "the V2 model runner takes changed block lists in another way"
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    others = sorted({type(one).__name__ for one in managers if type(one) is not FullAttentionManager})
    if others:
        return "not all of the model's layers are full attention (" + ", ".join(others) + ")"
    return None


class TargetBlocks:
    """The KV blocks of running requests: how many each holds and needs, and the one place that takes some away.

    Args:
        manager: vLLM's, of this engine.
    """

    def __init__(self, manager: KVCacheManager) -> None:
        self._pool = manager.block_pool
        self._managers: Sequence[SingleTypeKVCacheManager] = manager.coordinator.single_type_managers

    @property
    def num_free(self) -> int:
        """Blocks that the pool could hand out now."""
        num_free: int = self._pool.get_num_free_blocks()
        return num_free

    def num_for(self, num_tokens: int) -> int:
        """Blocks, over all groups, that hold so many tokens."""
        return sum(-(-num_tokens // manager.block_size) for manager in self._managers)

    def num_slots(self, request: Request, num_tokens: int) -> int:
        """Tokens that a request has room for once it has the blocks of its first `num_tokens` tokens, in its smallest group."""
        tables = self._tables(request)
        slots: list[int] = [
            max(len(blocks), -(-num_tokens // one.block_size)) * one.block_size for one, blocks in tables
        ]
        return min(slots)

    def num_missing(self, request: Request, num_tokens: int) -> int:
        """Blocks, over all groups, that a request lacks for its first `num_tokens` tokens."""
        tables = self._tables(request)
        return sum(max(0, -(-num_tokens // manager.block_size) - len(blocks)) for manager, blocks in tables)

    def num_surplus(self, request: Request, num_tokens: int) -> int:
        """Blocks, over all groups, that can be taken from a request which keeps its first `num_tokens` tokens."""
        return sum(
            len(blocks) - self._num_kept(request, num_tokens, manager, blocks)
            for manager, blocks in self._tables(request)
        )

    def num_tokens_to_spare(self, num_tokens: int) -> int:
        """How many more tokens than `num_tokens` a request can have before it needs one of its surplus blocks."""
        sizes: list[int] = [manager.block_size for manager in self._managers]
        return min(-num_tokens % size for size in sizes)

    def take_surplus(self, request: Request, num_tokens: int) -> int:
        """Return to the pool what `num_surplus` counts; how many that were.

        Mutates: the request's blocks and the pool. The workers know nothing of it yet.
        """
        num_taken = 0
        for manager, blocks in self._tables(request):
            num_kept = self._num_kept(request, num_tokens, manager, blocks)
            taken = blocks[num_kept:]
            del blocks[num_kept:]
            # The last one first, as vLLM frees them.
            self._pool.free_blocks(reversed(taken))
            num_taken += len(taken)
        return num_taken

    def _tables(self, request: Request) -> Iterator[tuple[SingleTypeKVCacheManager, list[KVCacheBlock]]]:
        for manager in self._managers:
            # Not by index: that would make an empty table.
            yield manager, manager.req_to_blocks.get(request.request_id, [])

    def _num_kept(
        self, request: Request, num_tokens: int, manager: SingleTypeKVCacheManager, blocks: Sequence[KVCacheBlock]
    ) -> int:
        """How many of a table's blocks stay: those of kept and of computed tokens, cached ones, and all before a shared one.

        A request whose tokens are in flight keeps everything.
        """
        if request.num_in_flight_tokens or request.num_output_placeholders:
            return len(blocks)
        num_needed = -(-max(num_tokens, request.num_computed_tokens) // manager.block_size)
        least = max(num_needed, manager.num_cached_block.get(request.request_id, 0))
        num_kept = len(blocks)
        while num_kept > least and self._pool.is_block_writable(blocks[num_kept - 1]):
            num_kept -= 1
        return num_kept


@dataclass(frozen=True, slots=True)
class Giver:
    """A request that could give up blocks.

    Attributes:
        num_blocks: that it could give up.
        num_tokens_to_spare: how many tokens it can grow by until it needs the first of them itself.
    """

    request_id: str
    num_blocks: int
    num_tokens_to_spare: int


def choose_givers(givers: Iterable[Giver], num_blocks: int) -> list[str]:
    """Who gives up blocks so that `num_blocks` come together: those who will miss them last, and as few as possible.

    Returns:
        Their ids; none if all of them together have too few: vLLM then preempts a request, which frees more than enough.
    """
    chosen: list[str] = []
    for giver in sorted(givers, key=lambda one: (-one.num_tokens_to_spare, -one.num_blocks)):
        if num_blocks <= 0:
            break
        if giver.num_blocks and giver.num_tokens_to_spare >= SPARED_TOKENS:
            chosen.append(giver.request_id)
            num_blocks -= giver.num_blocks
    return chosen if num_blocks <= 0 else []


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a step of an engine can have at most.

    Attributes:
        num_draft_tokens: of a request.
        num_lookahead_tokens: slots of a request that a drafter inside vLLM writes beyond them; ours is not inside.
        num_step_tokens: of all requests.
    """

    num_draft_tokens: int
    num_lookahead_tokens: int
    num_step_tokens: int


class BlockReclaimer:
    """Makes room before a step is scheduled, and tells the workers of it afterwards.

    Two thresholds keep blocks from bouncing. Blocks are taken back when those that are free would not hold the next token of every
    running request; and from then on no draft token gets a new block until the free ones would hold a full chunk of every request.

    Args:
        manager: vLLM's KV-cache manager.
        counters: where to count.
        limits: of the engine.
        may_reclaim: whether blocks may be taken back at all (see `why_not`).
    """

    def __init__(
        self, manager: KVCacheManager, counters: SchedulerCounters, limits: StepLimits, may_reclaim: bool
    ) -> None:
        self._manager = manager
        self._blocks = TargetBlocks(manager)
        self._counters = counters
        self._limits = limits
        self._may_reclaim = may_reclaim
        # Of a request that has a block for each computed token, which are all but the newest.
        self._num_most_missing = self._blocks.num_for(1 + limits.num_lookahead_tokens + limits.num_draft_tokens)
        self._is_pressed = False
        self._changed: set[str] = set()

    def make_room(self, running: Sequence[Request]) -> dict[str, int] | None:
        """Take blocks back if the running requests' next tokens need them; say how many draft tokens each may have scheduled.

        Returns:
            Room for draft tokens by request id; None if every request can have a full chunk.
        """
        if self._changed:
            # Whoever has left had all its blocks freed, and is sent whole if it comes back.
            self._changed.intersection_update(request.request_id for request in running)
        if self._has_plenty(running):
            self._is_pressed = False
            return None
        needed = {one.request_id: self._blocks.num_missing(one, self._num_next(one)) for one in running}
        num_needed = sum(needed.values())
        if num_needed > self._blocks.num_free:
            self._is_pressed = True
            if self._may_reclaim:
                self._reclaim(running, num_needed - self._blocks.num_free)
        wanted = {one.request_id: self._blocks.num_missing(one, self._num_most(one)) for one in running}
        if sum(wanted.values()) <= self._blocks.num_free:
            self._is_pressed = False
            return None
        self._counters.num_short_steps += 1
        # For draft tokens: what they take can be taken back.
        num_spare = self._blocks.num_free - num_needed if self._may_reclaim and not self._is_pressed else 0
        rooms = {}
        for request in running:
            num_more = wanted[request.request_id] - needed[request.request_id]
            if 0 < num_more <= num_spare:
                num_spare -= num_more
                rooms[request.request_id] = self._limits.num_draft_tokens
            else:
                slots = self._blocks.num_slots(request, self._num_next(request))
                rooms[request.request_id] = max(0, slots - self._num_committed(request))
        return rooms

    def resend(self, scheduled: CachedRequestData, requests: Mapping[str, Request]) -> None:
        """Give the workers the complete block lists of those scheduled requests that gave up blocks.

        Args:
            requests: by id, all that the scheduler knows.

        Mutates: scheduled.
        """
        if not self._changed:
            return
        for index, request_id in enumerate(scheduled.req_ids):
            if request_id in self._changed:
                scheduled.new_block_ids[index] = self._manager.get_block_ids(request_id)
                scheduled.resumed_req_ids.add(request_id)
                scheduled.all_token_ids.setdefault(request_id, requests[request_id].all_token_ids.copy())
        self._changed.difference_update(scheduled.req_ids)

    def _has_plenty(self, running: Sequence[Request]) -> bool:
        """Whether a look at the number of requests says that all can have full chunks; spares most steps the count."""
        is_enough = self._blocks.num_free >= len(running) * self._num_most_missing
        return is_enough and all(one.num_computed_tokens >= one.num_tokens - 1 for one in running)

    def _reclaim(self, running: Sequence[Request], num_blocks: int) -> None:
        givers = {
            one.request_id: Giver(
                one.request_id,
                self._blocks.num_surplus(one, self._num_committed(one)),
                self._blocks.num_tokens_to_spare(self._num_committed(one)),
            )
            for one in running
        }
        chosen = set(choose_givers(givers.values(), num_blocks))
        for request in running:
            if request.request_id in chosen:
                self._take(request)

    def _take(self, request: Request) -> None:
        num_taken = self._blocks.take_surplus(request, self._num_committed(request))
        if num_taken:
            self._changed.add(request.request_id)
            self._counters.num_reclaims += 1
            self._counters.num_reclaimed_blocks += num_taken

    def _num_committed(self, request: Request) -> int:
        """Tokens whose slots a request keeps: the committed ones."""
        num_tokens: int = request.num_tokens
        return num_tokens + self._limits.num_lookahead_tokens

    def _num_next(self, request: Request) -> int:
        """Tokens whose slots a request must have to be scheduled next: fewer than it has in the middle of a long prefill."""
        num_computed_tokens: int = request.num_computed_tokens
        return min(self._num_committed(request), num_computed_tokens + self._limits.num_step_tokens)

    def _num_most(self, request: Request) -> int:
        return self._num_committed(request) + self._limits.num_draft_tokens
