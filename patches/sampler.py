"""A bug of vLLM with every speculative method: `min_tokens` forbids stop tokens to the bonus token for too long.

While a request has fewer than `min_tokens` tokens, its stop tokens are masked. `MinTokensLogitsProcessor` counts the
committed tokens only. For draft tokens the rejection sampler counts on (`apply_with_spec_decode`), for the bonus token
behind them it does not: a request that has 3 tokens, `min_tokens` 5 and 4 draft tokens cannot end with its 8th token,
and goes on with another one. Plain vLLM ends there.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

from vllm_specbranch.patching import Patch


class _AtBonusToken:
    """Stands in for a `MinTokensLogitsProcessor` where the rows of the logits are those of the bonus tokens.

    Args:
        processor: vLLM's; stays as it is.
        drafts: `[num_reqs]` the draft tokens of each request, which come before its bonus token.
    """

    def __init__(self, processor: Any, drafts: Sequence[Sequence[int]]) -> None:
        self._processor = copy.copy(processor)
        self._processor.min_toks = {
            row: (least - len(drafts[row]), *rest) for row, (least, *rest) in processor.min_toks.items()
        }

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: Any) -> Any:
        # As if each request had one draft token: one row each, masked if the shortened `min_tokens` is not reached.
        return self._processor.apply_with_spec_decode(logits, [1] * logits.shape[0])


def _count_drafts(original: Callable[..., Any]) -> Callable[..., Any]:
    from dataclasses import replace

    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor

    @functools.wraps(original)
    def apply_logits_processors(self: Any, logits: Any, sampling_metadata: Any, predict_bonus_token: bool) -> Any:
        drafts = sampling_metadata.spec_token_ids
        if predict_bonus_token and drafts and any(drafts):
            processors = LogitsProcessors(
                _AtBonusToken(one, drafts) if isinstance(one, MinTokensLogitsProcessor) else one
                for one in sampling_metadata.logitsprocs.all
            )
            sampling_metadata = replace(sampling_metadata, logitsprocs=processors)
        return original(self, logits, sampling_metadata, predict_bonus_token)

    return apply_logits_processors


PATCHES = (
    Patch(
        symbol="vllm.v1.sample.sampler:Sampler.apply_logits_processors",
        kind="wrap",
        process="worker",
        why="With draft tokens before it, a bonus token that may end the request (`min_tokens` is reached by then) is"
        " kept from it, so the output differs from plain vLLM's.",
        remove_when="vLLM counts draft tokens where `MinTokensLogitsProcessor` masks the bonus token.",
        fingerprints={"0.32.0": "f05723b69779f60a06b8afe371f6e2e5503a9cdf0b8a79430d2a330dbeb313fb"},
        make=_count_drafts,
    ),
)
