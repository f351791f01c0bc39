"""What tells a draft model from others at a handshake."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_specbranch.draft_identity import draft_identity

CONFIG: dict[str, Any] = {"architectures": ["Llama"], "vocab_size": 50, "hidden_size": 8}


def write(folder: Path, config: object = CONFIG, tokenizer: str | None = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer)
    return folder


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    notes = {"transformers_version": "5.0", "_name_or_path": "elsewhere", "dtype": "float16"}
    reordered = dict(reversed(list((CONFIG | notes).items())))
    one = draft_identity(write(tmp_path / "a"))
    assert one == draft_identity(write(tmp_path / "b", reordered))
    assert len(one) == 64
    (tmp_path / "b" / "model.safetensors").write_bytes(b"better weights")
    assert one == draft_identity(tmp_path / "b")


@pytest.mark.parametrize(
    ("config", "tokenizer"),
    [(CONFIG | {"hidden_size": 16}, "{}"), (CONFIG | {"new": 1}, "{}"), (CONFIG, '{"a": 1}'), (CONFIG, None)],
)
def test_another_config_or_tokenizer_is_another_model(tmp_path: Path, config: object, tokenizer: str | None) -> None:
    assert draft_identity(write(tmp_path / "a")) != draft_identity(write(tmp_path / "b", config, tokenizer))


def test_what_is_not_here_has_none(tmp_path: Path) -> None:
    assert draft_identity(tmp_path / "missing") == ""
    assert draft_identity("some/hub-id") == ""
    assert draft_identity(write(tmp_path / "a", [1])) == ""
    (tmp_path / "a" / "config.json").write_text("{")
    assert draft_identity(tmp_path / "a") == ""
