"""`tune` on the shipped pair in real engines: it recommends what engines were quickest with, and its file is one that loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.model_paths import DRAFT, TARGET
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.tune_check import NUM_REPETITIONS

TUNE_TIMEOUT_S = 900


@pytest.mark.long
def test_tune_measures_searches_checks_and_writes(tmp_path: Path) -> None:
    out, told = tmp_path / "specbranch.json", tmp_path / "told.json"
    words = ["--target", TARGET, "--draft", DRAFT, "--out", str(out), "--json", str(told), "--always-write"]
    words += ["--num-prompts=3", "--max-tokens=24", "--dtype=float32", "--kv-cache-gib=0.1", "--enforce-eager"]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_specbranch.cli", "tune", *words],
        capture_output=True,
        text=True,
        timeout=TUNE_TIMEOUT_S,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    found = json.loads(told.read_text())
    medians = {name: sorted(ratios)[NUM_REPETITIONS // 2] for name, ratios in found["on_engines"].items()}
    ours = {name: median for name, median in medians.items() if "draft_model" not in name}
    assert 1 <= len(ours) <= 2 and len(medians) == len(ours) + 2
    assert "token ids identical" in done.stdout and "answers differ" not in done.stdout
    written = json.loads(out.read_text())
    config = SpecBranchConfig.from_user(written)
    assert Path(config.model) == Path(DRAFT)
    assert {"model": written["model"], **found["settings"]} == written
    verdict = found["verdict"]
    assert verdict["reason"] in done.stdout
    if verdict["method"] == "specbranch":
        assert f"decoded {max(ours.values()):.2f} times" in verdict["reason"]
