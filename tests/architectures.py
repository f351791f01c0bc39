"""Pairs of random weights in several architectures, for tests on engines: what the shipped pair, a Llama, does not show.

qwen3    norms of queries and keys, heads wider than the hidden size shares out, tied embeddings
granite  scaled embeddings, attention and residual stream: vLLM's layers hand on one tensor, not a sum and a residue
gemma3   layers with a sliding window beside full ones, scaled embeddings, norms after the blocks
gpt2     learned positions, LayerNorm with a bias

Of the last two vLLM cannot return the hidden states.
"""

from pathlib import Path
from typing import Any

HIDDEN_SIZE = 64
NUM_LAYERS = 5
VOCAB_SIZE = 512
# Less than the tests' sequences, so that tokens do leave it.
SLIDING_WINDOW = 32
# Of a standard deviation of the draft's weights: enough for misses, and not for many.
DISTURBANCE = 0.05
EMBEDDING_SCALE = {"gemma3": 0.05, "gpt2": 0.1}
WITH_HIDDEN_STATES = ("qwen3", "granite")
WITHOUT = ("gemma3", "gpt2")

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _config(architecture: str) -> Any:
    import transformers

    match architecture:
        case "qwen3":
            return transformers.Qwen3Config(**_COMMON | {"head_dim": 64, "tie_word_embeddings": True})
        case "granite":
            scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2}
            return transformers.GraniteConfig(**_COMMON, **scales, logits_scaling=0.5, tie_word_embeddings=False)
        case "gemma3":
            kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(NUM_LAYERS)]
            return transformers.Gemma3TextConfig(**_COMMON, layer_types=kinds, sliding_window=SLIDING_WINDOW)
        case "gpt2":
            sizes = {"n_embd": HIDDEN_SIZE, "n_layer": NUM_LAYERS, "n_head": 2, "n_positions": 256}
            ends = {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.15}
            return transformers.GPT2Config(vocab_size=VOCAB_SIZE, **sizes, **ends)
    raise AssertionError(architecture)


def make_pair(folder: Path, architecture: str) -> tuple[str, str]:
    """Write a target and a draft; returns their folders. The draft is the target, a little disturbed."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(_config(architecture), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in target.named_parameters():
            # Norms and biases start as ones and zeros, which would hide that one is left out.
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
            elif "lm_head" in name:
                weight.normal_(std=0.2)
            elif name.endswith(("embed_tokens.weight", "wte.weight")):
                # What goes in would come out again where both ends are one matrix.
                weight.mul_(EMBEDDING_SCALE.get(architecture, 1.0))
    draft = AutoModelForCausalLM.from_config(_config(architecture), dtype=torch.float32).eval()
    draft.load_state_dict(target.state_dict())
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * DISTURBANCE * weight.std())
    paths = (folder / "target", folder / "draft")
    for model, path in zip((target, draft), paths, strict=True):
        model.save_pretrained(path)
    return str(paths[0]), str(paths[1])
