"""Two bugs of vLLM's CPU build: garbage sampling parameters, and padding that is taken for a draft token.

The first: sampling parameters are garbage where one is needed per draft token.

`expand_batch_to_tokens` repeats each request's temperature, top_p and top_k for its draft tokens. Without Triton its
kernel is `_expand_kernel_impl` of `vllm/utils/cpu_triton_utils.py`, which hands the C++ code an int64 *copy* of any
tensor that is not int64, and drops the copy: the result is whatever `torch.empty` found. Temperature and top_p are
float32 and top_k is int32, so all three are hit, and every speculative method with it. The copy also cuts floats to
whole numbers, so copying it back would not do.

The kernel itself is bound into vLLM's kernel registry before our worker class exists, so the patch takes its only
caller.

The second: vLLM pads a request that comes to a speculative batch with one token left to compute by draft tokens -1.
The Triton kernel rejects these; the C++ one looks their probability up at index -1, which is the last token of the row
before, and may accept them. The token that then comes out belongs one position later.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_specbranch.patching import Patch


def _expand_row_numbers(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(original)
    def expand_batch_to_tokens(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        if not x.is_cpu or x.dtype == torch.int64:
            return original(x, cu_num_tokens, num_tokens, replace_from, replace_to)
        # Upstream is right for int64, so let it expand the numbers of the rows and look the values up.
        rows = original(torch.arange(x.shape[0], dtype=torch.int64), cu_num_tokens, num_tokens)
        expanded = x[rows]
        return expanded.masked_fill_(expanded == replace_from, replace_to)

    return expand_batch_to_tokens


def _reject_padding(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(original)
    def rejection_sample(
        draft_token_ids: torch.Tensor,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: torch.Tensor,
        draft_probs: torch.Tensor | None,
        target_logits: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        is_padding = draft_token_ids < 0
        if target_logits.is_cpu and bool(is_padding.any()):
            if draft_probs is None:
                draft_probs = torch.zeros(target_logits.shape, dtype=torch.float32)
                draft_probs.scatter_(1, draft_token_ids.clamp(min=0).long().unsqueeze(1), 1.0)
            # Drawn with probability 0, so rejected when sampling; not the best token, so rejected when greedy.
            draft_probs = draft_probs.masked_fill(is_padding.unsqueeze(1), 0.0)
            another = (target_logits.argmax(dim=-1) + 1) % target_logits.shape[-1]
            draft_token_ids = torch.where(is_padding, another.to(draft_token_ids.dtype), draft_token_ids)
        return original(
            draft_token_ids,
            num_draft_tokens,
            max_spec_len,
            cu_num_draft_tokens,
            draft_probs,
            target_logits,
            *args,
            **kwargs,
        )

    return rejection_sample


PATCHES = (
    Patch(
        symbol="vllm.v1.sample.rejection_sampler:rejection_sample",
        kind="wrap",
        process="worker",
        why="Without Triton (CPU) padded draft tokens (-1) of a sampled request can be accepted: the C++ kernel reads"
        " their probability from the row before.",
        remove_when="vLLM's C++ rejection kernel rejects draft tokens below 0, as its Triton kernel does.",
        fingerprints={"0.32.0": "dd7297cb744d9a776d6b74ccbd4b9926326422ac864e88287f491386ab1b6e52"},
        make=_reject_padding,
    ),
    Patch(
        symbol="vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        kind="wrap",
        process="worker",
        why="Without Triton (CPU) it returns uninitialised memory for every dtype but int64: temperature, top_p"
        " and top_k of all sampled requests (`_expand_kernel_impl` in `vllm/utils/cpu_triton_utils.py`"
        " writes into a copy).",
        remove_when="vLLM's `_expand_kernel_impl` keeps the dtype and writes into its output.",
        fingerprints={"0.32.0": "ef896c2fe058ae7033bbb8916d1917c91e5f3724a66adf5a7e168e544449384d"},
        make=_expand_row_numbers,
    ),
)
