"""Which row of a step belongs to which request, and what z is made of."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_features import HeadFeatures, sampled_rows, take_hidden_states_of


@dataclass(frozen=True)
class Scheduled:
    """One request in a step: tokens with KV before it, new ones known (a prompt's chunk, the newest token), drafts, the outcome."""

    num_computed: int
    num_known: int
    num_drafts: int
    num_accepted: int
    is_unfinished_prefill: bool


@st.composite
def scheduled(draw: st.DrawFn) -> Scheduled:
    num_drafts = draw(st.integers(0, 5))
    return Scheduled(
        draw(st.integers(0, 40)),
        draw(st.integers(1, 6)),
        num_drafts,
        draw(st.integers(0, num_drafts)),
        draw(st.booleans()) and not num_drafts,
    )


@given(st.lists(scheduled(), min_size=1, max_size=6), st.booleans())
def test_the_row_is_where_the_newest_token_was_sampled(batch: list[Scheduled], with_drafts: bool) -> None:
    """By the position that each row of the step holds: the newest token is sampled at the position before its own."""
    if not with_drafts:
        batch = [Scheduled(one.num_computed, one.num_known, 0, 0, one.is_unfinished_prefill) for one in batch]
    holds, sampled, expected = [], [], []
    for index, one in enumerate(batch):
        holds += [(index, one.num_computed + offset) for offset in range(one.num_known + one.num_drafts)]
        num_sampled = 0 if one.is_unfinished_prefill else one.num_accepted + 1
        sampled.append([7] * num_sampled)
        if num_sampled:
            newest = one.num_computed + one.num_known + num_sampled - 1
            expected.append((index, newest - 1))
    names = [f"r{index}" for index in range(len(batch))]
    num_scheduled = {name: one.num_known + one.num_drafts for name, one in zip(names, batch, strict=True)}
    num_drafts = [one.num_drafts for one in batch] if with_drafts else None
    rows = sampled_rows(names, num_scheduled, num_drafts, sampled)
    assert [holds[row] for row in rows] == expected


def test_z_is_the_hidden_states_layer_by_layer_and_then_the_embedding() -> None:
    table = torch.arange(20, dtype=torch.bfloat16).view(10, 2)
    features = HeadFeatures(lambda ids: table[ids], 2, torch.device("cpu"))
    states = [torch.full((8, 3), 100.0 * layer) + torch.arange(8).unsqueeze(1) for layer in (1, 2)]
    z = features.assemble([one.bfloat16() for one in states], [5, 0], features.embeddings([3, 9]))
    assert z.dtype == torch.float32
    assert z.tolist() == [
        [105.0, 105.0, 105.0, 205.0, 205.0, 205.0, 6.0, 7.0],
        [100.0, 100.0, 100.0, 200.0, 200.0, 200.0, 18.0, 19.0],
    ]
    with pytest.raises(AssertionError, match="1 hidden states of 2"):
        features.assemble(states[:1], [0], features.embeddings([3]))


class Model:
    """What vLLM's interface for auxiliary hidden states asks of a model."""

    supports_eagle3 = True
    has_own_lm_head = has_own_embed_tokens = False

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        self.layers = layers

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, ...]:
        return (2,)

    def embed_input_ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float().unsqueeze(1)


def runner(model: object) -> Any:
    return SimpleNamespace(device=torch.device("cpu"), use_aux_hidden_state_outputs=False, get_model=lambda: model)


def test_the_runner_is_asked_for_the_hidden_states() -> None:
    model = Model()
    ours = runner(model)
    features = take_hidden_states_of(ours, (3, 4))
    assert (model.layers, ours.use_aux_hidden_state_outputs) == ((3, 4), True)
    assert features.embeddings([4]).tolist() == [[4.0]]


def test_a_model_that_cannot_give_them_is_named() -> None:
    ours = runner(SimpleNamespace())
    with pytest.raises(ConfigError, match="SimpleNamespace"):
        take_hidden_states_of(ours, (3, 4))
    assert not ours.use_aux_hidden_state_outputs
