"""What the fault test adds to the target's worker (vLLM's `worker_extension_cls`): a slower target, and a look at the proposer.

Its calls travel by name, so nothing is pickled. Runs in the target's worker.
"""

import time
from collections.abc import Callable
from typing import Any


class FaultWorker:
    """A base class that vLLM adds to the worker's; called by `collective_rpc`."""

    model_runner: Any
    longest_s: dict[str, float]

    def slow_target_down(self, seconds: float) -> None:
        """Make every step of the target so much longer, as a larger model would be, for good."""
        execute = self.model_runner.execute_model

        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return execute(*args, **kwargs)

        self.model_runner.execute_model = slow

    def watch_proposer(self) -> None:
        """Note how long vLLM is held up in each of the proposer's methods, from now on."""
        self.longest_s = {}
        proposer = self.model_runner.drafter
        for name in ("begin_step", "propose", "take_draft_token_ids"):
            setattr(proposer, name, self._timed(name, getattr(proposer, name)))

    def look_at_proposer(self) -> dict[str, Any]:
        """Counters, state of the line, and the longest times since the last look; asks nobody, so it never waits."""
        proposer = self.model_runner.drafter
        longest_s, self.longest_s = self.longest_s, {}
        link = proposer._link
        assert link is not None, "the proposer has given up"
        counters = proposer.counters.as_dict()
        return {"is_up": link.is_up, "server_pid": link.server_pid, "longest_s": longest_s, "engine": counters}

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started_s = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.longest_s[name] = max(self.longest_s.get(name, 0.0), time.perf_counter() - started_s)

        return timed
