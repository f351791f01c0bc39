"""A bug of vLLM without Triton: top-k on a batch in which no request has draft tokens.

With a speculative config every step goes through the rejection sampler, which applies the sampling parameters to one
row per draft token. A step without drafts has no rows; if its requests use top_k and no top_p, `apply_top_k_only`
calls `k.max()` on an empty tensor, which raises, and the engine dies.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_specbranch.patching import Patch


def _pass_empty(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(original)
    def apply_top_k_only(logits: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return logits if logits.shape[0] == 0 else original(logits, k)

    return apply_top_k_only


PATCHES = (
    Patch(
        symbol="vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_only",
        kind="wrap",
        process="worker",
        why="Without Triton (CPU) a step with no draft tokens, with top_k and without top_p, raises: `k.max()` of an"
        " empty tensor.",
        remove_when="vLLM's `apply_top_k_only` takes logits without rows, as `apply_top_k_top_p_triton` does.",
        fingerprints={"0.32.0": "4af02a4dad88c663c45133442ce31e091546a9e164eaa8f22244c30dca3220bb"},
        make=_pass_empty,
    ),
)
