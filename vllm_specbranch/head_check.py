"""Can this engine have that length head? Answered before any weights load.

Owns the look at the head's files and at what the target's class can do. Does not own the head (`length_head`) or the settings
(`config`). Runs in the frontend processes, and where a head is trained (`known_identity`).
"""

import logging
from pathlib import Path
from typing import Any

import huggingface_hub
from vllm.model_executor.models.interfaces import supports_eagle3

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_check import DraftModelSpec
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.length_head import load_head, model_identity, target_layers

logger = logging.getLogger("vllm.specbranch.head_check")


def feature_layers(settings: SpecBranchConfig, target: Any, draft: DraftModelSpec) -> tuple[int, ...]:
    """After which layers the target's hidden states are needed; checks a trained head against the pair.

    Args:
        settings: the user's.
        target: the target's `ModelConfig`.
        draft: the draft model.

    Returns:
        Layers as given to vLLM; none without a head and without `head_layers`.

    Raises:
        ConfigError: the head's files are missing or broken, it was trained for another pair, or vLLM cannot give this target's
            hidden states.
    """
    num_target_layers = target.get_total_num_hidden_layers()
    if settings.trained_head is None:
        if settings.head_layers is None:
            return ()
        _check_target(target, settings.head_layers, "head_layers")
        return target_layers(num_target_layers, settings.head_layers)
    # The weights as well: they are small, and a broken file is found now or after the target's have loaded.
    _, spec = load_head(settings.trained_head)
    if settings.head_layers not in (None, spec.num_layers):
        raise ConfigError(settings.head_layers, f"unset, or {spec.num_layers} as in the length head", "head_layers")
    _check_target(target, settings.trained_head, "length_head")
    identities = {
        "target": known_identity(target.model, target.revision),
        "draft": known_identity(draft.model, draft.revision),
    }
    for role, trained_for in (("target", spec.target_identity), ("draft", spec.draft_identity)):
        if None in (trained_for, identities[role]):
            # Sizes alone would let a head of another pair pass.
            logger.warning(
                "The length head %s: not checked whether it was trained for this %s model, because %s.",
                settings.trained_head,
                role,
                "it does not say for which" if trained_for is None else "that is not on this machine yet",
            )
    spec.check_fits(
        settings.trained_head,
        hidden_size=target.get_hidden_size(),
        num_target_layers=num_target_layers,
        gamma=settings.num_speculative_tokens,
        target_identity=identities["target"],
        draft_identity=identities["draft"],
    )
    return spec.layers


def known_identity(model: str, revision: str | None = None) -> str | None:
    """`model_identity` of a folder, or of a model of the hub as far as it is on this machine.

    Args:
        model: path or hub id.
        revision: of the hub's model.

    Returns:
        None if it is not here, or not all of it.
    """
    folder = Path(model)
    if not folder.is_dir():
        config = huggingface_hub.try_to_load_from_cache(model, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    return model_identity(folder)


def _check_target(target: Any, value: object, field: str) -> None:
    model_class, architecture = target.registry.resolve_model_cls(target.architectures, target)
    if not supports_eagle3(model_class):
        allowed = (
            f"unset with this target: vLLM cannot give the hidden states of {architecture} ({target.model}), whose class does not "
            "implement SupportsEagle3"
        )
        raise ConfigError(value, allowed, field)
