"""The command line: words in, exit codes out, and nothing heavy loaded for help."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_specbranch import __version__, cli, demo, doctor
from vllm_specbranch.errors import PatchError, SpecBranchError
from vllm_specbranch.patching import Patch


def test_help_loads_neither_torch_nor_vllm() -> None:
    script = (
        "import sys\n"
        "from vllm_specbranch.cli import main\n"
        "try:\n    main(['demo', '--help'])\nfinally:\n    assert not {'torch', 'vllm'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--num-speculative-tokens" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and __version__ in capsys.readouterr().out


def test_words_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[demo.DemoSettings] = []
    monkeypatch.setattr(demo, "run", lambda settings, write: seen.append(settings) or 0)
    assert cli.main(["demo"]) == 0
    assert seen[0] == demo.DemoSettings()
    words = "demo --target a --draft b --prompts c.txt --num-prompts 3 --max-tokens 5 --num-speculative-tokens 4 --dtype bfloat16"
    words += " --draft-model-tokens 2 --extra-layers 0 --target-cores 0-1 --draft-cores 2 --max-model-len 99 --kv-cache-gib 0.25"
    words += " --enforce-eager --json out.json"
    cli.main(words.split())
    assert seen[1] == demo.DemoSettings(
        target=Path("a"),
        draft=Path("b"),
        prompts=Path("c.txt"),
        num_prompts=3,
        max_tokens=5,
        num_speculative_tokens=4,
        draft_model_tokens=2,
        dtype="bfloat16",
        extra_layers=0,
        target_cores=(0, 1),
        draft_cores=(2,),
        max_model_len=99,
        kv_cache_bytes=1 << 28,
        enforce_eager=True,
        json_out=Path("out.json"),
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("demo --target nowhere --draft nowhere", "--target='nowhere'"),
        ("demo --prompts nowhere.txt", "--prompts='nowhere.txt'"),
        ("demo --target-cores x", "--target-cores='x'"),
        ("demo --draft-cores 4096", "--draft-cores='4096'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vllm-specbranch: ") and said in line


@pytest.mark.parametrize(
    "words", ["", "bench", "demo --num-prompts 0", "demo --max-tokens x", "demo --extra-layers -1"]
)
def test_words_that_do_not_exist_exit_with_2(words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words.split())
    assert caught.value.code == 2


@pytest.mark.parametrize(("error", "code"), [(SpecBranchError("broken"), 1), (KeyboardInterrupt(), 130)])
def test_failures_have_their_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert cli.main(["demo"]) == code
    assert "vllm-specbranch: " in capsys.readouterr().err


# --- doctor ----------------------------------------------------------------------------------------------------------


def told(monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    lines: list[str] = []
    monkeypatch.setattr(cli, "_write", lines.append)
    code = cli.main(["doctor"])
    return code, "".join(lines)


def test_doctor_finds_this_installation_well(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    code, text = told(monkeypatch)
    assert code == 0, text
    assert "WRONG" not in text and "verified versions are" in text and "shipped pair" in text


def test_doctor_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise FileNotFoundError("no weights")

    monkeypatch.setattr(doctor, "versions", lambda: {"vllm": "missing"})
    monkeypatch.setattr(doctor.shipped_pair, "target_path", missing)
    code, text = told(monkeypatch)
    assert code == 1
    assert "WRONG  vllm missing" in text and "WRONG  shipped pair: no weights" in text and "cannot run" in text


def test_doctor_sees_foreign_source(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_specbranch import patching, plugin

    def record(symbol: str) -> Patch:
        return Patch(symbol, "wrap", "worker", "why", "when", {"0.32.0": "digest"}, lambda original: original)

    def fingerprint(symbol: str) -> str:
        if symbol == "gone":
            raise PatchError("gone is gone")
        return {"same": "digest", "other": "another"}[symbol]

    patches: Any = [record("same"), record("other"), record("gone")]
    monkeypatch.setattr(plugin, "all_patches", lambda: patches)
    monkeypatch.setattr(patching, "fingerprint", fingerprint)
    assert [one.is_ok for one in doctor._patches("0.32.0+cpu")] == [True, True, False, False]
    assert [one.is_ok for one in doctor._patches("0.33.0")] == [False]


@pytest.mark.parametrize("value", ["nan", "-1", "0", "much", "inf"])
@pytest.mark.parametrize("command", ["demo", "tune"])
def test_a_size_that_cannot_be_is_refused_in_one_line(
    command: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--kv-cache-gib", value])
    assert ended.value.code == 2
    assert f"{value!r} cannot be used; allowed: a number of GiB" in capsys.readouterr().err
