"""A target and a draft of random weights with a vocabulary small enough to count every outcome."""

from pathlib import Path

VOCAB_SIZE = 16


def make_tiny_pair(folder: Path) -> tuple[str, str]:
    """Write both models; returns (target path, draft path). The draft is the target's first layer, disturbed.

    The distributions are far from flat and differ from token to token; the pair agrees about as well as a real one.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.15,
    }
    target = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **common)).eval()
    with torch.no_grad():
        target.lm_head.weight.normal_(std=0.17)
    draft = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **common)).eval()
    draft.load_state_dict(target.state_dict(), strict=False)
    with torch.no_grad():
        for weight in draft.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn_like(weight) * 0.1 * weight.std())
    paths = (folder / "target", folder / "draft")
    for model, path in zip((target, draft), paths, strict=True):
        model.save_pretrained(path)
    return str(paths[0]), str(paths[1])
