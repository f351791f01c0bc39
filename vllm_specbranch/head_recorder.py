"""Records rounds to train a length head on, in the target's worker: features, drafts and outcomes, joined by request and position.

Owns the join. Features come from `Proposer.feature_observer`, drafts from `Proposer.draft_observer`. Only full chunks count:
one that the scheduler cut, or that never came, says nothing of what the target would have accepted.

    step i     features after p committed tokens | draft at p, gamma tokens
    step i+1   p + a + 1 committed tokens, gamma were verified              -> one round: these features, a accepted
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_specbranch.head_data import Rounds, save_rounds
from vllm_specbranch.messages import Draft


@dataclass(slots=True)
class _Open:
    """A round that has begun, after `position` committed tokens. `top_probs` are those of a full chunk, None before one."""

    position: int
    features: torch.Tensor
    top_probs: list[float] | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    request: int
    features: torch.Tensor
    top_probs: list[float]
    accepted: int


class RoundRecorder:
    """The rounds of one run.

    Args:
        gamma: draft tokens of a full chunk.
        dtype: of the target, in which features are kept: they were of it, so nothing is lost.
    """

    def __init__(self, gamma: int, dtype: torch.dtype = torch.float32) -> None:
        self._gamma = gamma
        self._dtype = dtype
        self._open: dict[str, _Open] = {}
        self._rows: list[_Row] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def has_seen_any(self) -> bool:
        """Whether any request got tokens; never on a rank that has nothing to do with drafts."""
        return bool(self._open)

    def observe_features(
        self,
        request_ids: Sequence[str],
        num_tokens: Sequence[int],
        features: torch.Tensor,
        num_verified: Sequence[int],
    ) -> None:
        """The requests that got tokens in one engine step.

        Args:
            request_ids: `[n]`; vLLM may have appended to the number that each was named by.
            num_tokens: `[n]` committed tokens of each, the newest included.
            features: `[n, num_features]`.
            num_verified: `[n]` draft tokens that this step verified.
        """
        kept = features.detach().to("cpu", self._dtype, copy=True)
        for name, position, row, verified in zip(request_ids, num_tokens, kept, num_verified, strict=True):
            before = self._open.get(name)
            if before is not None and before.top_probs is not None and verified == self._gamma:
                number = int(name.partition("-")[0])
                self._rows.append(_Row(number, before.features, before.top_probs, position - before.position - 1))
            self._open[name] = _Open(position, row)

    def observe_draft(self, draft: Draft) -> None:
        """A draft on its way to the scheduler."""
        place = self._open.get(draft.request_id)
        if place is not None and place.position == draft.position and len(draft.tokens) == self._gamma:
            assert len(draft.top_probs) == self._gamma, "the draft server was not asked for top probabilities"
            place.top_probs = draft.top_probs

    def rounds(self, first_prompt: int, temperature: float) -> Rounds:
        """All that was recorded, request by request, each in the order of its rounds.

        Args:
            first_prompt: index of the run's first prompt.
            temperature: of the run.
        """
        rows = sorted(self._rows, key=lambda row: row.request)
        count = len(rows)
        return Rounds(
            features=torch.stack([row.features for row in rows]) if rows else torch.empty(0, 0),
            top_probs=torch.tensor([row.top_probs for row in rows], dtype=torch.float32).view(count, self._gamma),
            accepted=torch.tensor([row.accepted for row in rows], dtype=torch.int64),
            prompts=torch.tensor([first_prompt + row.request for row in rows], dtype=torch.int64),
            temperatures=torch.full((count,), temperature, dtype=torch.float32),
        )

    def save(self, path: Path, first_prompt: int, temperature: float) -> int:
        """Write a shard; returns how many rounds it holds."""
        save_rounds(path, self.rounds(first_prompt, temperature))
        return len(self)
