"""The target's workers: vLLM's own, with our patches applied and our proposer called at the right moments.

Owns no logic. Used as `worker_cls` when `method: specbranch` is chosen; nothing here is imported otherwise. Runs in every target
worker process.
"""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu_worker import Worker

from vllm_specbranch.plugin import apply_worker_patches
from vllm_specbranch.proposer import Proposer
from vllm_specbranch.scheduler import SpecBranchSchedulerOutput

# The server starts together with the target; this bounds how long a slow one delays the engine's start.
START_TIMEOUT_S = 180.0


if TYPE_CHECKING:

    class _Base(Worker):
        """What the mix-in relies on; at run time it comes from the other base class."""

else:
    _Base = object


class _SpecBranchWorker(_Base):
    """What both workers add to vLLM's; comes before it in the order of base classes."""

    model_runner: Any
    _scheduler_status: Mapping[str, int | str] = MappingProxyType({})

    @property
    def _proposer(self) -> Proposer | None:
        drafter = getattr(getattr(self, "model_runner", None), "drafter", None)
        return drafter if isinstance(drafter, Proposer) else None

    def init_device(self) -> None:
        """Apply the patches before any model code runs, then set vLLM up and connect the proposer."""
        apply_worker_patches()
        super().init_device()
        if self._proposer is not None:
            self._proposer.attach(self.model_runner)
            # vLLM skips drafting for the whole batch when one request nears this length. The draft server watches its own
            # limit, per request.
            self.model_runner.effective_drafter_max_model_len = sys.maxsize

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the target, then ask it for what the length head needs, before it first runs."""
        super().load_model(*args, **kwargs)
        if self._proposer is not None:
            self._proposer.load_head(self.model_runner)

    def compile_or_warm_up_model(self) -> Any:
        """The last step of the start: by then the draft server has had the whole start-up time to load."""
        times = super().compile_or_warm_up_model()
        if self._proposer is not None:
            self._proposer.wait_until_up(START_TIMEOUT_S)
        return times

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Tell the draft server what begins and what has ended, then run the target."""
        if isinstance(scheduler_output, SpecBranchSchedulerOutput):
            self._scheduler_status = scheduler_output.scheduler_status
        if self._proposer is not None:
            self._proposer.begin_step(scheduler_output)
        return super().execute_model(scheduler_output)

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Collect the drafts, after the step's outputs have been queued."""
        if self._proposer is not None:
            return self._proposer.with_sample(self._proposer.take_draft_token_ids())
        return super().take_draft_token_ids()

    def specbranch_status(self) -> dict[str, Any]:
        """Counters and state of all sides; for `collective_rpc("specbranch_status")`. Empty on ranks that draft for nobody.

        `scheduler` is how the engine core's scheduler stood at the last step: it reports with each, since it runs in another
        process that answers no calls.
        """
        status = self._proposer.status() if self._proposer is not None else {}
        return status | {"scheduler": dict(self._scheduler_status)} if status else {}

    def shutdown(self) -> None:
        """End the draft server with the worker."""
        try:
            if self._proposer is not None:
                self._proposer.shutdown()
        finally:
            super().shutdown()


class SpecBranchGPUWorker(_SpecBranchWorker, Worker):
    """vLLM's GPU worker with our proposer."""


if current_platform.is_cpu():
    # vLLM's CPU worker cannot be imported where vLLM was built for another device.
    from vllm.v1.worker.cpu_worker import CPUWorker

    class SpecBranchCPUWorker(_SpecBranchWorker, CPUWorker):
        """vLLM's CPU worker with our proposer."""
