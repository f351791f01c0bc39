"""A bug of vLLM's CPU build: sampling parameters are garbage where one is needed per draft token.

`expand_batch_to_tokens` repeats each request's temperature, top_p and top_k for its draft tokens. Without Triton its
kernel is `_expand_kernel_impl` of `vllm/utils/cpu_triton_utils.py`, which hands the C++ code an int64 *copy* of any
tensor that is not int64, and drops the copy: the result is whatever `torch.empty` found. Temperature and top_p are
float32 and top_k is int32, so all three are hit, and every speculative method with it. The copy also cuts floats to
whole numbers, so copying it back would not do.

The kernel itself is bound into vLLM's kernel registry before our worker class exists, so the patch takes its only
caller.
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


PATCHES = (
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
