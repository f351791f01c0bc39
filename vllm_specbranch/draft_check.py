"""Is this draft model one for that target? Answered before any weights load.

Owns: the look at the draft model's config, vocabulary and context, and the description of it that the draft server
loads by (`DraftModelSpec`). Does not own the settings (`config`) or the loading (`draft_runtime`). Runs in the
frontend processes.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from vllm.config.model import ModelConfig
from vllm.transformers_utils.repo_utils import get_model_path

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.errors import ConfigError

# What vLLM's default loader reads from a folder.
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")


@dataclass(frozen=True, slots=True)
class DraftModelSpec:
    """The draft model as the draft server has to load it.

    Attributes:
        model: path, or hub id when it is not on this machine.
        max_model_len: longest sequence that is drafted for, in tokens: the least of the draft's context, the
            target's, and the user's `max_model_len`.
        vocab_size: number of token ids, the same as the target's.
        dtype: name of the target's dtype, for example `bfloat16`.
        load_format: as the target's.
        enforce_eager: the user's wish for the draft model, or for the target.
        seed: the engine's.
    """

    model: str
    max_model_len: int
    vocab_size: int
    dtype: str
    quantization: str | None
    revision: str | None
    trust_remote_code: bool
    load_format: str
    enforce_eager: bool
    seed: int


def check_draft_model(settings: SpecBranchConfig, target: Any, load_format: str) -> DraftModelSpec:
    """Find the draft model and check it against the target.

    Args:
        settings: the user's.
        target: the target's `ModelConfig`.
        load_format: how the target's weights are loaded.

    Raises:
        ConfigError: the draft model is missing or no decoder, its vocabulary differs, or `max_model_len` exceeds its
            context.
    """
    path = _resolve(settings)
    draft = _draft_model_config(path, settings, target)
    _check_folder(path, settings.model, load_format)
    if draft.is_encoder_decoder or draft.is_attention_free or draft.is_hybrid:
        raise ConfigError(settings.model, "a decoder-only model whose layers all are attention layers", "model")
    _check_vocabulary(path, settings.model, draft, target)
    return DraftModelSpec(
        model=path,
        max_model_len=_effective_max_model_len(settings.max_model_len, draft.max_model_len, target.max_model_len),
        vocab_size=draft.get_vocab_size(),
        dtype=str(target.dtype).removeprefix("torch."),
        quantization=settings.quantization,
        revision=settings.revision,
        trust_remote_code=target.trust_remote_code,
        load_format=load_format,
        enforce_eager=settings.enforce_eager or target.enforce_eager,
        seed=target.seed,
    )


def _resolve(settings: SpecBranchConfig) -> str:
    path = Path(os.path.expanduser(settings.model))  # Path.expanduser raises for an unknown user
    if path.exists():
        return str(path)
    if path.is_absolute() or settings.model.startswith((".", "~")):
        raise ConfigError(settings.model, "a folder that exists, or a hub id", "model")
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        return settings.model
    try:
        return str(get_model_path(settings.model, settings.revision))
    except (OSError, ValueError) as error:
        allowed = "a folder that exists, or a hub id in the local cache (HF_HUB_OFFLINE switches the hub off)"
        raise ConfigError(settings.model, allowed, "model") from error


def _draft_model_config(path: str, settings: SpecBranchConfig, target: Any) -> Any:
    """Build the draft's config as vLLM's `SpeculativeConfig` does, less what is for drafts of other kinds."""
    try:
        return ModelConfig(
            model=path,
            runner="draft",
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            trust_remote_code=target.trust_remote_code,
            dtype=target.dtype,
            seed=target.seed,
            revision=settings.revision,
            tokenizer_revision=target.tokenizer_revision,
            spec_target_max_model_len=target.max_model_len,
            quantization=settings.quantization,
            enforce_eager=settings.enforce_eager or target.enforce_eager,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(settings.model, f"a model that vLLM can load (this one: {reason})", "model") from error


def _check_folder(path: str, given: str, load_format: str) -> None:
    folder = Path(path)
    if load_format not in ("auto", "hf", "safetensors") or not folder.is_dir():
        return
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHT_PATTERNS):
        raise ConfigError(given, "a folder with weights: " + " or ".join(_WEIGHT_PATTERNS), "model")


def _check_vocabulary(path: str, given: str, draft: Any, target: Any) -> None:
    ours, theirs = draft.get_vocab_size(), target.get_vocab_size()
    if ours != theirs:
        allowed = f"a draft model with the target's vocabulary: the target has {theirs} token ids, this one has {ours}"
        raise ConfigError(given, allowed, "model")
    draft_file, target_file = Path(path) / "tokenizer.json", Path(target.tokenizer) / "tokenizer.json"
    if not (draft_file.is_file() and target_file.is_file()) or draft_file.read_bytes() == target_file.read_bytes():
        return
    draft_ids, target_ids = _token_ids(draft_file), _token_ids(target_file)
    if draft_ids is None or target_ids is None or draft_ids == target_ids:
        return
    different = sorted(draft_ids.items() ^ target_ids.items(), key=lambda item: item[1])
    token, token_id = different[0]
    allowed = f"a draft model with the target's vocabulary: the tokenizers differ, first at id {token_id} ({token!r})"
    raise ConfigError(given, allowed, "model")


def _token_ids(tokenizer_file: Path) -> dict[str, int] | None:
    """Return the vocabulary of a `tokenizer.json`, or None if it cannot be read.

    Added tokens are left out: siblings often name their spare ones differently, and such a draft is never wrong, only
    rejected.
    """
    try:
        vocabulary = json.loads(tokenizer_file.read_text(encoding="utf-8"))["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if isinstance(vocabulary, list):  # Unigram: [token, score] pairs, in the order of the ids
        return {str(pair[0]): token_id for token_id, pair in enumerate(vocabulary)}
    return dict(vocabulary)


def _effective_max_model_len(wanted: int | None, draft: int, target: int) -> int:
    if wanted is not None and wanted > draft:
        raise ConfigError(wanted, f"at most {draft}, the context of the draft model", "max_model_len")
    return min(draft, target, wanted or draft)
