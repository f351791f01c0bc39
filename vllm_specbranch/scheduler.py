"""Our subclass of vLLM's scheduler: what the workers must know of a step beyond vLLM's own output.

Owns `SpecBranchSchedulerOutput` and how it is made: the distributions of sampled drafts wait here until their tokens are
scheduled, and then go to every worker, so that all ranks of a tensor-parallel target verify against the same. What happens when
KV blocks run short is in `reclaim`. Runs in the EngineCore process.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds

from vllm_specbranch import stat_logger
from vllm_specbranch.draft_distributions import ChunkDistributions, SampledDraftTokenIds
from vllm_specbranch.metrics import SchedulerCounters
from vllm_specbranch.reclaim import BlockReclaimer, StepLimits, why_not
from vllm_specbranch.snapshots import MetricsFeed, SnapshotMaker
from vllm_specbranch.speculative_config import SpecBranchSpeculativeConfig

logger = logging.getLogger("vllm.specbranch.scheduler")


@dataclass
class SpecBranchSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output and what the proposer and the scorer need beside it.

    Attributes:
        num_waiting_requests: requests that wait to be scheduled. While there are any, the draft server does not delay a step.
        draft_distributions: by request id, of the sampled draft tokens that this step verifies.
        scheduler_status: whether blocks are reclaimed, and the counters since the start; the workers answer questions about them.
    """

    num_waiting_requests: int = 0
    draft_distributions: dict[str, ChunkDistributions] = field(default_factory=dict)
    scheduler_status: dict[str, int | str] = field(default_factory=dict)


class SpecBranchScheduler(Scheduler):
    """vLLM's scheduler, except that draft tokens never take the KV blocks of requests when these run short."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draft_distributions: dict[str, ChunkDistributions] = {}
        self._snapshots = SnapshotMaker()
        self._metrics_feed = MetricsFeed(self._snapshots.make)
        self._counters = SchedulerCounters()
        self._reclaim_blocks = self._whether_to_reclaim()
        self._reclaimer = BlockReclaimer(
            self.kv_cache_manager,
            self._counters,
            StepLimits(self.num_spec_tokens, self.num_lookahead_tokens, self.max_num_scheduled_tokens),
            may_reclaim=self._reclaim_blocks == "on",
        )

    def _whether_to_reclaim(self) -> str:
        """Return "on", or "off" and why."""
        speculative = self.vllm_config.speculative_config
        assert isinstance(speculative, SpecBranchSpeculativeConfig)
        if not speculative.specbranch.reclaim_blocks:
            return "off"
        reason = why_not(self)
        if reason is None:
            return "on"
        logger.info("reclaim_blocks is off: %s.", reason)
        return f"off: {reason}"

    def schedule(self, throttle_prefills: bool = False) -> SpecBranchSchedulerOutput:
        """Schedule as vLLM does; tell the workers how many requests wait, and what their draft tokens were drawn from."""
        self._make_room()
        output = super().schedule(throttle_prefills)
        self._reclaimer.resend(output.scheduled_cached_reqs, self.requests)
        self._counters.num_preemptions += len(output.preempted_req_ids or ())
        _, num_waiting = self.get_request_counts()
        return SpecBranchSchedulerOutput(
            **vars(output),
            num_waiting_requests=num_waiting,
            draft_distributions=self._distributions_of(output),
            scheduler_status={"reclaim_blocks": self._reclaim_blocks, **self._counters.as_dict()},
        )

    def _make_room(self) -> None:
        """When KV blocks run short, take back what can be, and cut chunks to what their requests hold or can be given.

        vLLM would preempt a request for the blocks of draft tokens, and drop the preempted one's drafts. With chunks of different
        lengths that is lossy: whether a token is verified would depend on how long a chunk was drawn after it (rule 2 of the
        design, section 3). Room and condition here do not look at the chunk that they cut.
        """
        rooms = self._reclaimer.make_room(self.running)
        if rooms is None:
            return
        for request in self.running:
            num_cut = len(request.spec_token_ids) - rooms[request.request_id]
            if num_cut > 0:
                request.spec_token_ids = request.spec_token_ids[:-num_cut]
                self._counters.num_cut_draft_tokens += num_cut

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
        if draft_token_ids.sample is not None:
            self._snapshots.update(draft_token_ids.sample)
        for request_id in draft_token_ids.req_ids:
            known = draft_token_ids.distributions.get(request_id)
            if known is None or request_id not in self.requests:
                self._draft_distributions.pop(request_id, None)
            else:
                self._draft_distributions[request_id] = known

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """VLLM's statistics of a step; every now and then the news of our metrics ride on them to an API server."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            is_idle = not self.has_unfinished_requests()
            stat_logger.put(self._metrics_feed.take(time.monotonic(), self._counters.as_dict(), is_idle=is_idle), stats)
        return stats
