"""The target side of verification: which drafts are verified, against which distribution, and how it went.

Owns the memory of what was handed to the scheduler and the hand-over to vLLM's rejection sampler. A draft token is verified
against exactly the distribution that it was drawn from; one without (a greedy draft, a lost or damaged distribution, ids that do
not match) as one-hot, which is lossless however it was chosen (rule 1 of the design, section 3). Runs in every target worker:
under tensor parallelism each rank verifies for itself, from the same scheduler output.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_specbranch.draft_distributions import ChunkDistributions
from vllm_specbranch.metrics import EngineCounters

_NOTHING: Mapping[str, ChunkDistributions] = {}


class Scorer:
    """Keeps the books of verification, and makes the rows that vLLM's rejection sampler takes.

    Args:
        counters: updated at each round.
        vocab_size: of the target.
    """

    def __init__(self, counters: EngineCounters, vocab_size: int) -> None:
        self._counters = counters
        self._vocab_size = vocab_size
        self._handed: dict[str, list[int]] = {}
        self._scheduled: dict[str, Sequence[int]] = {}
        self._sampled: dict[str, tuple[ChunkDistributions, int]] = {}

    def hand_over(self, request_id: str, token_ids: list[int]) -> None:
        """Remember the draft tokens that go to the scheduler for a request."""
        self._handed[request_id] = token_ids

    def begin_step(
        self,
        scheduled: Mapping[str, Sequence[int]],
        distributions: Mapping[str, ChunkDistributions] = _NOTHING,
    ) -> None:
        """Take in which draft tokens this engine step verifies.

        The scheduler may have cut them short (token budget, length) and a grammar may have replaced some by -1.

        Args:
            scheduled: per request the draft token ids under verification, -1 for invalidated ones.
            distributions: what came with the scheduler's output for the sampled ones.
        """
        self._scheduled = dict(scheduled)
        self._sampled = {}
        for request_id, token_ids in scheduled.items():
            known = distributions.get(request_id)
            if known is not None and (count := known.num_matching(token_ids)):
                self._sampled[request_id] = (known, count)

    def check_origin(self) -> None:
        """Count drafts under verification that are not what was handed over; only where `hand_over` is called."""
        for request_id, token_ids in self._scheduled.items():
            valid = [token for token in token_ids if token >= 0]
            if self._handed.get(request_id, [])[: len(valid)] != valid:
                self._counters.num_foreign_drafts += 1

    def num_scheduled(self, request_id: str) -> int:
        """How many draft tokens of a request this engine step verifies."""
        return sum(token >= 0 for token in self._scheduled.get(request_id, ()))

    def observe(self, request_id: str, num_sampled: int) -> None:
        """Take in the outcome of one request: `num_sampled` committed tokens, of which the last is not a draft token."""
        num_draft_tokens = self.num_scheduled(request_id)
        self._counters.observe_round(num_draft_tokens, min(num_draft_tokens, num_sampled - 1))
        if request_id in self._sampled:
            _, count = self._sampled[request_id]
            self._counters.num_sampled_draft_tokens += count
            self._counters.num_sampled_outcomes += min(count, num_sampled)

    def forget(self, request_id: str) -> None:
        """Drop what is known of a finished request."""
        self._handed.pop(request_id, None)

    def draft_probs(
        self, request_ids: Sequence[str], num_draft_tokens: Sequence[int], device: torch.device
    ) -> torch.Tensor | None:
        """The draft's distributions for vLLM's rejection sampler.

        Args:
            request_ids: `[num_reqs]` in the order of the batch.
            num_draft_tokens: `[num_reqs]` draft tokens under verification, in the same order.
            device: of the target.

        Returns:
            `[sum(num_draft_tokens), vocab_size]` float32, made anew in each step that verifies a sampled draft; None if there is
            none, which vLLM takes as one-hot at each draft token.
        """
        if not self._sampled:
            return None
        cells: list[np.ndarray] = []
        values: list[np.ndarray] = []
        first = 0
        for request_id, count in zip(request_ids, num_draft_tokens, strict=False):
            known, num_matching = self._sampled.get(request_id, (None, 0))
            num_matching = min(num_matching, count)
            if known is not None and num_matching:
                ids, probs = known.rows(num_matching)
                starts = (first + np.arange(num_matching, dtype=np.int64)) * self._vocab_size
                cells.append((ids + starts[:, None]).ravel())
                values.append(probs.ravel())
            tokens = self._scheduled.get(request_id, ())[num_matching:count]
            # A row of zeros at -1 (padding, or cut by a grammar): rejected, and the target's own distribution is sampled.
            one_hot = [(first + num_matching + index, token) for index, token in enumerate(tokens) if token >= 0]
            if one_hot:
                cells.append(np.array([row * self._vocab_size + token for row, token in one_hot], np.int64))
                values.append(np.ones(len(one_hot), np.float32))
            first += count
        if not cells:
            return None
        dense = torch.zeros(first * self._vocab_size, dtype=torch.float32, device=device)
        where = torch.from_numpy(np.concatenate(cells)).to(device, non_blocking=True)
        dense.index_add_(0, where, torch.from_numpy(np.concatenate(values)).to(device, non_blocking=True))
        return dense.view(first, self._vocab_size)
