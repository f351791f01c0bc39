"""Where the small trained pair inside this package lies, and its length head, so that the demo and the tests need no download.

Owns the paths only: what the models are is said in `models/README.md`, loading them is vLLM's business. Any process
may import it.
"""

from importlib.resources import files
from pathlib import Path


def target_path() -> Path:
    """Return the folder of the shipped target model: config, tokenizer and weights, as vLLM's `model` takes it."""
    return _model_path("target")


def draft_path() -> Path:
    """Return the folder of the shipped draft model, which has the tokenizer of the target model."""
    return _model_path("draft")


def head_path() -> Path:
    """Return the folder of the shipped length head, trained for the shipped pair, as `length_head` takes it."""
    path = Path(str(files("vllm_specbranch") / "models" / "head"))
    if not (path / "head.safetensors").is_file():
        raise FileNotFoundError(f"{path} holds no head: this installation of vllm-specbranch is not complete")
    return path


def _model_path(role: str) -> Path:
    path = Path(str(files("vllm_specbranch") / "models" / role))
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"{path} holds no weights: this installation of vllm-specbranch is not complete")
    return path
