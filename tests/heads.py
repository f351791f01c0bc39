"""Length heads for tests: saved ones that always say the same class, and ones that say any."""

from pathlib import Path
from typing import Any

from tests.model_paths import DRAFT, TARGET

HIDDEN_SIZE = 256
NUM_TARGET_LAYERS = 6


def make_head(
    folder: Path,
    kind: str,
    *,
    pair: tuple[str, str] = (TARGET, DRAFT),
    hidden_size: int = HIDDEN_SIZE,
    num_target_layers: int = NUM_TARGET_LAYERS,
    num_layers: int = 4,
    gamma: int = 8,
    **changes: Any,
) -> str:
    """Write a head and return its folder.

    Args:
        folder: where to.
        kind: the class that it always says, or `random`: random weights, whose classes come in no order.
        pair: folders of target and draft.
        hidden_size, num_target_layers: of the target.
        num_layers: K.
        gamma: draft tokens of a chunk.
        changes: other fields of its description.
    """
    import torch

    from vllm_specbranch.length_head import HeadSpec, LengthHead, model_identity, save_head, target_layers

    num_features = (num_layers + 1) * hidden_size
    torch.manual_seed(0)
    head = LengthHead(num_features)
    last: Any = head.layers[-1]
    with torch.no_grad():
        last.bias.zero_()
        if kind == "random":
            # The three outputs of random weights have means of their own, which would decide; weights of sum zero have less of it.
            last.weight.normal_()
            last.weight.sub_(last.weight.mean(dim=1, keepdim=True))
        else:
            last.weight.zero_()
            last.bias[int(kind)] = 1.0
    fields: dict[str, Any] = {
        "num_features": num_features,
        "hidden_size": hidden_size,
        "embedding_size": hidden_size,
        "num_target_layers": num_target_layers,
        "layers": target_layers(num_target_layers, num_layers),
        "gamma": gamma,
        "epsilon": 0.3,
        "target": pair[0],
        "draft": pair[1],
        "target_identity": model_identity(pair[0]),
        "draft_identity": model_identity(pair[1]),
        "label_counts": (1, 1, 1),
        "validation": {},
        "seed": 0,
        "prompts": "none",
    }
    save_head(folder, head, HeadSpec(**fields | changes))
    return str(folder)
