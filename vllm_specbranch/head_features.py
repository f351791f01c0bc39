"""What the length head sees: the target's hidden states where the newest token of each request came from, and its embedding.

Owns the choice of rows and the assembly of z (`length_head` says what z is). They come by vLLM's auxiliary hidden states: the
target's forward returns the residual stream after some of its layers, for all tokens of the step. Runs in every target worker: the
embedding of a model that is split over ranks is a collective, so every rank asks for it in every step, whatever else it knows.

    a step's tokens:  | prompt chunk of a | last token of b, its 3 draft tokens | ...      b: tokens [d1, y] were committed,
    row of b:                              b0  d1  d2  d3                                  y was sampled at d1
                                                ^
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from vllm.model_executor.models.interfaces import supports_eagle3

from vllm_specbranch.errors import ConfigError


class _Runner(Protocol):
    """What is used of vLLM's V1 model runner."""

    device: torch.device
    use_aux_hidden_state_outputs: bool

    def get_model(self) -> Any: ...


def sampled_rows(
    request_ids: Sequence[str],
    num_scheduled: Mapping[str, int],
    num_draft_tokens: Sequence[int] | None,
    sampled: Sequence[Sequence[int]],
) -> list[int]:
    """The row, among the tokens of a step, that the newest token of each request was sampled at.

    A request's last `num_draft_tokens + 1` tokens are verified: after the first of them the first committed token was sampled, so
    the last of n committed ones after the n-th.

    Args:
        request_ids: in the order of the batch.
        num_scheduled: tokens of the step per request.
        num_draft_tokens: how many of them are draft tokens, per row of the batch; None if none are.
        sampled: committed tokens per row of the batch; empty for an unfinished prefill, which has no row.

    Returns:
        One row for each request that got tokens.
    """
    rows = []
    end = 0
    for index, tokens in enumerate(sampled):
        end += num_scheduled[request_ids[index]]
        if tokens:
            num_drafts = num_draft_tokens[index] if num_draft_tokens is not None else 0
            rows.append(end - 1 - num_drafts + len(tokens) - 1)
    return rows


class HeadFeatures:
    """Makes z of each step. Made by `take_hidden_states_of`, on every rank.

    Args:
        embed: the target's input embeddings; takes `[n]` token ids.
        num_layers: how many hidden states the target's forward returns.
        device: of the target.
    """

    def __init__(self, embed: Callable[[torch.Tensor], torch.Tensor], num_layers: int, device: torch.device) -> None:
        self._embed = embed
        self._num_layers = num_layers
        self._device = device

    def embeddings(self, tokens: Sequence[int]) -> torch.Tensor:
        """Input embeddings of tokens, `[n, embedding_size]`. With tensor parallelism a collective: call it on every rank."""
        return self._embed(torch.tensor(tokens, dtype=torch.int32, device=self._device))

    def assemble(
        self, hidden_states: Sequence[torch.Tensor], rows: Sequence[int], embeddings: torch.Tensor
    ) -> torch.Tensor:
        """z of each request that got tokens.

        Args:
            hidden_states: per layer `[num_tokens, hidden_size]`; may have more rows than the step has tokens (padding).
            rows: of `sampled_rows`.
            embeddings: of the newest tokens, in the same order.

        Returns:
            `[n, num_features]` float32, on the target's device.
        """
        assert len(hidden_states) == self._num_layers, f"{len(hidden_states)} hidden states of {self._num_layers}"
        index = torch.tensor(rows, dtype=torch.int64, device=self._device)
        return torch.cat([*(one[index] for one in hidden_states), embeddings], dim=1).float()


def take_hidden_states_of(runner: _Runner, layers: tuple[int, ...]) -> HeadFeatures:
    """Make the target's forward return its hidden states after some layers; once its weights have been loaded, before it runs.

    Mutates: the runner and its model.

    Raises:
        ConfigError: the model cannot return them. (Its class was asked before; this is for models that vLLM wraps.)
    """
    model = runner.get_model()
    if not supports_eagle3(model):
        raise ConfigError(type(model).__name__, "a target whose hidden states vLLM can return", "length_head")
    model.set_aux_hidden_state_layers(layers)
    runner.use_aux_hidden_state_outputs = True
    return HeadFeatures(model.embed_input_ids, len(layers), runner.device)
