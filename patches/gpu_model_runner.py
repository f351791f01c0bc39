"""Hooks into vLLM's V1 model runner: the draft distributions that verification uses, the target's hidden states, a bug on CPUs.

The bug: a request with a seed whose prompt is prefilled in chunks ends the engine. After each chunk but the last vLLM
throws the sampled token away and turns the request's random generator back (`set_offset`), which generators on a CPU
cannot do.
"""

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


def _hand_over_hidden_states(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def propose_draft_token_ids(
        self: Any,
        scheduler_output: Any,
        sampled_token_ids: Any,
        sampling_metadata: Any,
        hidden_states: Any,
        sample_hidden_states: Any,
        aux_hidden_states: Any,
        spec_decode_metadata: Any,
        *rest: Any,
    ) -> Any:
        from vllm_specbranch.proposer import Proposer

        if aux_hidden_states is not None and isinstance(self.drafter, Proposer):
            num_draft_tokens = spec_decode_metadata.num_draft_tokens if spec_decode_metadata is not None else None
            self.drafter.take_hidden_states(
                scheduler_output.num_scheduled_tokens, num_draft_tokens, sampled_token_ids, aux_hidden_states
            )
        return original(
            self,
            scheduler_output,
            sampled_token_ids,
            sampling_metadata,
            hidden_states,
            sample_hidden_states,
            aux_hidden_states,
            spec_decode_metadata,
            *rest,
        )

    return propose_draft_token_ids


def _spare_generators(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        # A generator that is not used need not be turned back: rows whose token is thrown away do without their own.
        generators = self.input_batch.generators
        spared: dict[int, Any] = {}
        if generators and self.device.type == "cpu":
            discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
            spared = {row: generators.pop(row) for row in discarded if row in generators}
        try:
            return original(self, grammar_output)
        finally:
            generators.update(spared)

    return sample_tokens


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
    Patch(
        symbol="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
        kind="wrap",
        process="worker",
        why="On CPU a request with a seed and a chunked prefill ends the engine: `_bookkeeping_sync` calls `set_offset`"
        " on a generator that has none. Plain vLLM is hit as well.",
        remove_when="vLLM's `_bookkeeping_sync` leaves CPU generators alone or restores their state.",
        fingerprints={"0.32.0": "de9d8fe0b0e65a1635ba1c6c6a0ddfb5478257ae1cd2f17781ef9efe7947a961"},
        make=_spare_generators,
    ),
    Patch(
        symbol="vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids",
        kind="wrap",
        process="worker",
        why="The length head reads the target's auxiliary hidden states, which vLLM hands to its own proposers only.",
        remove_when="vLLM's custom proposers are given the auxiliary hidden states.",
        fingerprints={"0.32.0": "980d46e41814827a464046a8231ca3b7e379831b67def971483559f26065031f"},
        make=_hand_over_hidden_states,
    ),
)
