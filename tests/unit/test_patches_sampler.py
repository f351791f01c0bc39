"""A bug of vLLM's `min_tokens` with speculative decoding, shown and mended on vLLM's own Sampler and processor."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vllm_specbranch import patching
from vllm_specbranch.patches.sampler import PATCHES

VERSION = "0.32.0"
VOCAB_SIZE = 6
STOP = 4


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    there = [patch for patch in PATCHES if patching.is_applied(patch)]
    patching.revert(there)
    yield
    patching.revert(PATCHES)
    patching.apply(there, VERSION)


def masked(
    num_committed: list[int], min_tokens: list[int], drafts: list[list[int]] | None, *, is_bonus: bool = True
) -> list[bool]:
    """Per request, whether vLLM's sampler forbids it the stop token; `min_tokens` 0 is a request without any."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.logits_processor.builtin import MinTokensLogitsProcessor
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    count = len(num_committed)
    processor = MinTokensLogitsProcessor(None, torch.device("cpu"), False)
    rows = [row for row in range(count) if min_tokens[row] > num_committed[row]]
    processor.min_toks = {row: (min_tokens[row], [0] * num_committed[row], {STOP}, False) for row in rows}
    processor.logits_slice = (torch.tensor(rows, dtype=torch.int32), torch.full((len(rows),), STOP, dtype=torch.int32))
    none = torch.empty(0)
    metadata = SamplingMetadata(
        temperature=None,
        all_greedy=True,
        all_random=False,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[],
        spec_token_ids=drafts,
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors([processor]),
    )
    before = dict(processor.min_toks)
    logits = Sampler().apply_logits_processors(torch.zeros(count, VOCAB_SIZE), metadata, is_bonus)
    assert processor.min_toks == before
    assert metadata.logitsprocs.non_argmax_invariant == [processor]
    assert torch.equal(logits.isneginf().sum(1) > 0, logits[:, STOP].isneginf()), "no other token is forbidden"
    found: list[bool] = logits[:, STOP].isneginf().tolist()
    return found


# Three committed tokens each; the bonus token is number 4, 5, 6, 8 and, twice, 6.
BATCH: dict[str, Any] = {
    "num_committed": [3, 3, 3, 3, 3, 3],
    "min_tokens": [5, 5, 5, 5, 6, 0],
    "drafts": [[], [1], [1, 1], [1, 1, 1, 1], [1, 1], [1, 1]],
}


def test_upstream_forgets_the_draft_tokens() -> None:
    assert masked(**BATCH) == [True, True, True, True, True, False]


def test_patched_the_bonus_token_may_stop_once_min_tokens_come_before_it() -> None:
    patching.apply(PATCHES, VERSION)
    assert masked(**BATCH) == [True, True, False, False, True, False]


@pytest.mark.parametrize("drafts", [None, [], [[], []]])
def test_without_draft_tokens_it_is_upstream_s(drafts: list[list[int]] | None) -> None:
    patching.apply(PATCHES, VERSION)
    assert masked([3, 4], [4, 4], drafts) == [True, False]


def test_other_tokens_than_bonus_ones_are_upstream_s() -> None:
    patching.apply(PATCHES, VERSION)
    assert masked([3, 3], [4, 5], [[1, 1], [1, 1]], is_bonus=False) == [True, True]
