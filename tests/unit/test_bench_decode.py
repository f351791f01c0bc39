"""The decode benchmark: its words, its rows, its order of runs. No engine is started."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_decode, decode_rows
from benchmarks.decode_conditions import Condition
from benchmarks.decode_options import parse_words
from benchmarks.decode_report import Measured
from benchmarks.decode_rows import ABLATIONS, DEFAULT_GROUPS, GROUPS, Entry, Row, entries
from benchmarks.portable import portable
from tests.decode_results import made_run
from vllm_specbranch.compare import Difference
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure_messages import Emulation, EngineSpec, RunResult
from vllm_specbranch.shipped_pair import draft_path, target_path

TWO_CORES = Lineup("t", "d", place([0, 1], 0))
NO_SETTINGS: dict[str, dict[str, Any]] = {}


def words(*given: str) -> Any:
    return parse_words(["--out", "out.json", *given])


# --- rows ------------------------------------------------------------------------------------------------------------


def test_every_engine_has_its_row() -> None:
    groups = ["plain", "async_off", "draft_model", "ngram", "pearl", "specbranch", "wide"]
    made = entries(TWO_CORES, groups, [2, 4], 8, {"specbranch": {"stop_threshold": 0.2}})
    assert [one.name for one in made] == [
        "plain",
        "plain, async off",
        "draft_model 2",
        "draft_model 4",
        "ngram",
        "plain on 2 cores",
        "draft_model 2 on 2 cores",
        "draft_model 4 on 2 cores",
        "pearl",
        "specbranch",
    ]
    by_name = {one.name: one for one in made}
    assert by_name["plain, async off"].spec.arguments["async_scheduling"] is False
    assert by_name["draft_model 4"].spec.cores == (0,) and by_name["draft_model 4"].num_devices == 1
    assert by_name["plain on 2 cores"].spec.cores == (0, 1) and by_name["plain on 2 cores"].num_devices == 2
    assert by_name["pearl"].runs_on == "core 0 + core 1" and by_name["pearl"].num_devices == 2
    assert [one.name for one in made if one.is_ours] == ["pearl", "specbranch"]
    pearl, ours = (by_name[name].spec.speculative for name in ("pearl", "specbranch"))
    assert pearl is not None and ours is not None
    assert pearl["policy"] == "pearl" and "stop_threshold" not in pearl
    assert ours["stop_threshold"] == 0.2


def test_ablations_take_one_thing_away_and_keep_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_rows.SpecBranchConfig, "from_user", lambda settings: None)
    plain, *made = entries(TWO_CORES, ["ablations"], [2], 8, {"specbranch": {"stop_threshold": 0.2, "max_branches": 4}})
    assert plain.name == "plain"
    assert [one.name for one in made] == [f"specbranch, {what}" for what in ABLATIONS]
    settings = [one.spec.speculative or {} for one in made]
    assert all(one["policy"] == "specbranch" and one["stop_threshold"] == 0.2 for one in settings)
    assert [one["max_branches"] for one in settings] == [1, 4, 4]
    assert settings[1]["stop_rule"] == "none" and settings[2]["branch_rule"] == "fixed"


def test_the_default_rows_are_such_as_the_method_takes() -> None:
    made = entries(TWO_CORES, words().rows, words().gammas, 8, NO_SETTINGS)
    assert {one.group for one in made} | {"wide"} == set(DEFAULT_GROUPS)


def test_all_rows_are_such_as_the_method_takes() -> None:
    made = entries(TWO_CORES, words("--rows", "all").rows, [2], 8, NO_SETTINGS)
    assert {one.group for one in made} | {"wide"} == set(GROUPS)
    assert len({one.name for one in made}) == len(made)


def test_one_core_makes_no_wide_rows() -> None:
    made = entries(Lineup("t", "d", place([0], 0)), ["draft_model", "pearl", "wide"], [2], 8, NO_SETTINGS)
    assert [one.name for one in made] == ["plain", "draft_model 2", "pearl"]
    assert made[-1].runs_on == "core 0, shared" and made[-1].num_devices == 1


def test_two_gpus_are_two_devices() -> None:
    made = entries(Lineup("t", "d", place([0, 1], 2)), ["draft_model", "pearl", "wide"], [2], 8, NO_SETTINGS)
    assert [(one.name, one.num_devices) for one in made] == [("plain", 1), ("draft_model 2", 1), ("pearl", 2)]


def test_settings_that_the_method_refuses_are_refused_before_any_engine_starts() -> None:
    with pytest.raises(ConfigError, match="stop_threshold=7"):
        entries(TWO_CORES, ["specbranch"], [2], 8, {"specbranch": {"stop_threshold": 7}})


# --- words -----------------------------------------------------------------------------------------------------------


def test_words_become_values() -> None:
    args = words(
        *("--rows", "wide,pearl", "--batch-sizes", "1,4,16,64", "--prompts", "humaneval,gsm8k"),
        *("--emulate", "none", "--emulate", "20:4:0.1", "--gammas", "8,2", "--draft-noise", "0.35"),
    )
    assert args.rows == ["pearl", "wide"]
    assert args.batch_sizes == [1, 4, 16, 64] and args.gammas == [8, 2]
    assert args.prompts == ["humaneval", "gsm8k"] and args.draft_noise == 0.35
    assert args.emulate == [None, Emulation(20.0, 4.0, draft_token_cost=0.1)]
    assert words("--rows", "all").rows == list(GROUPS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--out", "/none/out.json"], ["--out", "/none/out.json", "folder that exists"]),
        (["--prompts", "/none.txt"], ["--prompts", "/none.txt", "can be read"]),
        (["--prompts", "humanevil"], ["--prompts", "humanevil", "humaneval"]),
        (["--target", "/none"], ["--target", "/none", "config.json"]),
        (["--rows", "pearl,turbo"], ["--rows", "turbo", "best_first"]),
        (["--rows", ""], ["--rows", "best_first"]),
        (["--batch-sizes", "1,0"], ["--batch-sizes", "0", "at least 1"]),
        (["--batch-sizes", "1;4"], ["--batch-sizes", "1;4", "at least 1"]),
        (["--gammas", "two"], ["--gammas", "two", "at least 1"]),
        (["--repetitions", "0"], ["--repetitions", "0", "at least 1"]),
        (["--prompt-tokens", "500"], ["--prompt-tokens", "500", "at most 416"]),
        (["--emulate", "20"], ["--emulate", "20", "TARGET_MS:DRAFT_MS"]),
        (["--draft-noise", "-1"], ["--draft-noise", "-1", "at least 0"]),
        (["--draft-noise", "much"], ["--draft-noise", "much", "at least 0"]),
        (["--target-cores", "77"], ["--target-cores", "77", "cores of"]),
        (["--target-cores", "a"], ["--target-cores", "'a'", "0-2,5"]),
        (["--settings", "{"], ["--settings", "{", "JSON by policy"]),
        (["--settings", '{"stop_threshold": 0.1}'], ["--settings", "JSON by policy"]),
        (["--settings", '{"turbo": {}}'], ["--settings", "turbo", "specbranch"]),
        (["--settings", '{"specbranch": {"stop_threshold": 2}}'], ["stop_threshold", "2", "0..1"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    given: list[str], said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_decode.main(["--out", str(tmp_path / "out.json"), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(one in line for one in said)


@pytest.mark.parametrize("given", [[], ["--out", "o.json", "--turbo"], ["--out"]])
def test_unknown_and_missing_words_are_one_line_too(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench_decode.main(given)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--help" in line


def test_emulation_is_refused_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "gpus", lambda: ["a GPU"])
    with pytest.raises(ConfigError, match="--emulate"):
        bench_decode.make_lineup(words("--emulate", "20:4"))
    assert not bench_decode.make_lineup(words("--target-layers", "0", "--target-mlp", "0")).observe


# --- memory ----------------------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Memory:
        available = 1 << 30

    monkeypatch.setattr(bench_decode.psutil, "virtual_memory", Memory)
    few = [Entry(EngineSpec("a", str(tmp_path), kv_cache_bytes=1 << 20), "plain", "core 0", 1)]
    bench_decode._check_memory(few)
    with pytest.raises(ConfigError, match="fewer engines: 3 GiB needed, 1 GiB free"):
        bench_decode._check_memory(few * 4)


def test_kv_cache_grows_with_the_batch_and_holds_both_models() -> None:
    target, both = [target_path()], [target_path(), draft_path()]
    assert bench_decode.kv_cache_bytes(target, 1) == bench_decode.LEAST_KV_CACHE_BYTES
    # 6 layers of 4 KV heads of 32 in the target, 2 layers of 2 heads of 32 in the draft, keys and values in 32 bits
    per_token = 8 * (6 * 4 * 32 + 2 * 2 * 32)
    assert bench_decode.kv_cache_bytes(both, 100_000) == per_token * 125_000


# --- runs ------------------------------------------------------------------------------------------------------------


class FakeEngine:
    """Notes what it is asked for, in a list shared with others."""

    def __init__(self, name: str, log: list[tuple[Any, ...]]) -> None:
        self.spec = EngineSpec(name, "m")
        self.facts = {"load_s": 1.0}
        self.log = log

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1000 + index, *range(49 + 10 * index)] for index, _ in enumerate(texts)]

    def run(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, batch_size: int, emulation: Emulation | None = None
    ) -> RunResult:
        self.log.append((self.spec.name, len(prompts), max_tokens, batch_size, emulation))
        return made_run(1.0, batch_size)


def prepared(*given: str, names: Sequence[str] = ("plain", "pearl")) -> tuple[list[Measured], list[tuple[Any, ...]]]:
    """Run everything with fake engines; returns (what was measured, what was asked for)."""
    args = words("--num-prompts", "3", "--repetitions", "2", "--max-tokens", "64", *given)
    log: list[tuple[Any, ...]] = []
    engines: Any = [FakeEngine(name, log) for name in names]
    chosen = [Entry(one.spec, one.spec.name, "core 0", 1, "2 cores" in one.spec.name) for one in engines]
    sets = bench_decode.read_prompt_sets(args.prompts, max(args.num_prompts, *args.batch_sizes))
    wanted = bench_decode.conditions(sets, args.batch_sizes, args.emulate or [None])
    measured = bench_decode.prepare(args, sets, wanted, engines[0])
    bench_decode.run_all(args, measured, chosen, engines, lambda text: None)
    return measured, log


def test_one_condition_is_warmed_up_once_and_then_repeated() -> None:
    measured, log = prepared()
    assert [one[2] for one in log] == [bench_decode.WARM_UP_TOKENS] * 2 + [64] * 4
    assert {one[:2] for one in log[2:4]} == {("plain", 3), ("pearl", 3)} == {one[:2] for one in log[4:]}
    (one,) = measured
    assert [len(row.runs) for row in one.rows] == [2, 2] and one.rows[0].entry.facts == {"load_s": 1.0}


def test_batches_get_enough_prompts_and_every_condition_its_own_runs() -> None:
    measured, log = prepared("--batch-sizes", "1,8", "--emulate", "none", "--emulate", "20:4")
    assert [(one.condition.batch_size, len(one.token_ids), len(one.names)) for one in measured] == [
        (1, 3, 3),
        (8, 8, 8),
        (1, 3, 3),
        (8, 8, 8),
    ]
    runs = [one for one in log if one[2] == 64]
    assert len(runs) == 2 * 4 * 2 == len([one for one in log if one[2] == bench_decode.SETTLING_TOKENS])
    # Before each measured run the same engine settles under the same condition.
    for before, run in zip(log[8::2], log[9::2], strict=True):
        assert (before[0], before[3:]) == (run[0], run[3:]) and before[2] < run[2]
    # Rows that are compared follow each other.
    assert all({left[0], right[0]} == {"plain", "pearl"} for left, right in zip(runs[::2], runs[1::2], strict=True))
    assert all(left[3:] == right[3:] for left, right in zip(runs[::2], runs[1::2], strict=True))


def test_twice_the_cores_are_not_emulated() -> None:
    (real, emulated), log = prepared("--emulate", "none", "--emulate", "20:4", names=("plain", "plain on 2 cores"))
    assert [row.name for row in real.rows] == ["plain", "plain on 2 cores"]
    assert [row.name for row in emulated.rows] == ["plain"]
    assert all(one[-1] is None for one in log if one[0] == "plain on 2 cores")


def test_a_small_file_is_used_again_with_other_ends(tmp_path: Path) -> None:
    path = tmp_path / "few.txt"
    path.write_text("one\ntwo\n")
    (small, large), _ = prepared("--prompts", str(path), "--batch-sizes", "1,5")
    assert small.names == ["line 1", "line 2"]
    assert large.names == ["line 1", "line 2", "line 1, again", "line 2, again", "line 1, again"]
    assert len({tuple(one) for one in large.token_ids}) == 5


def test_prompts_are_cut() -> None:
    (one,), _ = prepared("--prompt-tokens", "20")
    assert {len(ids) for ids in one.token_ids} == {20}


def test_differences_are_found_once_over_all_repetitions() -> None:
    rows = []
    for name in ("plain", "other"):
        rows.append(Row(Entry(EngineSpec(name, "m"), name, "core 0", 1), 1, [made_run(1.0), made_run(1.0)]))
    for run in rows[1].runs:
        run.requests[0].token_ids[2] = 9
    one = Measured(Condition("demo", 1), ["a"], [[7]], rows)
    bench_decode.compare(one, lambda prefixes: [0.5] * len(prefixes))
    assert rows[0].differences == []
    assert rows[1].differences == [Difference("other", 0, 2, 2, 9, 0.5)]


def test_results_carry_no_places_of_this_machine() -> None:
    options = vars(words("--emulate", "20:4", "--emulate", "none", "--draft", "/somewhere/else/draft"))
    written = json.loads(json.dumps(portable({"options": options, "argv": [__file__, "/tmp/a/b.json", "1"]})))
    assert written["options"]["batch_sizes"] == [1] and written["options"]["emulate"][1] is None
    assert written["options"]["emulate"][0]["target_forward_ms"] == 20.0
    assert written["options"]["target"] == "vllm_specbranch/models/target" and written["options"]["draft"] == "draft"
    assert written["argv"] == ["tests/unit/test_bench_decode.py", "b.json", "1"]
