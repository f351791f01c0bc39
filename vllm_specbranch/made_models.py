"""Models made from other models: their files, and the cache that keeps them.

Owns reading and writing the files of a model (config, weights, tokenizer) and the folder in which each made model is kept, complete
or not at all. What is done to the weights is the business of `deepen` and `weaken`. Runs in the demo and in benchmarks, never in an
engine; imports torch only when weights are read or written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specbranch.config import cache_directory
from vllm_specbranch.errors import ConfigError

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

_WEIGHTS = "model.safetensors"
# Tokenizer, generation settings and chat template: whatever lies beside the weights and is none of them.
_COPIED = (".json", ".model", ".txt", ".jinja")


def read_config(source: Path) -> dict[str, Any]:
    """Return config.json of a model.

    Raises:
        ConfigError: there is none.
    """
    path = source / "config.json"
    if not path.is_file():
        raise ConfigError(str(source), "a folder with config.json", "source")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def read_tensors(source: Path) -> Tensors:
    """Return all weights of a model by name.

    Raises:
        ConfigError: there are none.
    """
    from safetensors.torch import load_file

    files = sorted(source.glob("*.safetensors"))
    if not files:
        raise ConfigError(str(source), "a folder with *.safetensors", "source")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def require_other_folder(source: Path, out: Path) -> None:
    """Refuse to write a model over the one that it is made from.

    Raises:
        ConfigError: `out` is `source`.
    """
    if out.resolve() == source.resolve():
        raise ConfigError(str(out), "a folder other than the source", "out")


def write_model(source: Path, out: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    """Write weights and config.json, and copy tokenizer and generation files from `source`.

    Args:
        source: folder of the model that the new one is made from.
        out: folder to write, made when missing.
    """
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("*.safetensors"):
        stale.unlink()
    save_file(tensors, out / _WEIGHTS, metadata={"format": "pt"})
    for file in source.iterdir():
        if file.suffix in _COPIED and not file.name.endswith(".safetensors.index.json"):
            shutil.copyfile(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def cached_folder(source: Path, label: str, cache: Path | None = None) -> Path:
    """The folder in which a model made from `source` is kept.

    Args:
        source: folder of a model; another config or other weights in it give another folder.
        label: what is made of it.
        cache: folder of all results; None means `cache_directory()`.
    """
    return (cache_directory() if cache is None else cache) / f"{source.name}-{label}-{_digest(source)[:12]}"


def made_once(folder: Path, report: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Return the report of a kept model, which is made first if it is not there.

    Args:
        folder: of the model.
        report: name of the file in it that says what was made.
        make: writes the model to the folder that it is given, and returns the report.
    """
    if not (folder / report).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Made aside and renamed, so that a folder with that name is always complete.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="unfinished-") as aside:
            made = Path(aside) / "model"
            said = make(made)
            (made / report).write_text(json.dumps(said) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    stored: dict[str, Any] = json.loads((folder / report).read_text())
    return stored


def _digest(source: Path) -> str:
    """The sha256 of what a result depends on: the config and the weights."""
    digest = hashlib.sha256()
    for path in [source / "config.json", *sorted(source.glob("*.safetensors"))]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
