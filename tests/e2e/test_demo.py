"""The demo in real vLLM, small; and the life of the engines that it measures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm")

from tests.model_paths import DRAFT, TARGET
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure import MeasureError, running
from vllm_specbranch.provenance import available_cores

DEMO_TIMEOUT_S = 600
IDLE_S = 4.0
# Of one core. vLLM's own threads wake up a few times a second; a loop that polls takes it all.
MAX_IDLE_SHARE = 0.05


def test_demo_shows_text_table_and_identical_ids(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    words = ["--extra-layers=0", "--enforce-eager", "--num-prompts=2", "--max-tokens=16", "--kv-cache-gib=0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_specbranch.cli", "demo", *words, f"--json={out}"],
        capture_output=True,
        text=True,
        timeout=DEMO_TIMEOUT_S,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "token ids: IDENTICAL to plain vLLM (64 tokens of 2 prompts compared)"
    assert any("ready" in line and line.startswith("  [") for line in lines)
    (head,) = [at for at, line in enumerate(lines) if "tokens/s" in line and "inter-token p50" in line]
    rows = lines[head + 2 : head + 5]
    assert [row.split("  ")[0].split(",")[0] for row in rows] == ["plain vLLM", "vLLM draft_model", "specbranch"]
    assert any(line.startswith("[HumanEval/0]") for line in lines)
    written = json.loads(out.read_text())
    token_ids = [written["rows"][name]["token_ids"] for name in ("plain", "draft_model", "specbranch")]
    assert token_ids[0] == token_ids[1] == token_ids[2]
    assert [len(ids) for ids in token_ids[0]] == [16, 16]
    assert written["rows"]["specbranch"]["mean_acceptance_length"] >= 1.0
    assert written["rows"]["specbranch"]["hit_rate"] is not None


def test_engine_is_pinned_quiet_when_idle_and_leaves_nothing_behind() -> None:
    cores = available_cores()
    lineup = Lineup(TARGET, DRAFT, place(cores, 0), kv_cache_bytes=64 << 20, enforce_eager=True, num_engines=1)
    with pytest.raises(MeasureError, match="ended"), running([lineup.specbranch(4)]) as (engine,):
        assert engine.facts["cores"] == list(lineup.placement.target_cores)
        prompts = engine.encode(["import os\n", "def f(x):\n", "class A:\n"])
        together = engine.run(prompts, 8, batch_size=3)
        alone = engine.run(prompts, 8)
        assert [one.token_ids for one in together.requests] == [one.token_ids for one in alone.requests]
        assert [len(one.token_ids) for one in alone.requests] == [8, 8, 8]
        assert all(sum(one.output_sizes) == 8 and one.text for one in alone.requests)
        starts = [one.start_s for one in alone.requests]
        assert starts == sorted(starts) and starts[1] >= alone.requests[0].output_times_s[-1]
        assert alone.engine_counters["num_rounds"] == sum(len(one.output_times_s) for one in alone.requests)
        assert alone.server_counters["num_rounds"] > 0
        assert engine.pid is not None
        family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
        assert len(family) == 2
        assert idle_share(family) < MAX_IDLE_SHARE
        family[0].kill()
        _, alive = psutil.wait_procs(family[1:], timeout=10)
        assert not alive
        engine.encode(["x"])


def idle_share(processes: list[psutil.Process]) -> float:
    """The largest share of a core that one of them uses, the least of three looks."""

    def used() -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in processes]

    looks = []
    for _ in range(3):
        before = used()
        time.sleep(IDLE_S)
        looks.append(max(after - earlier for after, earlier in zip(used(), before, strict=True)) / IDLE_S)
    return min(looks)
