"""The replay benchmark: its alternatives, its table, what it makes of engine runs, and its words. No engine is started."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import replay as bench
from benchmarks import replay_engine
from benchmarks.replay_engine import (
    EMULATION,
    around_forwards_ms,
    check_engine,
    compare_counts,
    split_time,
    times_of,
)
from benchmarks.replay_report import Line, engine_text, lines_as_table
from tests.made_recordings import BLOCK_SIZE, NUM_BLOCKS, fake, recordings_of
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.lineup import Lineup, Placement
from vllm_specbranch.measure_messages import EngineSpec, Forward, RequestTrace, RunResult
from vllm_specbranch.replay import Recording, Replayed, Times
from vllm_specbranch.replay_study import Study, as_json
from vllm_specbranch.replay_study import recordings_of as recorded

AGREES = [[True, True, False] * 5, [False, True] * 6]


def study(batch_size: int = 1) -> Study:
    model, _ = fake()
    return Study(model, NUM_BLOCKS, BLOCK_SIZE, recordings_of(AGREES), batch_size)


def words(*given: str) -> Any:
    return bench._parser().parse_args(["--out", "out.json", *given])


def test_all_alternatives_are_settings() -> None:
    for name in bench.ALTERNATIVES:
        for settings in bench.alternatives(name, [4, 8]):
            SpecBranchConfig.from_user({"model": "draft", **settings})
    assert len(bench.alternatives("specbranch, wait", [4, 8])) == 6


def test_a_line_has_every_policy_and_its_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    args = words("--ratios", "4,8", "--row-costs", "0.1", "--gammas", "4", "--policies", "pearl;specbranch;best_first")
    lines = bench.replay_pair(study(), 0.35, args)
    assert [(one.noise, one.c, one.b) for one in lines] == [(0.35, 4.0, 0.1), (0.35, 8.0, 0.1)]
    names = ["draft_model", "pearl", "specbranch", "best_first", "every outcome guessed"]
    for line in lines:
        assert list(line.rows) == names
        bound = line.rows["every outcome guessed"]["speed_up"]
        assert all(row["speed_up"] <= bound + 1e-9 for row in line.rows.values())
    table = lines_as_table(lines).splitlines()
    assert table[2].split()[:3] == ["0.35", "4", "0.1"] and "(4)" in table[2]
    assert capsys.readouterr().out.count("\n") == 2
    assert "every outcome guessed" not in bench.replay_pair(study(2), 0.0, args)[0].rows


def test_brackets_say_what_was_chosen() -> None:
    line = Line(0.0, 5.0, 0.02)
    line.add("best_first", {"num_speculative_tokens": 16, "max_branches": 32}, {"speed_up": 2.0})
    line.add("specbranch", {"num_speculative_tokens": 8, "on_miss": "wait:2"}, {"speed_up": 1.5})
    line.add("every outcome guessed", {}, {"speed_up": 3.0})
    assert [line.cell(name) for name in line.rows] == ["2.00 (16 k32)", "1.50 (8 2)", "3.00"]


def test_json_of_a_replay() -> None:
    ours = study()
    plain = ours.plain(Times(5.0, 1.0))
    row = as_json(ours.run({"policy": "specbranch"}, Times(5.0, 1.0)), plain)
    assert json.loads(json.dumps(row)) == row
    assert row["hit_rate"] == row["server_counters"]["num_hits"] / row["num_rounds"]
    assert as_json(plain, plain)["speed_up"] == 1.0 and as_json(plain, plain)["hit_rate"] is None


def test_recordings_of_a_run() -> None:
    traces = [RequestTrace(0.0, [1.0], [3], [7, 8, 9], "")]
    assert recorded([[1, 2]], RunResult(1.0, 1, traces), 2) == [Recording((1, 2), (7, 8, 9), 2)]


def counted(num_rounds: int, num_hits: int) -> Any:
    return {"num_rounds": num_rounds, "num_hits": num_hits}


@pytest.mark.parametrize(
    ("rounds", "hits", "agrees"), [(100, 50, True), (102, 51, True), (103, 50, False), (100, 52, False)]
)
def test_counts_agree_within_two_percent(rounds: int, hits: int, agrees: bool) -> None:
    run = RunResult(1.0, 1, [], server_counters=counted(rounds, hits))
    check = compare_counts("pearl", run, Replayed(server=counted(100, 50)))
    assert check["agrees"] == agrees
    text = engine_text({"deterministic": [check], "observed": []})
    assert ("DO NOT AGREE" in text) != agrees


def observed_run(round_ms: float, num_rounds: int = 10, prefill_ms: float = 100.0) -> RunResult:
    """One request: a long prefill, then rounds with forwards of 20 ms that bring two tokens each."""
    starts = [prefill_ms / 1e3 + round_ms / 1e3 * index for index in range(num_rounds)]
    times = [prefill_ms / 1e3, *(start + round_ms / 1e3 for start in starts)]
    trace = RequestTrace(0.0, times, [1] + [2] * num_rounds, list(range(1 + 2 * num_rounds)), "")
    return RunResult(
        times[-1],
        num_rounds + 1,
        [trace],
        engine_counters={"wait_s": 0.022, "messages_s": 0.0055, "propose_s": 0.011},
        server_counters={**counted(10, 5), "handling_us": 3300},
        target_forwards=[Forward(0.0, prefill_ms / 1e3, 100), *(Forward(one, one + 0.02, 3) for one in starts)],
        num_overruns=1,
    )


def test_the_time_of_a_round_is_split() -> None:
    runs = [observed_run(30.0), observed_run(40.0), observed_run(30.0)]
    bare = Replayed(num_forwards=8, time_s=0.2, steady_s=0.2, num_steady_tokens=20, server=counted(8, 4))
    in_vllm = Replayed(num_forwards=8, time_s=0.3, steady_s=0.27, num_steady_tokens=20, server=counted(8, 4))
    split = split_time("pearl", runs, bare, in_vllm)
    names = ("target_forward_ms", "wait_ms", "messages_ms", "propose_ms", "rest_ms")
    assert [split[name] for name in names] == pytest.approx([20.0, 1.5, 0.5, 1.0, 100 / 3 - 23.0])
    assert split["server_handling_ms"] == pytest.approx(0.3) and split["round_ms"] == pytest.approx(100 / 3)
    share = split["share_of_oracle"]
    assert share["samples"] == pytest.approx([2 / 3, 1 / 2, 2 / 3]) and share["median"] == pytest.approx(2 / 3)
    assert share["interval"] == pytest.approx((1 / 2, 2 / 3))
    assert split["share_of_oracle_in_vllm"]["median"] == pytest.approx(0.9)
    assert split["overrun_share"] == pytest.approx(3 / 33)
    around_ms = around_forwards_ms(runs[:1], 3)
    assert around_ms == pytest.approx(10.0)
    text = engine_text({"deterministic": [], "observed": [split], "around_plain_forwards_ms": around_ms})
    assert (
        "waiting for drafts 1.50, messages 0.50, proposer 1.00, rest of vLLM 10.33" in text
        and "67% [50%..67%] of the replay's speed" in text
    )
    assert "90% [68%..90%] with what vLLM adds to a plain forward (10.00 ms)" in text and "9.1%" in text


def test_a_prefill_that_takes_long_is_no_part_of_the_speeds() -> None:
    bare = Replayed(num_forwards=8, time_s=0.2, steady_s=0.2, num_steady_tokens=20, server=counted(8, 4))
    short, long = (split_time("pearl", [observed_run(30.0, prefill_ms=ms)], bare, bare) for ms in (20.0, 500.0))
    for name in ("round_ms", "rest_ms"):
        assert short[name] == pytest.approx(long[name])
    assert short["share_of_oracle"]["median"] == pytest.approx(long["share_of_oracle"]["median"])


def test_runs_without_steady_rounds_are_taken_whole() -> None:
    run = RunResult(0.06, 2, [], target_forwards=[Forward(0.0, 0.02, 100), Forward(0.03, 0.05, 1)])
    assert around_forwards_ms([run], 1) == pytest.approx(10.0)


class FakeEngine:
    """Notes what it is asked for."""

    asked: ClassVar[list[tuple[str, int, object]]] = []

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_until_ready(self) -> None:
        pass

    def run(self, prompts: Any, max_tokens: int, batch_size: int, emulation: object = None) -> RunResult:
        assert emulation is None or self.spec.observe
        self.asked.append((self.spec.name, len(prompts), emulation))
        return observed_run(30.0)


def test_engines_are_warmed_up_under_the_emulation_in_which_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_engine, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "asked", [])
    lineup = Lineup("target", "draft", Placement((0,), (1,)))
    check = check_engine(lineup, study(), [[1, 2, 3]] * 5, 8, repetitions=4)
    by_engine: dict[str, list[tuple[int, object]]] = {}
    for name, num_prompts, emulation in FakeEngine.asked:
        by_engine.setdefault(name, []).append((num_prompts, emulation))
    for name, asked in by_engine.items():
        is_observed = "observed" in name
        assert asked[0][0] == 2 and [count for count, _ in asked[1:]] == [5] * (4 if is_observed else 1)
        assert {how for _, how in asked} == {EMULATION if is_observed else None}
    assert len(by_engine) == 1 + 2 * len(replay_engine.CASES)
    assert all(len(one["tokens_per_s"]) == 4 for one in check["observed"]) and not check["agrees"]


def test_engine_and_replay_have_the_same_times() -> None:
    times = times_of(EMULATION)
    assert times.forward_ms(5) == EMULATION.target_forward_ms
    assert times.step_ms(2) == pytest.approx(EMULATION.draft_step_ms * (1 + EMULATION.draft_token_cost))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--out", "/none/out.json"], "--out"),
        (["--prompts", "/none.txt"], "--prompts"),
        (["--target", "/none"], "--target"),
        (["--draft", "/none"], "--draft"),
        (["--policies", "magic"], "--policies"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--repetitions", "0"], "--repetitions"),
        (["--gammas", "0"], "--gammas"),
        (["--ratios", ""], "--ratios"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--out", str(tmp_path / "out.json"), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
