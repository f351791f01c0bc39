"""The target side of verification: which drafts are verified, against which distribution, and how it went.

Owns the memory of what was handed to the scheduler and the hand-over to vLLM's rejection sampler. In this version the draft
model drafts greedily, so every draft token is verified as one-hot: its probability under the draft is 1 at its own id, which is
lossless however it was chosen (rule 1 of the design, section 3). Runs in the target's worker.
"""

from collections.abc import Mapping, Sequence

from vllm_specbranch.metrics import EngineCounters


class Scorer:
    """Keeps the books of verification.

    Args:
        counters: updated at each round.
    """

    def __init__(self, counters: EngineCounters) -> None:
        self._counters = counters
        self._handed: dict[str, list[int]] = {}
        self._scheduled: dict[str, int] = {}

    def hand_over(self, request_id: str, token_ids: list[int]) -> None:
        """Remember the draft tokens that go to the scheduler for a request."""
        self._handed[request_id] = token_ids

    def begin_step(self, scheduled: Mapping[str, Sequence[int]]) -> None:
        """Take in which draft tokens this engine step verifies.

        The scheduler may have cut them short (token budget, length) and a grammar may have replaced some by -1; anything else
        that differs from what was handed over is counted as foreign.

        Args:
            scheduled: per request the draft token ids under verification, -1 for invalidated ones.
        """
        self._scheduled = {}
        for request_id, token_ids in scheduled.items():
            valid = [token for token in token_ids if token >= 0]
            self._scheduled[request_id] = len(valid)
            if self._handed.get(request_id, [])[: len(valid)] != valid:
                self._counters.num_foreign_drafts += 1

    def num_scheduled(self, request_id: str) -> int:
        """How many draft tokens of a request this engine step verifies."""
        return self._scheduled.get(request_id, 0)

    def observe(self, request_id: str, num_sampled: int) -> None:
        """Take in the outcome of one request: `num_sampled` committed tokens, of which the last is not a draft token."""
        num_draft_tokens = self.num_scheduled(request_id)
        self._counters.observe_round(num_draft_tokens, min(num_draft_tokens, num_sampled - 1))

    def forget(self, request_id: str) -> None:
        """Drop what is known of a finished request."""
        self._handed.pop(request_id, None)

    def draft_probs(self, request_ids: Sequence[str], metadata: object) -> None:
        """The draft's distributions for vLLM's rejection sampler: None, which it takes as one-hot at each draft token."""
        del request_ids, metadata
