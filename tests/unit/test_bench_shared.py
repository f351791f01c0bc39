"""What the benchmark of shared draft servers makes of its runs; the engines themselves run in the benchmark only."""

from pathlib import Path

import pytest

from benchmarks import bench_shared
from benchmarks.bench_shared import Row, as_table, summary
from vllm_specbranch.lineup import Placement
from vllm_specbranch.measure_messages import Forward, RequestTrace, RunResult


def run(tokens_per_s: float, num_rows: float = 100.0, token_ids: tuple[int, ...] = (1, 2, 3, 4)) -> RunResult:
    request = RequestTrace(0.0, [1.0], [len(token_ids)], list(token_ids), "")
    counters = {"num_rows": num_rows, "num_rounds": 10.0, "num_hits": 5.0}
    return RunResult(4 / tokens_per_s, 4, [request], server_counters=counters)


def row(alone: float, together: float, rows_together: float = 50.0, token_ids: tuple[int, ...] = (1, 2, 3, 4)) -> Row:
    return Row("e", [[7]], [[1, 2, 3, 4]], [run(alone)], [run(together, rows_together, token_ids)])


def test_equal_parts_of_unequal_speeds_are_fair() -> None:
    found = summary([row(10.0, 5.0), row(20.0, 10.0)])
    assert found["is_fair"] and found["is_identical"]
    assert found["largest_deviation"] == pytest.approx({"tokens_per_s": 0.0, "num_rows": 0.0})
    assert [one["speed_kept"] for one in found["engines"]] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("other", [row(10.0, 9.0), row(10.0, 5.0, rows_together=90.0)])
def test_unequal_parts_are_not(other: Row) -> None:
    assert not summary([row(10.0, 5.0), other])["is_fair"]


def test_one_wrong_token_is_seen() -> None:
    found = summary([row(10.0, 5.0), row(10.0, 5.0, token_ids=(1, 2, 3, 5))])
    assert not found["is_identical"]
    result = {"plain": {"tokens_per_s": 4.0}, "draft_server_busy": {"alone": 0.1, "together": 0.4}, **found}
    text = as_table(result)
    assert [line.count("NO") for line in text.splitlines() if " e " in f" {line} "] == [0, 1]
    assert "40% with all" in text


def test_the_share_of_time_in_draft_steps() -> None:
    steps = [[Forward(0.0, 1.0, 1), Forward(3.0, 4.0, 2)], [], [Forward(0.0, 2.0, 1)]]
    assert bench_shared._busy(steps) == pytest.approx(4.0 / 6.0)
    assert bench_shared._busy([]) == 0.0


def test_engines_differ_from_plain_by_the_server_they_share() -> None:
    args = bench_shared._parser().parse_args(["--out", "x.json", "--num-engines", "3"])
    plain, *shared = bench_shared.specs(args, Placement((0,), (1,)), "tcp://127.0.0.1:7")
    assert plain.speculative is None and not plain.arguments["async_scheduling"]
    assert [one.name for one in shared] == ["engine 0", "engine 1", "engine 2"]
    for one in shared:
        assert one.speculative is not None
        assert one.speculative["draft_placement"] == "tcp://127.0.0.1:7"
        assert one.observe
        assert "async_scheduling" not in one.arguments, "ours turns it off by itself"


def test_a_folder_that_is_not_there_is_said_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_shared.main(["--out", str(tmp_path / "missing" / "x.json")]) == 2
    assert "--out" in capsys.readouterr().err
