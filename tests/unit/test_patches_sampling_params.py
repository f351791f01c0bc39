"""`logprob_token_ids` is refused where our method is chosen, and nowhere else."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_specbranch.patches import sampling_params

OURS = SimpleNamespace(specbranch="settings")


def validate(params: SamplingParams, speculative_config: Any) -> list[Any]:
    """Run the wrapped validation; returns what vLLM's own was asked."""
    asked: list[Any] = []
    wrapped = sampling_params.PATCHES[0].make(lambda self, config: asked.append((self, config)))
    wrapped(params, speculative_config)
    return asked


def test_refused_with_our_method() -> None:
    with pytest.raises(VLLMValidationError, match=r"logprob_token_ids .* not yet supported with speculative decoding"):
        validate(SamplingParams(logprob_token_ids=[1, 2]), OURS)


@pytest.mark.parametrize("other", [None, SimpleNamespace(), SimpleNamespace(specbranch=None)])
def test_passed_through_with_any_other_or_none(other: Any) -> None:
    params = SamplingParams(logprob_token_ids=[1, 2])
    assert validate(params, other) == [(params, other)]


def test_all_else_passes_with_our_method_too() -> None:
    params = SamplingParams(logprobs=2)
    assert validate(params, OURS) == [(params, OURS)]
