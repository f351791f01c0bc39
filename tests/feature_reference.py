"""What the length head must see, by transformers, and the check of recorded features against it."""

import functools
from typing import Any

from tests.model_paths import TARGET

# Request id, its committed tokens (the newest last), how many draft tokens the round verified, z.
Record = tuple[str, list[int], int, list[float]]

NUM_LAYERS = 4
# Of the largest value of a layer: float32 through six layers in two implementations. Other rows are far further off.
TOLERANCE = 1e-4


@functools.cache
def reference_model(target: str) -> tuple[Any, list[Any]]:
    """A target by transformers, and a list that its last layer appends its output to: transformers returns that one behind the
    final norm only.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    outputs: list[Any] = []
    model.model.layers[-1].register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output if torch.is_tensor(output) else output[0])
    )
    return model, outputs


def reference(tokens: list[int], target: str = TARGET) -> tuple[Any, Any]:
    """By transformers: the residual stream after each of the last K layers `[K, n, hidden_size]`, and the embeddings."""
    import torch

    model, last = reference_model(target)
    last.clear()
    with torch.inference_mode():
        ids = torch.tensor([tokens])
        states = model(ids, output_hidden_states=True).hidden_states
        after = [*states[-NUM_LAYERS:-1], last[0]]
        return torch.stack([one[0] for one in after]), model.get_input_embeddings()(ids)[0]


def check_features(records: list[Record], target: str = TARGET) -> dict[str, int]:
    """Assert that every row is the right one; returns how many rounds there were of each kind."""
    import torch

    kinds = {"first": 0, "no drafts": 0, "none accepted": 0, "some": 0, "all": 0}
    for name in {record[0] for record in records}:
        own = [record for record in records if record[0] == name]
        longest = max((record[1] for record in own), key=len)
        states, embeddings = reference(longest, target)
        before = None
        for _, tokens, num_drafts, z in own:
            assert tokens == longest[: len(tokens)]
            row = torch.tensor(z).view(NUM_LAYERS + 1, -1)
            position = len(tokens) - 2
            scale = states[:, position].abs().amax(dim=1, keepdim=True)
            distances = ((row[:-1].unsqueeze(1) - states).abs() / scale.unsqueeze(1)).amax(dim=(0, 2))
            assert distances[position] < TOLERANCE, f"{name} at {position}: nearest row is {int(distances.argmin())}"
            distances[position] = torch.inf
            assert distances.min() > 100 * TOLERANCE, "another row would have passed as well"
            assert torch.equal(row[-1], embeddings[position + 1])
            kinds[kind_of(num_drafts, None if before is None else len(tokens) - before - 1)] += 1
            before = len(tokens)
    return kinds


def kind_of(num_drafts: int, num_accepted: int | None) -> str:
    if num_accepted is None:
        return "first"
    if not num_drafts:
        return "no drafts"
    return "none accepted" if not num_accepted else "all" if num_accepted == num_drafts else "some"
