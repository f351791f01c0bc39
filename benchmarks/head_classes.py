"""Greedy outputs of a target, and what a length head says along them: both by transformers, without an engine.

The features of a position depend on the committed tokens alone, so they are the same whatever was drafted there, and a replay
can be given the head's classes without an engine. (That an engine's features are those of transformers is held by the tests.)

Owns the recording and that pass. Runs in the process of a benchmark; loads the target model into it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_specbranch.length_head import LengthHead
from vllm_specbranch.replay import Recording
from vllm_specbranch.replay_study import TOKENS_BEYOND


@torch.inference_mode()
def record(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Recording]:
    """The target's greedy output after each prompt, and some tokens more for the last round.

    Args:
        model: of `load`.
        prompts: token ids of each.
        num_tokens: to replay of each.
    """
    found = []
    for ids in prompts:
        fed, state, output = torch.tensor([list(ids)]), None, []
        for _ in range(num_tokens + TOKENS_BEYOND):
            step = model(input_ids=fed, past_key_values=state, use_cache=True)
            state, fed = step.past_key_values, step.logits[:, -1:].argmax(dim=-1)
            output.append(int(fed))
        found.append(Recording(tuple(ids), tuple(output), num_tokens))
    return found


def classes_along(
    model: Any, layers: Sequence[int], head: LengthHead, recordings: Sequence[Recording]
) -> list[list[int]]:
    """What a head says after each token of each recording.

    Args:
        model: of `load`.
        layers: after which layers the hidden states are taken.

    Returns:
        `[recording][token]`, classes of 0..2.
    """
    return [head.classes(features_along(model, layers, one)) for one in recordings]


@torch.inference_mode()
def features_along(model: Any, layers: Sequence[int], recording: Recording) -> torch.Tensor:
    """`[num_tokens, num_features] float32`: for each token of the output what a head sees when it is the newest.

    Args:
        model: of transformers, a decoder.
        layers: n is the residual stream after n layers.
    """
    taken: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            taken[layer] = (output[0] if isinstance(output, tuple) else output).reshape(-1, model.config.hidden_size)

        return hook

    decoder = model.get_decoder()
    hooks = [decoder.layers[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    ids = torch.tensor([*recording.prompt, *recording.tokens])
    try:
        model(input_ids=ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    # The newest token was sampled where the token before it went in.
    first, count = len(recording.prompt) - 1, len(recording.tokens)
    embedded = model.get_input_embeddings()(ids[first + 1 : first + 1 + count])
    return torch.cat([*(taken[layer][first : first + count] for layer in layers), embedded], dim=1).float()


def load(target: str) -> Any:
    """The target model in transformers, float32.

    Args:
        target: its folder.
    """
    from transformers import AutoModelForCausalLM

    # Token by token, threads would mostly wait for each other.
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
