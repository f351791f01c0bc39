"""Made-up rounds of verification, for tests of what learns from them and judges it."""

import torch

from vllm_specbranch.head_data import Rounds


def made_rounds(
    num_rounds: int = 1200,
    num_prompts: int = 60,
    gamma: int = 4,
    *,
    seed: int = 0,
    told_by_features: float = 3.0,
    told_by_confidence: float = 0.0,
) -> Rounds:
    """Rounds whose outcome follows from the first feature, from the draft's confidence, or from neither.

    Args:
        told_by_features, told_by_confidence: how much the log-odds of acceptance depend on each.
    """
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rounds, 12, generator=generator)
    top_probs = torch.rand(num_rounds, gamma, generator=generator)
    odds = told_by_features * features[:, :1] + told_by_confidence * (2 * top_probs - 1)
    is_accepted = torch.rand(num_rounds, gamma, generator=generator) < torch.sigmoid(odds)
    return Rounds(
        # Neither centred nor of one size.
        features=100.0 + torch.linspace(0.01, 50.0, 12) * features,
        top_probs=top_probs,
        accepted=is_accepted.long().cumprod(dim=1).sum(dim=1),
        prompts=torch.arange(num_rounds) * num_prompts // num_rounds,
        temperatures=torch.where(torch.arange(num_rounds) % 2 == 0, 0.0, 0.8),
    )
