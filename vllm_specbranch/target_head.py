"""The length head at work on the target's side: one step's features, who looks at them, and what the head says.

Owns the state between the target's forward and the commits that go out. Does not own the rows (`head_features`), the network
(`length_head`), or what a class means for the next draft (`planner`). Runs in every target worker; only the output rank assembles
features and has a head. No decision here depends on a drafted token: z is a function of the committed ones (rule 2 of the design,
section 3).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_features import HeadFeatures, sampled_rows, take_hidden_states_of
from vllm_specbranch.length_head import FIELD, LengthHead, load_head
from vllm_specbranch.metrics import EngineCounters

# Request ids, their numbers of committed tokens (the newest included), and their features `[n, num_features]`.
FeatureObserver = Callable[[list[str], list[int], torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Step:
    """What a forward left for the head."""

    num_scheduled: Mapping[str, int]
    num_draft_tokens: Sequence[int] | None
    hidden_states: Sequence[torch.Tensor]
    embeddings: torch.Tensor


class TargetHead:
    """Features of each step and, where there is a trained head, a class per request.

    Args:
        layers: after which layers the target's hidden states are taken; none: nothing is done at all.
        folder: of the trained head; None: features only.
        counters: updated.
    """

    def __init__(self, layers: tuple[int, ...], folder: str | None, counters: EngineCounters) -> None:
        self._layers = layers
        self._folder = folder
        self._counters = counters
        self._features: HeadFeatures | None = None
        self._head: LengthHead | None = None
        self._step: _Step | None = None

    def load(self, runner: Any, is_output_rank: bool) -> None:
        """Have the loaded target return its hidden states, and load the head; on every rank.

        Raises:
            ConfigError: the target cannot, or the head is not for its embeddings.
        """
        if not self._layers:
            return
        self._features = take_hidden_states_of(runner, self._layers)
        with torch.inference_mode():
            embedding_size = self._features.embeddings([0]).shape[1]
        if self._folder is None or not is_output_rank:
            return
        head, spec = load_head(self._folder)
        if spec.embedding_size != embedding_size:
            sizes = f"size of the target's embeddings: {spec.embedding_size} in training, {embedding_size} here"
            raise ConfigError(self._folder, f"a head trained for this pair ({sizes})", FIELD)
        self._head = head.to(runner.device).freeze()

    def take(
        self,
        num_scheduled: Mapping[str, int],
        num_draft_tokens: Sequence[int] | None,
        sampled: Sequence[Sequence[int]],
        hidden_states: Sequence[torch.Tensor],
        is_output_rank: bool,
    ) -> None:
        """Take what a forward returned; on every rank, in every step.

        The embedding is a collective. Nothing that only one rank can know may come before it, or the others wait for ever.

        Args:
            num_scheduled, num_draft_tokens, sampled: as for `sampled_rows`.
            hidden_states: per layer `[num_tokens, hidden_size]`.
            is_output_rank: whether they are needed here.
        """
        self._step = None
        newest = [tokens[-1] for tokens in sampled if tokens]
        if self._features is None or not newest:
            return
        started_s = time.perf_counter()
        embeddings = self._features.embeddings(newest)
        if is_output_rank:
            self._step = _Step(num_scheduled, num_draft_tokens, hidden_states, embeddings)
            self._counters.head_s += time.perf_counter() - started_s

    def classes(
        self,
        request_ids: Sequence[str],
        sampled: Sequence[Sequence[int]],
        num_tokens: Sequence[int] | npt.NDArray[np.int32],
        observer: FeatureObserver | None,
    ) -> dict[str, int]:
        """What the head says of each request that got tokens in this step; on the output rank.

        Args:
            request_ids, sampled, num_tokens: per row of the batch: id, committed tokens of this step, committed tokens in all.
            observer: called with the features first; the time that it takes is not counted.

        Returns:
            Class per request id; empty without a trained head.
        """
        step, self._step = self._step, None
        if step is None or self._features is None or (self._head is None and observer is None):
            return {}
        started_s = time.perf_counter()
        rows = sampled_rows(request_ids, step.num_scheduled, step.num_draft_tokens, sampled)
        z = self._features.assemble(step.hidden_states, rows, step.embeddings)
        found = self._head.classes(z) if self._head is not None else []
        self._counters.observe_classes(found)
        self._counters.head_s += time.perf_counter() - started_s
        names = [request_ids[row] for row, tokens in enumerate(sampled) if tokens]
        if observer is not None:
            observer(names, [int(num_tokens[row]) for row, tokens in enumerate(sampled) if tokens], z)
        return dict(zip(names, found, strict=True)) if found else {}
