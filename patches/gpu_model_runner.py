"""Hook into vLLM's V1 model runner (CPU and GPU): the draft distributions that verification uses."""

import functools
from collections.abc import Callable
from typing import Any

from vllm_specbranch.patching import Patch


def _ask_scorer(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _get_spec_decode_draft_probs(self: Any, spec_decode_metadata: Any) -> Any:
        # Not at the top: the proposer imports what a worker has, and records are read in every process.
        from vllm_specbranch.proposer import Proposer

        if not isinstance(self.drafter, Proposer):
            return original(self, spec_decode_metadata)
        return self.drafter.scorer.draft_probs(
            self.input_batch.req_ids, spec_decode_metadata.num_draft_tokens, self.device
        )

    return _get_spec_decode_draft_probs


PATCHES = (
    Patch(
        symbol="vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_spec_decode_draft_probs",
        kind="wrap",
        process="worker",
        why="A drafted token must be verified against the distribution that it was drawn from; a custom proposer has no"
        " other way to hand it over, and vLLM's own drops it for the whole batch when one request has none.",
        remove_when="vLLM's custom proposers can return draft probabilities.",
        fingerprints={"0.32.0": "c0428a03744bf6a8b6f60e2f368fb44a19c372f6c63b6d47c29310687a2f1320"},
        make=_ask_scorer,
    ),
)
