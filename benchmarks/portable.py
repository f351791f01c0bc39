"""Results as JSON takes them, without the places of the machine that they were made on. Runs in the process of a benchmark."""

from pathlib import Path
from typing import Any

import msgspec

from vllm_specbranch.measure_messages import Emulation

REPOSITORY = Path(__file__).resolve().parent.parent


def portable(value: Any) -> Any:
    """The same as JSON takes it: paths are relative to the repository, or names only."""
    if isinstance(value, dict):
        return {name: portable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [portable(one) for one in value]
    if isinstance(value, Emulation):
        return msgspec.to_builtins(value)
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")):
        path = Path(value).absolute()
        return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name
    return value
