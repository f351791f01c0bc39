"""Test of the hook that asks our scorer for the draft distributions."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
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


def propose(drafter: object, aux_hidden_states: object, metadata: object) -> tuple[object, ...]:
    """Run the wrapped `propose_draft_token_ids` as vLLM's `sample_tokens` does; returns what the original got."""
    own = SimpleNamespace(drafter=drafter)
    scheduled = SimpleNamespace(num_scheduled_tokens={"a": 3})
    given = (scheduled, [[1]], "sampling", "hidden", "sample hidden", aux_hidden_states, metadata, "common", "slots")
    got = gpu_model_runner.PATCHES[2].make(lambda *arguments: arguments)(own, *given)
    assert got == (own, *given)
    return got


def test_hidden_states_go_to_our_proposer_and_vllm_proposes_as_always() -> None:
    taken: list[tuple[object, ...]] = []
    ours = FakeProposer()
    ours.take_hidden_states = lambda *given: taken.append(given)  # type: ignore[attr-defined]
    propose(ours, ["layer"], SimpleNamespace(num_draft_tokens=[2]))
    propose(ours, ["layer"], None)
    assert taken == [({"a": 3}, [2], [[1]], ["layer"]), ({"a": 3}, None, [[1]], ["layer"])]
    propose(ours, None, None)
    propose(object(), ["layer"], None)
    assert len(taken) == 2, "without hidden states, or with another proposer, nothing is taken"


class OffsetlessGenerator:
    """A CPU generator, as far as vLLM's bookkeeping is concerned."""

    def get_offset(self) -> int:
        raise RuntimeError("CPU Generator does not use offset")


def sampling_runner(device: str) -> Any:
    """Three rows with a generator, one without; the tokens of rows 1 and 3 are thrown away."""
    generators = {row: OffsetlessGenerator() for row in (0, 1, 2)}
    mask = SimpleNamespace(np=np.array([False, True, False, True, True]))
    batch = SimpleNamespace(generators=generators, num_reqs=4)
    return SimpleNamespace(input_batch=batch, discard_request_mask=mask, device=SimpleNamespace(type=device))


def sample(runner: Any, broken: bool = False) -> list[int]:
    """Run the wrapped `sample_tokens`; returns the rows whose generators it could see."""
    seen: list[int] = []

    def original(self: Any, grammar_output: object) -> str:
        seen.extend(self.input_batch.generators)
        if broken:
            raise ValueError("sampling failed")
        return f"sampled with {grammar_output}"

    assert gpu_model_runner.PATCHES[1].make(original)(runner, "grammar") == "sampled with grammar"
    return seen


def test_rows_whose_token_is_thrown_away_do_without_their_generator() -> None:
    runner = sampling_runner("cpu")
    before = dict(runner.input_batch.generators)
    assert sample(runner) == [0, 2]
    assert runner.input_batch.generators == before
    with pytest.raises(ValueError, match="sampling failed"):
        sample(runner, broken=True)
    assert runner.input_batch.generators == before


def test_where_generators_can_be_turned_back_vllm_does_it() -> None:
    assert sample(sampling_runner("cuda")) == [0, 1, 2]
