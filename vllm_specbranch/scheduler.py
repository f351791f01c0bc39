"""Our subclass of vLLM's scheduler: what the workers must know of a step beyond vLLM's own output.

Owns `SpecBranchSchedulerOutput` and how it is made. Runs in the EngineCore process.
"""

from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler


@dataclass
class SpecBranchSchedulerOutput(SchedulerOutput):
    """vLLM's scheduler output and what the proposer needs beside it.

    Attributes:
        num_waiting_requests: requests that wait to be scheduled. While there are any, the draft server does not delay a step.
    """

    num_waiting_requests: int = 0


class SpecBranchScheduler(Scheduler):
    """vLLM's scheduler; decides nothing differently."""

    def schedule(self, throttle_prefills: bool = False) -> SpecBranchSchedulerOutput:
        """Schedule as vLLM does and tell the workers how many requests wait."""
        output = super().schedule(throttle_prefills)
        _, num_waiting = self.get_request_counts()
        return SpecBranchSchedulerOutput(**vars(output), num_waiting_requests=num_waiting)
