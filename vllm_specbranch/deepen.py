"""Make from a Llama-architecture model a heavier one that computes the same function, to give a target round a
realistic cost.

Extra layers are copies of real ones whose output projections (`o_proj`, `down_proj`) are zero, so that each adds
exactly nothing to the residual stream; extra MLP neurons have random `gate_proj` and `up_proj` rows and zero
`down_proj` columns. Every new weight is stored in full, so a forward pass reads and multiplies all of them: the cost
is real, the logits, and with them the acceptance rate of a draft model, stay those of the source.

Owns the rewriting of weights and the check of the result; files and cache are in `made_models`. It does not run vLLM and measures
no time. Runs in the demo, in benchmarks and in `benchmarks/deepen.py`, never in an engine; imports torch only when
something has to be made.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.made_models import (
    cached_folder,
    made_once,
    read_config,
    read_tensors,
    require_other_folder,
    write_model,
)

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

# Architectures whose weights are named as Llama's and whose layers end in o_proj and down_proj with nothing after them.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ZEROED = ("self_attn.o_proj", "mlp.down_proj")
_WIDENED = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True, slots=True)
class DeepenReport:
    """What was made of what.

    Args:
        num_layers: decoder layers, before and after.
        mlp_size: MLP neurons per layer, before and after.
        num_parameters: stored weights (a tied embedding counts once), before and after.
        max_logit_difference: largest absolute difference of any logit in float32, or None when not checked.
        same_argmax: whether every position prefers the same token, or None when not checked.
    """

    source: str
    out: str
    num_layers: tuple[int, int]
    mlp_size: tuple[int, int]
    num_parameters: tuple[int, int]
    max_logit_difference: float | None = None
    same_argmax: bool | None = None


def deepen(source: Path, out: Path, extra_layers: int, mlp_size: int | None, seed: int = 0) -> DeepenReport:
    """Write a heavier model of the same function.

    Args:
        source: folder of the model: config.json and safetensors.
        out: folder to write, made when missing; never the source.
        extra_layers: layers to add after the last one; 0 or more.
        mlp_size: MLP neurons per layer of the result, at least the source's; None keeps them.
        seed: of the random weights.

    Returns:
        The report, logits not checked yet (see `check`).

    Raises:
        ConfigError: an architecture that this does not know, a size that is too small, or `out` is `source`.
    """
    config = _known_config(source)
    old_layers, old_mlp = int(config["num_hidden_layers"]), int(config["intermediate_size"])
    new_mlp = old_mlp if mlp_size is None else mlp_size
    if extra_layers < 0:
        raise ConfigError(extra_layers, "0 or more", "layers")
    if new_mlp < old_mlp:
        raise ConfigError(new_mlp, f"at least the source's {old_mlp}", "mlp")
    require_other_folder(source, out)
    tensors = read_tensors(source)
    num_before = sum(tensor.numel() for tensor in tensors.values())
    _add_layers(tensors, old_layers, extra_layers)
    _widen(tensors, new_mlp - old_mlp, seed)
    write_model(source, out, tensors, _changed_config(config, old_layers + extra_layers, new_mlp))
    return DeepenReport(
        source=str(source),
        out=str(out),
        num_layers=(old_layers, old_layers + extra_layers),
        mlp_size=(old_mlp, new_mlp),
        num_parameters=(num_before, sum(tensor.numel() for tensor in tensors.values())),
    )


def check(report: DeepenReport, seed: int = 0, num_tokens: int = 64) -> DeepenReport:
    """Compare the logits of both models in float32 on random tokens.

    Extra layers change nothing at all. Extra neurons make the sums of `down_proj` longer, by zeros: a matrix library
    may then add in another order, which shows as a difference of rounding size (1e-6 for logits around 10).

    Args:
        report: of `deepen`.
        seed: of the tokens.
        num_tokens: length of the one sequence compared.

    Returns:
        The report, with the two checks filled in.
    """
    import torch

    vocab_size = int(read_config(Path(report.source))["vocab_size"])
    tokens = torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(seed))
    before, after = _logits(report.source, tokens), _logits(report.out, tokens)
    return dataclasses.replace(
        report,
        max_logit_difference=float((before - after).abs().max()),
        same_argmax=bool((before.argmax(-1) == after.argmax(-1)).all()),
    )


def _logits(model: str, tokens: torch.Tensor) -> torch.Tensor:
    """Return `[1, num_tokens, vocab_size] float32`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        logits: torch.Tensor = loaded(tokens).logits
        return logits


def _known_config(source: Path) -> dict[str, Any]:
    config = read_config(source)
    architecture = next(iter(config.get("architectures") or ()), None)
    if architecture not in ARCHITECTURES:
        raise ConfigError(architecture, ", ".join(ARCHITECTURES), "architectures in config.json")
    if "quantization_config" in config:
        raise ConfigError(
            config["quantization_config"].get("quant_method"), "unquantised weights", "quantization_config"
        )
    return config


def _add_layers(tensors: Tensors, num_layers: int, extra: int) -> None:
    """Append `extra` layers, taking the existing ones in turn as templates. Mutates: tensors."""
    for index in range(num_layers, num_layers + extra):
        template = f"model.layers.{index % num_layers}."
        for name in [name for name in tensors if name.startswith(template)]:
            part = name.removeprefix(template)
            zero = part.startswith(_ZEROED)
            tensor = tensors[name]
            # clone: safetensors refuses shared storage, and a copy is what must be paid for.
            tensors[f"model.layers.{index}.{part}"] = tensor.new_zeros(tensor.shape) if zero else tensor.clone()


def _widen(tensors: Tensors, extra: int, seed: int) -> None:
    """Append `extra` MLP neurons to every layer, each of which contributes zero. Mutates: tensors."""
    import torch

    if not extra:
        return
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        tensor = tensors[name]
        if any(part in name for part in _WIDENED):
            # A bias of 0 will do; rows like the layer's own keep the activations in a usual range (no infinity times
            # zero).
            scale = 0.0 if tensor.dim() == 1 else float(tensor.float().std())
            new = torch.randn((extra, *tensor.shape[1:]), generator=generator) * scale
            tensors[name] = torch.cat([tensor, new.to(tensor.dtype)])
        elif name.endswith("mlp.down_proj.weight"):
            tensors[name] = torch.cat([tensor, tensor.new_zeros(tensor.shape[0], extra)], dim=1).contiguous()


def _changed_config(config: dict[str, Any], num_layers: int, mlp_size: int) -> dict[str, Any]:
    changed = {**config, "num_hidden_layers": num_layers, "intermediate_size": mlp_size}
    if isinstance(kinds := config.get("layer_types"), list):
        changed["layer_types"] = [kinds[index % len(kinds)] for index in range(num_layers)]
    return changed


# --- the cache --------------------------------------------------------------------------------------------------------

_REPORT = "deepen.json"
# Largest difference of a logit that is rounding: sums in another order (see `check`), for logits around 10 in float32.
MAX_LOGIT_DIFFERENCE = 1e-4


def cached(source: Path, extra_layers: int, mlp_size: int | None, cache: Path | None = None) -> DeepenReport:
    """Return a heavier model of the same function, made and checked once and kept.

    Args:
        source: folder of the model.
        extra_layers, mlp_size: as in `deepen`.
        cache: folder of all results; None means `cache_directory()`.

    Returns:
        The report, with the checks filled in.

    Raises:
        ConfigError: as in `deepen`.
        SpecBranchError: the result is not the same function.
    """
    config = _known_config(source)
    layers = int(config["num_hidden_layers"]) + extra_layers
    folder = cached_folder(source, f"{layers}x{mlp_size or config['intermediate_size']}", cache)

    def make(aside: Path) -> dict[str, Any]:
        report = check(deepen(source, aside, extra_layers, mlp_size))
        _require_same_function(report)
        return dataclasses.asdict(dataclasses.replace(report, out=str(folder)))

    stored = made_once(folder, _REPORT, make)
    pairs = {key: tuple(stored[key]) for key in ("num_layers", "mlp_size", "num_parameters")}
    return DeepenReport(**(stored | pairs))


def _require_same_function(report: DeepenReport) -> None:
    difference = report.max_logit_difference
    if difference is None or difference > MAX_LOGIT_DIFFERENCE or not report.same_argmax:
        raise SpecBranchError(f"{report.out} does not compute what {report.source} does: logits differ by {difference}")
