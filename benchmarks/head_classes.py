"""What a length head says along recorded outputs: the target's hidden states by transformers, one pass over each text.

The features of a position depend on the committed tokens alone, so they are the same whatever was drafted there, and a replay
can be given the head's classes without an engine. (That an engine's features are those of transformers is held by the tests.)

Owns that pass. Runs in the process of a benchmark; loads the target model into it.
"""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_specbranch.length_head import LengthHead
from vllm_specbranch.replay import Recording


def classes_along(
    target: str, layers: Sequence[int], heads: Sequence[LengthHead], recordings: Sequence[Recording]
) -> list[list[list[int]]]:
    """What each head says after each token of each recording.

    Args:
        target: folder of the target model.
        layers: after which layers the hidden states are taken, the same for all heads.

    Returns:
        `[head][recording][token]`, classes of 0..2.
    """
    model = _load(target)
    said: list[list[list[int]]] = [[] for _ in heads]
    for recording in recordings:
        features = features_along(model, layers, recording)
        for found, head in zip(said, heads, strict=True):
            found.append(head.classes(features))
    return said


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


def _load(target: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
