"""Make from a draft model a weaker one, which guesses the target's tokens less often: a poorly aligned pair at no training.

Every weight matrix gets Gaussian noise in proportion to its own standard deviation; norms and biases stay. Config and tokenizer
stay as well, so a draft step costs what it did: only the acceptance rate falls. With 0.35 the shipped draft's first choice is right
at about half of the positions of the target's greedy path instead of at three quarters (see the model card).

Owns the noise and its report. Runs in benchmarks and in `benchmarks/weaken.py`, never in an engine; imports torch only when
something has to be made.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from vllm_specbranch.errors import ConfigError
from vllm_specbranch.made_models import (
    cached_folder,
    made_once,
    read_config,
    read_tensors,
    require_other_folder,
    write_model,
)

# Brings the shipped pair down to an acceptance rate of one half.
WEAK_NOISE = 0.35
_REPORT = "weaken.json"


@dataclass(frozen=True, slots=True)
class WeakenReport:
    """What was made of what.

    Attributes:
        noise: standard deviation of the noise, in standard deviations of each matrix.
        seed: of the noise.
        num_matrices: how many were changed.
    """

    source: str
    out: str
    noise: float
    seed: int
    num_matrices: int


def weaken(source: Path, out: Path, noise: float = WEAK_NOISE, seed: int = 0) -> WeakenReport:
    """Write a weaker model.

    Args:
        source: folder of the model: config.json and safetensors.
        out: folder to write, made when missing; never the source.
        noise: standard deviation of the noise, in standard deviations of each matrix.
        seed: of the noise; the same seed gives the same weights.

    Raises:
        ConfigError: `noise` is not positive, `source` holds no model, or `out` is `source`.
    """
    import torch

    if not noise > 0:
        raise ConfigError(noise, "above 0", "noise")
    require_other_folder(source, out)
    config, tensors = read_config(source), read_tensors(source)
    matrices = sorted(name for name, tensor in tensors.items() if tensor.dim() == 2)
    generator = torch.Generator().manual_seed(seed)
    for name in matrices:
        weight = tensors[name].float()
        added = torch.randn(weight.shape, generator=generator) * (noise * weight.std())
        tensors[name] = (weight + added).to(tensors[name].dtype)
    write_model(source, out, tensors, config)
    return WeakenReport(str(source), str(out), noise, seed, len(matrices))


def cached(source: Path, noise: float = WEAK_NOISE, seed: int = 0, cache: Path | None = None) -> WeakenReport:
    """Return a weaker model, made once and kept.

    Args:
        source, noise, seed: as in `weaken`.
        cache: folder of all results; None means `cache_directory()`.

    Raises:
        ConfigError: as in `weaken`.
    """
    read_config(source)
    folder = cached_folder(source, f"noise{noise:g}-seed{seed}", cache)

    def make(aside: Path) -> dict[str, object]:
        return dataclasses.asdict(dataclasses.replace(weaken(source, aside, noise, seed), out=str(folder)))

    return WeakenReport(**made_once(folder, _REPORT, make))


def weakened(source: Path, noise: float, seed: int = 0) -> Path:
    """The model with so much noise, made once and kept; for none, the model itself.

    Raises:
        ConfigError: as in `weaken`.
    """
    return Path(cached(source, noise, seed).out) if noise else source
