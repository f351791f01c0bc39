"""The decode benchmark: its rows, what it makes of repetitions, and its words. No engine is started."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_decode
from benchmarks.decode_report import ModelTimes, Row, model_times, notes, rivals, row_as_json, rows_as_table, spread
from vllm_specbranch.compare import Difference
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure_messages import EngineSpec, RequestTrace, RunResult


def run(wall_s: float, step_us: float | None = None) -> RunResult:
    """A run of four tokens, one in each output."""
    times = [wall_s * (index + 1) / 4 for index in range(4)]
    request = RequestTrace(0.0, times, [1] * 4, [1, 2, 3, 4], "")
    if step_us is None:
        return RunResult(wall_s, 4, [request])
    counters = {"wait_s": 0.0, "propose_s": 0.0, "num_commit_batches": 4.0}
    return RunResult(wall_s, 4, [request], counters, {"num_rounds": 4.0}, {"step_1_rows": step_us})


def row(name: str, walls: list[float], step_us: float | None = None, is_wide: bool = False) -> Row:
    return Row(EngineSpec(name, "m"), "core 0", is_wide, [run(wall, step_us) for wall in walls])


def rows() -> list[Row]:
    return [
        row("plain", [4.0, 4.0, 2.0]),
        row("draft_model 2", [2.0, 2.0, 2.0]),
        row("draft_model 4", [4.0, 4.0, 1.0]),
        row("draft_model 2 on 2 cores", [1.0, 1.0, 1.0], is_wide=True),
        row("pearl", [2.0, 1.0, 1.0], 100_000.0),
        row("specbranch", [1.0, 1.0, 0.5], 300_000.0),
    ]


def words(*given: str) -> Any:
    return bench_decode._parser().parse_args(["--out", "out.json", *given])


def test_ratios_are_taken_repetition_by_repetition() -> None:
    plain, *_, ours = rows()
    assert ours.ratios(plain) == [4.0, 4.0, 4.0]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}


def test_model_times_come_from_the_baseline_and_from_pearl() -> None:
    assert model_times(rows(), 1) == ModelTimes(1000.0, 100.0, 10.0)
    assert model_times(rows(), 4) == ModelTimes(1000.0, None, None)
    assert model_times(rows()[:2], 1) == ModelTimes(1000.0, None, None)


def test_specbranch_is_held_against_the_best_of_each_kind() -> None:
    assert [one.name for one in rivals(rows())] == ["pearl", "draft_model 2", "draft_model 2 on 2 cores"]
    text = notes(rows(), model_times(rows(), 1))
    assert "c = 10.0" in text
    assert "specbranch / pearl (core 0): 2.00 (1.00..2.00)" in text
    assert "specbranch / draft_model 2 (core 0, its best number of draft tokens): 2.00 (2.00..4.00)" in text
    assert "specbranch / " not in notes(rows()[:-1], model_times(rows(), 1))


def test_table_and_json_say_whether_ids_are_the_same() -> None:
    all_rows = rows()
    all_rows[1].differences = [Difference("draft_model 2", 0, 1, 2, 3, 1e-7)]
    all_rows[2].differences = [Difference("draft_model 4", 0, 1, 2, 3, 0.5)]
    lines = rows_as_table(all_rows).splitlines()
    assert [line.split()[-1] for line in lines[2:6]] == ["identical", "ties", "DIFFERENT", "identical"]
    written = json.loads(json.dumps(row_as_json(all_rows[2], all_rows[0])))
    assert not written["identical"] and written["differences"][0]["gap"] == 0.5
    assert len(written["samples"]) == 3 and written["samples"][0]["request_s"] == [4.0]


def test_every_engine_has_its_row() -> None:
    args = words("--gammas", "2,4", "--settings", '{"specbranch": {"stop_threshold": 0.1}}')
    made = bench_decode._rows(args, Lineup("t", "d", place([0, 1], 0)))
    assert [one.name for one in made] == [
        "plain",
        "draft_model 2",
        "draft_model 4",
        "plain on 2 cores",
        "draft_model 2 on 2 cores",
        "draft_model 4 on 2 cores",
        "pearl",
        "specbranch",
    ]
    assert [one.spec.cores for one in made[2:5]] == [(0,), (0, 1), (0, 1)]
    assert [one.runs_on for one in made[4:7]] == ["cores 0,1", "cores 0,1", "core 0 + core 1"]
    settings = [one.spec.speculative for one in made[6:]]
    assert settings[0] is not None and settings[1] is not None
    assert settings[0]["policy"] == "pearl" and "stop_threshold" not in settings[0]
    assert settings[1]["stop_threshold"] == 0.1


def test_one_core_makes_no_wide_rows() -> None:
    made = bench_decode._rows(words("--gammas", "2"), Lineup("t", "d", place([0], 0)))
    assert [one.name for one in made] == ["plain", "draft_model 2", "pearl", "specbranch"]
    assert made[-1].runs_on == "core 0, shared"


def test_differences_are_found_once_over_all_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "transformers_gaps", lambda model: lambda prefixes: [0.5] * len(prefixes))
    plain, other = row("plain", [1.0, 1.0]), row("other", [1.0, 1.0])
    for one in other.runs:
        one.requests[0].token_ids[2] = 9
    bench_decode._compare([plain, other], [[7]], "m")
    assert plain.differences == []
    assert other.differences == [Difference("other", 0, 2, 3, 9, 0.5)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--out", "/none/out.json"], "--out"),
        (["--prompts", "/none.txt"], "--prompts"),
        (["--target", "/none"], "--target"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_decode.main(["--out", str(tmp_path / "out.json"), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_settings_must_be_by_policy() -> None:
    with pytest.raises(SystemExit):
        words("--settings", '{"stop_threshold": 0.1}')


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Memory:
        available = 1 << 30

    monkeypatch.setattr(bench_decode.psutil, "virtual_memory", Memory)
    few = [Row(EngineSpec("a", str(tmp_path), kv_cache_bytes=1 << 20), "core 0")]
    bench_decode._check_memory(few)
    with pytest.raises(ConfigError, match="fewer engines: 3 GiB needed, 1 GiB free"):
        bench_decode._check_memory(few * 4)
