"""Prompts from a file, for the demo and the benchmarks.

Owns the three file forms and their errors. Tokens are not its business. Runs in the process of the demo or a benchmark.
"""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from vllm_specbranch.errors import ConfigError

FIELD = "--prompts"
_FORMS = ".jsonl (id and prompt on each line), .json (a list of texts) or .txt (one on each line)"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text to continue.

    Attributes:
        name: the file's own id, or `line N` or `item N`, counted from 1.
    """

    name: str
    text: str


def default_prompts_path() -> Path:
    """Return the file of prompts inside this package."""
    return Path(str(files("vllm_specbranch") / "demo_prompts.jsonl"))


def read_prompts(path: Path, most: int | None = None) -> list[Prompt]:
    """Read the first prompts of a file.

    Args:
        path: `.jsonl`, `.json` or `.txt`; empty texts are left out.
        most: how many at most; None for all.

    Raises:
        ConfigError: the file cannot be read, has another form, or holds no prompt.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".txt": _read_txt}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ConfigError(str(path), f"a file of the form {_FORMS}", FIELD)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"a file that can be read ({error})", FIELD) from error
    found = [prompt for prompt in reader(path, text) if prompt.text.strip()][:most]
    if not found:
        raise ConfigError(str(path), "a file with at least one prompt that is not empty", FIELD)
    return found


def _read_txt(_: Path, text: str) -> list[Prompt]:
    return [Prompt(f"line {number}", line) for number, line in enumerate(text.splitlines(), 1)]


def _read_jsonl(path: Path, text: str) -> list[Prompt]:
    return [
        _prompt(path, f"line {number}", _parse(path, f"line {number}", line))
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]


def _read_json(path: Path, text: str) -> list[Prompt]:
    items = _parse(path, "it", text)
    if not isinstance(items, list):
        raise ConfigError(str(path), "a JSON list of prompts", FIELD)
    return [_prompt(path, f"item {number}", item) for number, item in enumerate(items, 1)]


def _parse(path: Path, where: str, text: str) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(str(path), f"valid JSON ({where} is not: {error})", FIELD) from error


def _prompt(path: Path, where: str, item: object) -> Prompt:
    if isinstance(item, str):
        return Prompt(where, item)
    if isinstance(item, dict) and isinstance(item.get("prompt"), str):
        return Prompt(str(item.get("id", where)), item["prompt"])
    raise ConfigError(str(path), f'a text or an object with a text "prompt" in each place ({where} has none)', FIELD)
