"""Test of the hook that asks our scorer for the draft distributions."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_specbranch.patches import gpu_model_runner


class FakeProposer:
    def __init__(self) -> None:
        self.scorer = self

    def draft_probs(self, *arguments: object) -> tuple[object, ...]:
        return arguments


@pytest.fixture(autouse=True)
def fake_proposer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm_specbranch.proposer")
    vars(module)["Proposer"] = FakeProposer
    monkeypatch.setitem(sys.modules, "vllm_specbranch.proposer", module)


def runner(drafter: object) -> Any:
    return SimpleNamespace(drafter=drafter, input_batch=SimpleNamespace(req_ids=["a", "b"]), device="cpu")


def hook(self: Any, metadata: object) -> object:
    return gpu_model_runner.PATCHES[0].make(lambda self, spec_decode_metadata: ("vLLM", self, spec_decode_metadata))(
        self, metadata
    )


def test_our_proposer_s_scorer_is_asked() -> None:
    assert hook(runner(FakeProposer()), SimpleNamespace(num_draft_tokens=[2, 0])) == (["a", "b"], [2, 0], "cpu")


def test_other_drafters_keep_vllm_s_way() -> None:
    other = runner(object())
    assert hook(other, "metadata") == ("vLLM", other, "metadata")
