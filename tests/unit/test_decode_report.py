"""What the decode benchmark makes of its runs: speeds, parts of a step, tables and JSON. All runs are made up."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from benchmarks.decode_report import as_text, doubts, edge_doubt, measured_as_json, timeline
from benchmarks.decode_rows import rivals, steady_tokens_per_s
from benchmarks.decode_times import model_times, overrun_share, step_parts
from tests.decode_results import made_measured, made_row, made_run
from vllm_specbranch.compare import Difference
from vllm_specbranch.measure_messages import Emulation, Forward, RequestTrace, RunResult

FAST = Emulation(20.0, 4.0)


def request(times: list[float], sizes: list[int] | None = None) -> RequestTrace:
    return RequestTrace(0.0, times, sizes or [1] * len(times), [0] * (sum(sizes) if sizes else len(times)), "")


def test_ratios_are_taken_repetition_by_repetition() -> None:
    plain, ours = made_row("plain", [4.0, 2.0]), made_row("specbranch", [1.0, 1.0])
    assert ours.ratios(plain) == pytest.approx([4.0, 2.0])
    assert ours.whole_run_ratios(plain) == pytest.approx([4.0, 2.0])


def test_steady_speed_leaves_out_prefills_and_the_end() -> None:
    one = RunResult(10.0, 4, [request([4.0, 5.0, 6.0, 7.0], [1, 2, 2, 2])])
    assert steady_tokens_per_s(one, 1) == 2.0
    # The second request is prefilled until 6.0, and the first one ends at 7.0.
    two = RunResult(10.0, 6, [request([4.0, 6.0, 7.0]), request([6.0, 7.0, 9.0])])
    assert steady_tokens_per_s(two, 2) == 2.0
    assert steady_tokens_per_s(two, 1) == pytest.approx(3 / 4)
    assert steady_tokens_per_s(two, 3) == pytest.approx(6 / 10)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(2, 12), st.integers(1, 4), st.floats(0.5, 5.0))
def test_steady_speed_of_even_rounds(batch_size: int, num_rounds: int, tokens: int, wall_s: float) -> None:
    run = made_run(wall_s, batch_size, num_rounds=num_rounds, tokens_per_round=tokens)
    round_s = wall_s / (num_rounds + 1)
    assert steady_tokens_per_s(run, batch_size) == pytest.approx(batch_size * tokens / round_s)


def test_model_times_come_from_the_baseline_and_from_pearl() -> None:
    measured = made_measured()
    times = measured.times()
    round_ms, step_ms = 4.1e3 / 61, 2.1e3 / 21 / 5
    assert times.target_round_ms == pytest.approx(round_ms, rel=0.05)
    assert times.target_forward_ms == pytest.approx(round_ms / 2, rel=0.05)
    assert times.draft_forward_ms == pytest.approx(step_ms)
    assert times.draft_step_ms == pytest.approx(1.25 * step_ms)
    assert times.c == pytest.approx(round_ms / step_ms / 1.25, rel=0.05)
    assert times.c_of_forwards == pytest.approx(round_ms / step_ms / 2, rel=0.05)
    assert set(times.target_ms_by_tokens) == {1} == set(times.draft_ms_by_rows)
    without = model_times(measured.rows[:2], 1)
    assert without.draft_step_ms is None and without.c is None and without.draft_ms_by_rows == {}
    assert without.draft_forward_ms is None and without.c_of_forwards is None


def test_what_a_draft_server_costs_the_target_is_no_price_of_tokens() -> None:
    measured = made_measured()
    alone = measured.times().target_ms_by_tokens
    for row in measured.rows:
        if row.entry.is_ours:
            slow = [Forward(float(start), start + 0.5, 1) for start in range(10)]
            row.runs = [replace(run, target_forwards=slow) for run in row.runs]
    times = measured.times()
    assert times.target_ms_by_tokens == alone and times.target_ms_by_tokens_beside_draft == {1: pytest.approx(500.0)}
    assert "beside a draft server: 1: 500.00 ms" in as_text(measured)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_parts_of_a_step_add_up(batch_size: int) -> None:
    for row in made_measured(batch_size).rows:
        one = step_parts(row)
        parts = [part or 0.0 for part in (one.target_ms, one.draft_wait_ms, one.messages_ms, one.propose_ms)]
        assert sum(parts) + one.rest_ms == pytest.approx(one.step_ms)
        assert (one.propose_ms is not None) == (one.messages_ms is not None) == row.entry.is_ours


def test_a_disturbed_repetition_moves_no_part_of_a_step() -> None:
    row = made_row("pearl", [2.0, 2.1, 2.2])
    before = step_parts(row)
    row.runs[2].engine_counters["propose_s"] = 60.0
    assert step_parts(row) == before


def test_draft_model_waits_for_its_own_draft() -> None:
    plain, sequential, *_, ours = made_measured().rows
    assert step_parts(plain).draft_wait_ms is None and step_parts(plain).draft_busy is None
    assert step_parts(sequential).draft_busy == pytest.approx(0.5)
    waited = step_parts(sequential).draft_wait_ms
    assert waited is not None and waited == pytest.approx(step_parts(sequential).step_ms / 2)
    assert step_parts(ours).draft_wait_ms == pytest.approx(step_parts(ours).step_ms * (1 / 10 - 1 / 50))
    assert step_parts(ours).messages_ms == pytest.approx(step_parts(ours).step_ms / 50)


def test_overruns_are_a_share_of_all_forwards_but_prefills() -> None:
    row = made_row("pearl", [])
    late, prefill, in_time = Forward(0, 0.023, 1), Forward(0, 9.0, 128), Forward(0, 0.021, 1)
    row.runs.append(
        RunResult(1.0, 1, [], target_forwards=[late, prefill, in_time], draft_forwards=[Forward(0, 0.004, 1)])
    )
    assert overrun_share(row, FAST) == pytest.approx(1 / 3)
    assert overrun_share(row, None) == 0.0 == overrun_share(made_row("plain", []), FAST)


def test_rivals_are_the_best_of_each_kind() -> None:
    assert [one.name for one in rivals(made_measured().rows)] == ["draft_model 2", "draft_model 2 on 2 cores", "pearl"]
    assert rivals(made_measured().rows[:1]) == []


def test_text_says_what_counts() -> None:
    measured = made_measured(emulation=FAST)
    measured.rows[1].differences = [Difference("draft_model 2", 0, 1, 2, 3, 1e-7)]
    measured.rows[2].differences = [Difference("draft_model 4", 0, 1, 2, 3, 0.5)]
    text = as_text(measured)
    assert text.startswith("=== python_holdout, batch 1, emulated: target 20 ms, draft step 4 ms")
    lines = {line.split("  ")[0]: line for line in reversed(text.splitlines()) if "  " in line}
    assert lines["plain"].endswith("identical")
    assert lines["draft_model 2"].endswith("ties") and lines["draft_model 4"].endswith("DIFFERENT")
    assert "Speed relative to" in text and "draft_model 2 (its best)  draft_model 2 on 2 cores (its best)" in text
    assert "Not slower than plain (lower bound at least 0.98): pearl yes" in text
    assert "Emulated forwards that took more than 1.1 times as long" in text
    assert "Emulated" not in as_text(made_measured()) and "real devices" in as_text(made_measured())


def test_a_draft_server_that_was_lost_is_said() -> None:
    measured = made_measured()
    assert "runs without" not in as_text(measured)
    ours = measured.rows[-1]
    silent = made_run(2.0, is_ours=True)
    ours.runs[0] = RunResult(
        silent.wall_s, silent.num_steps, silent.requests, {"num_breaker_openings": 1.0, "wait_s": 0.0}
    )
    assert as_text(measured).count("1, 1 runs without") == 1


def test_the_price_of_our_scheduling_is_explained() -> None:
    measured = made_measured()
    assert "synchronous" not in as_text(measured)
    measured.rows.insert(1, made_row("plain, async off", [4.0, 4.2, 4.1]))
    assert "'plain, async off' is a second plain engine" in as_text(measured)
    measured.rows[0].entry.facts = {"async_scheduling": True}
    assert "Asynchronous scheduling is on in plain, and off in all others." in as_text(measured)


def test_a_slow_row_is_called_slower() -> None:
    measured = made_measured()
    measured.rows = [made_row("plain", [1.0, 1.0, 1.0]), made_row("pearl", [1.2, 0.9, 1.1])]
    assert "pearl NO (0.83)" in as_text(measured)


def test_speeds_made_of_few_steps_are_named() -> None:
    text = "Full batches without a prefill lasted few engine steps"
    measured = made_measured()
    for row in measured.rows:
        row.runs = [made_run(2.0, 1, row.entry.is_ours, 30)]
    assert text not in as_text(measured)
    measured.rows[0].runs = [made_run(2.0, num_rounds=29)]
    measured.rows[1].runs = [made_run(2.0, num_rounds=0)]
    line = next(one for one in as_text(measured).splitlines() if one.startswith(text))
    assert line.endswith(": plain 29, draft_model 2 none, so whole runs count")


def test_a_control_shows_what_a_run_can_tell() -> None:
    measured = made_measured()
    assert "is a plain engine too" not in as_text(measured)
    measured.rows.append(made_row("plain, async off", [4.0, 4.2, 4.1]))
    assert "'plain, async off' is a plain engine too: 1.00x [1.00..1.00].\n" in as_text(measured)
    measured.rows[-1] = made_row("plain, async off", [4.0, 4.8, 4.5])
    assert "is a plain engine too: 0.91x [0.88..1.00]. So this run cannot tell." in as_text(measured)


def test_cores_too_slow_for_an_emulation_are_said() -> None:
    assert "too slow for these durations" in as_text(made_measured(emulation=FAST))
    assert "too slow" not in as_text(made_measured(emulation=Emulation(100.0, 100.0)))


@pytest.mark.parametrize(
    ("best", "tried", "is_doubtful"),
    [
        (2, [2, 4, 8], True),
        (4, [2, 4, 8], False),
        (8, [2, 4, 8], True),
        (1, [1, 2, 4], False),
        (1, [1], True),
        (None, [2], False),
        (2, [], False),
    ],
)
def test_the_best_at_the_edge_of_what_was_tried_is_doubtful(
    best: int | None, tried: list[int], is_doubtful: bool
) -> None:
    assert bool(edge_doubt(best, tried)) == is_doubtful


def test_doubts_of_both_rivals_are_said_apart() -> None:
    measured = made_measured()
    assert doubts(measured) == [] and "Doubt" not in as_text(measured)
    for row in measured.rows:
        if row.entry.group == "draft_model":
            speculative = {"num_speculative_tokens": int(row.name.split()[1])}
            row.entry.spec = replace(row.entry.spec, speculative=speculative)
    narrow, wide = doubts(measured)
    assert "edge of the draft tokens tried, 2" in narrow and narrow.endswith("(core 0; see --gammas)")
    assert as_text(measured).count("Doubt: draft_model was best at the edge") == 2
    measured.rows.insert(1, made_row("draft_model 1", [5.0, 5.0, 5.0], 1, 2, 1))
    measured.rows[1].entry.spec = replace(measured.rows[1].entry.spec, speculative={"num_speculative_tokens": 1})
    assert doubts(measured) == [wide] == measured_as_json(measured)["doubts"]


def test_json_has_all_rows_with_their_samples() -> None:
    measured = made_measured(4, FAST)
    measured.rows[2].differences = [Difference("draft_model 4", 0, 1, 2, 3, 0.5)]
    written = json.loads(json.dumps(measured_as_json(measured)))
    assert written["batch_size"] == 4 and written["emulation"]["target_forward_ms"] == 20.0
    assert [one["name"] for one in written["rows"]] == [row.name for row in measured.rows]
    row = written["rows"][2]
    assert not row["identical"] and row["differences"][0]["gap"] == 0.5
    ours = written["rows"][6]
    assert ours["ratio_to_baseline"]["to"] == "plain" and ours["is_ours"] and ours["num_devices"] == 2
    assert ours["ratio_to_baseline"]["low"] <= ours["ratio_to_baseline"]["median"] <= ours["ratio_to_baseline"]["high"]
    assert [one["to"] for one in ours["ratios_to_rivals"]] == ["draft_model 2", "draft_model 2 on 2 cores", "pearl"]
    assert ours["accepted_by_position"] == [30, 30] and ours["drafted_by_position"] == [30, 30, 15]
    assert len(ours["samples"]) == 3 and len(ours["samples"][0]["request_s"]) == 4
    assert written["rows"][0]["whole_run_ratio_to_baseline"]["median"] == 1.0


def test_the_timeline_is_the_first_rounds_of_the_first_request() -> None:
    found = timeline(made_run(2.1, 1, True, 20, 3, 5))
    assert len(found["outputs"]) == 16 and found["outputs"][0] == [0.0, 1] and found["outputs"][1][1] == 3
    end_s = found["outputs"][-1][0]
    for forwards in (found["target_forwards"], found["draft_forwards"]):
        assert forwards and all(start < end_s and end > 0 for start, end, _ in forwards)
    assert math.isclose(end_s, 1.5)
