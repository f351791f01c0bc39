"""Our subclass of vLLM's scheduler: what the workers must know of a step beyond vLLM's own output.

Owns `SpecBranchSchedulerOutput` and how it is made: the distributions of sampled drafts wait here until their tokens are
scheduled, and then go to every worker, so that all ranks of a tensor-parallel target verify against the same. Runs in the
EngineCore process.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

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
    """vLLM's scheduler; decides nothing differently."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draft_distributions: dict[str, ChunkDistributions] = {}

    def schedule(self, throttle_prefills: bool = False) -> SpecBranchSchedulerOutput:
        """Schedule as vLLM does; tell the workers how many requests wait, and what their draft tokens were drawn from."""
        output = super().schedule(throttle_prefills)
        _, num_waiting = self.get_request_counts()
        return SpecBranchSchedulerOutput(
            **vars(output),
            num_waiting_requests=num_waiting,
            draft_distributions=self._distributions_of(output),
        )

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
