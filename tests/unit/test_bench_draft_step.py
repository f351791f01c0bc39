"""What a further row costs: the slope, the table and the words, on made-up times. No model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_draft_step as bench
from vllm_specbranch.shipped_pair import draft_path


def test_the_slope_is_relative_to_a_step_with_one_row() -> None:
    assert bench.slope({1: 2.0, 2: 2.2, 16: 5.0}) == pytest.approx(0.1)
    assert bench.slope({4: 2.0, 8: 2.0}) == 0.0
    assert bench.slope({4: 2.0}) is None and bench.slope({}) is None


def test_both_slopes_are_told_apart() -> None:
    """10% a row up to 16 rows; what comes after is dearer and only in the second one."""
    rows = [1, 2, 8, 16, 32]
    samples = {count: [9.0, 1 + 0.1 * (count - 1) + 2.0 * (count > 16), 0.0] for count in rows}
    line = bench._line("a step", samples, rows)
    assert line["b"] == pytest.approx(0.1) and line["b_of_all_rows"] > 0.14
    table = bench.as_table([line], rows)
    assert "b, up to 16 rows" in table and "b, up to 32 rows" in table and "0.100" in table
    few = bench._line("a step", {32: [1.0], 64: [1.5]}, [32, 64])
    assert few["b"] is None and bench.as_table([few], [32, 64]).splitlines()[-1].split()[-2] == "-"


class FakeModel:
    """As much of a draft model as the benchmark asks for."""

    block_size, num_blocks, vocab_size = 32, 1000, 50
    rows: list[int]

    def __init__(self) -> None:
        self.rows = []

    def forward(self, rows: list[Any], copies: list[Any], top_k: int) -> None:
        del copies, top_k
        self.rows.append(len(rows))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    made = FakeModel()
    monkeypatch.setattr(bench.DraftModel, "load", lambda _: made)
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)
    return made


def run(tmp_path: Path, *words: str) -> int:
    return bench.main(["--out", str(tmp_path / "out.json"), "--rows", "1,4,24", "--repetitions", "3", *words])


def test_the_last_line_is_the_result(tmp_path: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--enforce-eager", "--candidates", "1,2") == 0
    text = capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(text.splitlines()[-1]) == written
    assert f"{draft_path().name}, float32, not compiled, on core" in text and "medians of 3 steps" in text
    assert [line["step"] for line in written["lines"]] == ["1 candidates", "2 candidates", "a block copied per row"]
    assert all(len(found) == 3 for step in written["samples_ms"].values() for found in step.values())
    # Three steps; each number of rows twice, the first time untimed; one round more than is kept.
    assert len(model.rows) == 3 * 3 * 2 * 4 and set(model.rows) == {1, 4, 24}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--out /none/out.json", "--out"),
        ("--draft /none", "--draft"),
        ("--core 4096", "--core"),
        ("--repetitions 0", "--repetitions"),
        ("--rows 0,1", "--rows"),
        ("--rows 1,65", "--rows"),
        ("--rows 8", "--rows"),
        ("--candidates 0", "--candidates"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: str,
    said: str,
    tmp_path: Path,
    model: FakeModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path, *words.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and not model.rows
