"""Our subclass of vLLM's scheduler: what the workers must know of a step beyond vLLM's own output.

Owns `SpecBranchSchedulerOutput` and how it is made: the distributions of sampled drafts wait here until their tokens are
scheduled, and then go to every worker, so that all ranks of a tensor-parallel target verify against the same. Runs in the
EngineCore process.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from vllm_specbranch.draft_distributions import ChunkDistributions, SampledDraftTokenIds


@dataclass
class SpecBranchSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output and what the proposer and the scorer need beside it.

    Attributes:
        num_waiting_requests: requests that wait to be scheduled. While there are any, the draft server does not delay a step.
        draft_distributions: by request id, of the sampled draft tokens that this step verifies.
    """

    num_waiting_requests: int = 0
    draft_distributions: dict[str, ChunkDistributions] = field(default_factory=dict)


class SpecBranchScheduler(Scheduler):
    """vLLM's scheduler, except that draft tokens never take the KV blocks of requests when these run short."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draft_distributions: dict[str, ChunkDistributions] = {}

    def schedule(self, throttle_prefills: bool = False) -> SpecBranchSchedulerOutput:
        """Schedule as vLLM does; tell the workers how many requests wait, and what their draft tokens were drawn from."""
        self._trim_drafts()
        output = super().schedule(throttle_prefills)
        _, num_waiting = self.get_request_counts()
        return SpecBranchSchedulerOutput(
            **vars(output),
            num_waiting_requests=num_waiting,
            draft_distributions=self._distributions_of(output),
        )

    def _trim_drafts(self) -> None:
        """When KV blocks run short, cut every chunk to the slots that its request already holds.

        vLLM would preempt a request for the blocks of draft tokens, and drop the preempted one's drafts. With chunks of different
        lengths that is lossy: whether a token is verified would depend on how long a chunk was drawn after it (rule 2 of the
        design, section 3). Room and condition here do not look at the chunk that they cut.
        """
        drafted = [request for request in self.running if request.spec_token_ids]
        if not drafted:
            return
        most = self.num_spec_tokens + self.num_lookahead_tokens
        num_wanted = sum(self._num_missing_blocks(request, most) for request in self.running)
        if num_wanted <= self.kv_cache_manager.block_pool.get_num_free_blocks():
            return
        for request in drafted:
            room = max(0, self._num_slots(request) - request.num_tokens - self.num_lookahead_tokens)
            if room < len(request.spec_token_ids):
                request.spec_token_ids = request.spec_token_ids[:room]

    def _block_counts(self, request: Request) -> Iterator[tuple[int, int]]:
        """(blocks held, block size) per KV cache group."""
        groups = self.kv_cache_config.kv_cache_groups
        tables = self.kv_cache_manager.get_blocks(request.request_id).blocks
        for group, table in zip(groups, tables, strict=True):
            yield len(table), group.kv_cache_spec.block_size

    def _num_slots(self, request: Request) -> int:
        return min(count * size for count, size in self._block_counts(request))

    def _num_missing_blocks(self, request: Request, num_more: int) -> int:
        """Blocks that a running request needs for its committed tokens and `num_more` draft tokens, beyond those it holds."""
        num_tokens = request.num_tokens + num_more
        return sum(max(0, -(-num_tokens // size) - count) for count, size in self._block_counts(request))

    def _distributions_of(self, output: SchedulerOutput) -> dict[str, ChunkDistributions]:
        """Of the draft tokens that a step verifies, those whose distributions are known and belong to just these tokens."""
        for request_id in output.finished_req_ids:
            self._draft_distributions.pop(request_id, None)
        if not self._draft_distributions:
            return {}
        found = {}
        for request_id, token_ids in output.scheduled_spec_decode_tokens.items():
            # vLLM schedules draft tokens once, and forgets them.
            known = self._draft_distributions.pop(request_id, None)
            if known is None or known.position != self.requests[request_id].num_tokens:
                continue
            if known.num_matching(token_ids):
                found[request_id] = known
        return found

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Take in draft tokens as vLLM does, and what they were drawn from."""
        super().update_draft_token_ids(draft_token_ids)
        if not isinstance(draft_token_ids, SampledDraftTokenIds):
            return
        for request_id in draft_token_ids.req_ids:
            known = draft_token_ids.distributions.get(request_id)
            if known is None or request_id not in self.requests:
                self._draft_distributions.pop(request_id, None)
            else:
                self._draft_distributions[request_id] = known
