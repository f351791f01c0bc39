"""`vllm-specbranch draft-server`: words, settings and refusals; that it serves is shown in tests/e2e."""

import socket
from pathlib import Path
from typing import Any

import pytest

from vllm_specbranch import cli, standalone
from vllm_specbranch.draft_model import DraftModel
from vllm_specbranch.keys import make_keys
from vllm_specbranch.standalone import StandaloneSettings

WORDS = ["draft-server", "--model", "draft", "--bind", "tcp://127.0.0.1:0"]


@pytest.fixture(autouse=True)
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(settings: object) -> None:
        pytest.fail("a model was loaded before the settings were checked")

    monkeypatch.setattr(DraftModel, "load", load)


def test_words_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StandaloneSettings] = []
    monkeypatch.setattr(standalone, "run", lambda settings, write: seen.append(settings) or 0)
    assert cli.main([*WORDS, "--insecure"]) == 0
    assert seen[0] == StandaloneSettings("tcp://127.0.0.1:0", None, {"model": "draft"})
    more = "--keys k --num-speculative-tokens 4 --dtype bfloat16 --max-model-len 99 --cores 0-1 --kv-cache-gib 0.5 --enforce-eager"
    more += " --trust-remote-code --max-engines 3 --max-requests 64 --settings"
    assert cli.main([*WORDS, *more.split(), '{"policy": "pearl"}']) == 0
    draft: dict[str, Any] = {
        "model": "draft",
        "policy": "pearl",
        "num_speculative_tokens": 4,
        "max_model_len": 99,
        "draft_cpu_cores": "0-1",
        "draft_kv_cache_bytes": 1 << 29,
        "enforce_eager": True,
    }
    assert seen[1] == StandaloneSettings("tcp://127.0.0.1:0", Path("k"), draft, "bfloat16", True, 3, 64)


@pytest.mark.parametrize(
    "words", [WORDS, [*WORDS, "--insecure", "--keys", "k"], [*WORDS, "--insecure", "--settings", "[1]"]]
)
def test_words_that_cannot_be_used(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ('{"model": "other"}', "given once"),
        ('{"policy": "none"}', "policy='none'"),
        ('{"deterministic": true}', "deterministic=True"),
        ('{"length_head": "folder"}', "a trained head belongs to the engine"),
        ('{"draft_device": 0}', "CUDA_VISIBLE_DEVICES"),
        ('{"draft_placement": "tcp://host:1", "draft_keys": "insecure"}', "belongs to the engine"),
        ('{"draft_placement": "ray"}', "belongs to the engine"),
        ('{"draft_cpu_cores": [100000]}', "draft_cpu_cores=[100000]"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_the_model_loads(
    settings: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*WORDS, "--insecure", "--settings", settings]) == 2
    assert reason in capsys.readouterr().err


def test_keys_and_address_are_checked_before_the_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*WORDS, "--keys", str(tmp_path / "missing")]) == 2
    assert "server.key_secret" in capsys.readouterr().err
    assert cli.main([*WORDS[:4], "ipc:///tmp/s", "--insecure"]) == 2
    assert "--bind" in capsys.readouterr().err
    make_keys(tmp_path / "keys")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert cli.main([*WORDS[:4], address, "--keys", str(tmp_path / "keys")]) == 1
    assert "in use" in capsys.readouterr().err
    assert cli.main([*WORDS[:4], "tcp://no-such-host.invalid:5600", "--insecure"]) == 1
    assert "no-such-host" in capsys.readouterr().err
