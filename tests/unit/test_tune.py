"""Tuning: what is made of measurements, the search, the verdict, the file, and the words. No engine is started."""

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_replay import BLOCK_SIZE, NUM_BLOCKS, fake, recordings_of
from vllm_specbranch import cli, tune, tune_check
from vllm_specbranch.config import SpecBranchConfig, load_bare_word_settings
from vllm_specbranch.lineup import Lineup, Placement
from vllm_specbranch.measure import MeasureError
from vllm_specbranch.measure_messages import EngineSpec, Forward, RequestTrace, RunResult
from vllm_specbranch.replay import Times
from vllm_specbranch.replay_study import Study
from vllm_specbranch.tune_check import Ratios, sequential_name
from vllm_specbranch.tune_measure import Measured, fit, measure, medians_ms
from vllm_specbranch.tune_report import AS_IT_COMES
from vllm_specbranch.tune_search import KEYS, STARTS, VALUES, Found, Search, Settings, Speeds, judge

# --- measurements ----------------------------------------------------------------------------------------------------


def test_a_line_through_forward_times() -> None:
    line = fit({1: 10.0, 3: 12.0, 5: 14.0})
    assert (line.base_ms, line.token_cost) == (pytest.approx(10.0), pytest.approx(0.1))
    assert fit({1: 7.0}).token_cost == 0.0
    assert fit({9: 7.0}).base_ms == 7.0


@given(st.dictionaries(st.integers(1, 64), st.floats(0.01, 1e3), min_size=1, max_size=10))
def test_a_line_never_falls_and_starts_above_nothing(times_ms: dict[int, float]) -> None:
    line = fit(times_ms)
    assert line.base_ms > 0.0 and line.token_cost >= 0.0


def forwards(gap_ms: float, duration_ms: float, sizes: Sequence[int]) -> list[Forward]:
    step_s = (gap_ms + duration_ms) / 1e3
    return [Forward(index * step_s, index * step_s + duration_ms / 1e3, size) for index, size in enumerate(sizes)]


def result(gap_ms: float, **keys: Any) -> RunResult:
    """A run with an output every `gap_ms`."""
    times = [gap_ms * (index + 1) / 1e3 for index in range(10)]
    return RunResult(times[-1], 10, [RequestTrace(0.0, times, [1] * 10, list(range(10)), "")], **keys)


def test_rare_sizes_and_prefills_say_nothing() -> None:
    assert medians_ms(forwards(1.0, 5.0, [1, 1, 1, 4, 4, 10, 10, 10]), 9) == {1: pytest.approx(5.0)}


def test_sizes_that_are_alike_count_as_one() -> None:
    found = medians_ms(
        [*forwards(1.0, 5.0, [57, 60, 64]), *forwards(1.0, 6.0, [65, 66, 67]), *forwards(1.0, 9.0, [80])], 576, 8
    )
    assert found == {60: pytest.approx(5.0), 66: pytest.approx(6.0)}


@pytest.mark.parametrize("batch_size", [16, 64])
def test_what_further_tokens_cost_is_seen_in_large_batches_too(batch_size: int) -> None:
    """Forwards with drafts have several times the batch in tokens, and hardly two of them as many: 2% of a forward each."""
    randoms = random.Random(0)
    sizes = [batch_size + randoms.randrange(batch_size * 8) for _ in range(60)]
    times = Times(50.0, 2.0, 0.02)
    drafted = [Forward(index, index + times.forward_ms(size) / 1e3, size) for index, size in enumerate(sizes)]
    plain_ms = times.forward_ms(batch_size)
    plain = result(plain_ms, target_forwards=forwards(0.0, plain_ms, [batch_size] * 10))
    ours = result(plain_ms, target_forwards=drafted, draft_forwards=forwards(0.0, 2.0, [batch_size] * 5))
    measured = measure(plain, ours, batch_size, 8)
    assert measured.is_observed and len(measured.target_ms) > 5
    assert measured.ours.target_token_cost == pytest.approx(0.02, rel=0.1)
    assert measured.plain.forward_ms(batch_size) == pytest.approx(plain_ms)
    assert measured.ours.forward_ms(4 * batch_size) == pytest.approx(times.forward_ms(4 * batch_size), rel=0.05)


def test_contention_is_no_price_of_further_tokens() -> None:
    """Beside a draft server every forward takes half as long again; tokens are free."""
    plain = result(12.0, target_forwards=forwards(2.0, 10.0, [1] * 10))
    ours = result(
        19.0,
        target_forwards=forwards(4.0, 15.0, [1, 3, 5, 9] * 5),
        draft_forwards=forwards(0.0, 2.0, [1] * 5),
    )
    measured = measure(plain, ours, 1, 8)
    assert measured.ours.target_token_cost == measured.plain.target_token_cost == pytest.approx(0.0)
    assert measured.ours.target_forward_ms == pytest.approx(15.0)
    assert measured.plain.target_forward_ms == pytest.approx(10.0)
    assert measured.plain.overhead_ms == pytest.approx(2.0) and measured.ours.overhead_ms == pytest.approx(4.0)


def test_times_of_an_observed_pair() -> None:
    plain = result(12.0, target_forwards=forwards(2.0, 10.0, [1] * 10))
    counters = {"wait_s": 10 * 0.5e-3, "propose_s": 0.0}
    ours = result(
        14.0,
        target_forwards=forwards(4.0, 10.0, [1] * 10),
        draft_forwards=forwards(0.0, 2.0, [1] * 5) + forwards(0.0, 3.0, [6] * 5),
        engine_counters=counters,
    )
    measured = measure(plain, ours, 1, 8)
    assert measured.is_observed
    assert measured.plain.overhead_ms == pytest.approx(2.0)
    assert measured.ours.overhead_ms == pytest.approx(3.5)
    assert measured.ours.target_forward_ms == pytest.approx(10.0)
    assert (measured.ours.draft_step_ms, measured.ours.draft_token_cost) == (pytest.approx(2.0), pytest.approx(0.1))
    assert measured.ours.c == pytest.approx(6.75)


def test_times_of_a_pair_that_cannot_be_observed() -> None:
    timings = {"step_1_rows": 1000.0, "step_3_rows": 1400.0, "peer_0_token": 5.0}
    measured = measure(result(12.0), result(9.0, server_timings_us=timings, engine_counters={"propose_s": 0.01}), 1, 8)
    assert not measured.is_observed
    assert measured.plain.round_ms(1) == pytest.approx(12.0)
    assert measured.ours.round_ms(9) == pytest.approx(13.0)
    assert (measured.ours.draft_step_ms, measured.ours.draft_token_cost) == (pytest.approx(1.0), pytest.approx(0.2))


# --- search ----------------------------------------------------------------------------------------------------------


def hill(settings: Settings) -> float:
    """Best: specbranch, 12 tokens, threshold 0.2, 16 branches, and two tokens waited for after a miss."""
    speed = {"specbranch": 2.0, "best_first": 1.9, "fanout": 1.5, "pearl": 1.2}[str(settings["policy"])]
    bests = {"num_speculative_tokens": 12, "stop_threshold": 0.2, "max_branches": 16, "on_miss": "wait:2"}
    for key, best in bests.items():
        if key in settings:
            distance = abs(VALUES[key].index(settings[key]) - VALUES[key].index(best))
            speed -= 0.05 * distance
    return speed


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_the_top(seed: int) -> None:
    tried: list[Settings] = []
    found = Search(hill, seed, lambda settings, _speed, _best: tried.append(settings)).run()
    assert found.settings == {
        "policy": "specbranch",
        "num_speculative_tokens": 12,
        "stop_threshold": 0.2,
        "max_branches": 16,
        "on_miss": "wait:2",
    }
    assert found.speed == 2.0
    assert found.num_tried == len(tried) == len({json.dumps(one, sort_keys=True) for one in tried}) < 40


def test_the_search_repeats_itself() -> None:
    def found(seed: int) -> tuple[Found, list[Settings]]:
        tried: list[Settings] = []
        return Search(hill, seed, lambda settings, *_: tried.append(settings)).run(), tried

    assert found(3) == found(3)


def test_small_gains_are_chance() -> None:
    def flat(settings: Settings) -> float:
        return 1.0 + 1e-4 * float(str(settings["num_speculative_tokens"]))

    assert Search(flat).run([STARTS[3]]).settings == STARTS[3]


def test_what_is_searched_are_settings() -> None:
    for start in STARTS:
        assert {*KEYS[str(start["policy"])], "policy"} == set(start)
        SpecBranchConfig.from_user({"model": "draft", **start})
        for key in KEYS[str(start["policy"])]:
            for value in VALUES[key]:
                SpecBranchConfig.from_user({"model": "draft", **start, key: value})


PLACES = {"runs_on": "core 0 + core 1", "alone_on": "core 0"}


@pytest.mark.parametrize(
    ("ours", "sequential", "c", "alpha", "method", "said"),
    [
        (1.02, 1.04, 10.0, 0.1, "plain", "only 10% of the draft's first choices"),
        (1.0, 0.5, 0.8, 0.9, "plain", "only 0.8 draft steps"),
        (1.0, 0.5, 8.0, 0.9, "plain", "overhead"),
        # Better than plain, but not by what a second device is asked for over draft_model, which is not worth a model itself.
        (1.07, 1.04, 8.0, 0.9, "plain", "specbranch 1.07 times plain decoding, draft_model 1.04 times"),
        (1.3, 1.5, 8.0, 0.9, "draft_model", "draft_model with 4 draft tokens is better"),
        (1.301, 1.3, 8.0, 0.9, "draft_model", "it runs on core 0 + core 1, draft_model on core 0"),
        (1.36, 1.3, 8.0, 0.9, "draft_model", "1.05 times as much"),
        (1.37, 1.3, 8.0, 0.9, "specbranch", "draft_model with 4 draft tokens 1.30 times"),
        (1.5, 1.3, 8.0, 0.9, "specbranch", "1.50 times"),
        (1.5, 0.7, 8.0, 0.9, "specbranch", "runs on core 0 + core 1, the other two on core 0"),
    ],
)
def test_the_verdict(ours: float, sequential: float, c: float, alpha: float, method: str, said: str) -> None:
    verdict = judge(Speeds(ours, sequential, 4), acceptance=alpha, c=c, **PLACES)
    assert verdict.method == method and said in verdict.reason


def test_the_verdict_says_what_it_stands_on() -> None:
    good = {"acceptance": 0.9, "c": 8.0, **PLACES}
    assert "should decode 1.50 times" in judge(Speeds(1.5, 1.2, 2), **good).reason
    measured = judge(Speeds(1.5, 1.2, 2, least=1.3), **good).reason
    assert "decoded 1.50 times" in measured and "median of these runs" in measured and "But" not in measured
    assert "But once it was 0.90 times" in judge(Speeds(1.5, 1.2, 2, least=0.9), **good).reason
    for ours, method in ((1.5, "specbranch"), (1.01, "plain")):
        verdict = judge(Speeds(ours, None, None, least=1.0), **good)
        assert verdict.method == method and "draft_model could not be run" in verdict.reason


# --- all of it, on made-up measurements ------------------------------------------------------------------------------


def made_up(times: Times) -> Measured:
    target_ms = {count: times.forward_ms(count) for count in (1, 5, 9)}
    return Measured(times, times, {1: times.target_forward_ms}, target_ms, {1: times.draft_step_ms}, True)


def study_of(agrees: list[list[bool]]) -> Study:
    model, _ = fake()
    return Study(model, NUM_BLOCKS, BLOCK_SIZE, recordings_of(agrees))


GOOD = [[True, True, True, False] * 6, [True] * 24]
BAD = [[False] * 24, [False] * 24]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    folders = tmp_path / "target", tmp_path / "target" / "draft"
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text('{"vocab_size": 50}')
    return folders


def no_engines(*_: Any) -> Ratios:
    return {}


def engines_say(sequential: float | None, as_it_comes: float | None, found: float | None) -> Callable[..., Ratios]:
    """A check with these medians; None for what fails."""

    def check(_: Any, __: Any, gammas: Sequence[int], candidates: dict[str, Settings], *___: Any) -> Ratios:
        assert len(gammas) == 2 and next(iter(candidates)) == AS_IT_COMES
        slower = None if sequential is None else sequential - 0.1
        names = [sequential_name(gammas[0]), sequential_name(gammas[1]), *candidates]
        speeds = zip(names, (slower, sequential, as_it_comes, found), strict=True)
        return {name: [speed - 0.1, speed, speed + 0.2] for name, speed in speeds if speed is not None}

    return check


def tuned(
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    agrees: list[list[bool]],
    times: Times,
    *more: str,
    check: Callable[..., Ratios] = no_engines,
) -> tuple[int, str]:
    """Run the command on made-up measurements; returns its code and what it wrote."""
    monkeypatch.setattr(tune, "_measure", lambda *_: (made_up(times), recordings_of(agrees)))
    monkeypatch.setattr(tune, "check", check)
    monkeypatch.setattr(tune.Study, "load", lambda *_, **__: study_of(agrees))
    said: list[str] = []
    monkeypatch.setattr(cli, "_write", said.append)
    code = cli.main(["tune", "--target", str(pair[0]), "--draft", str(pair[1]), *more])
    return code, "".join(said)


def test_a_good_pair_gets_its_file(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0))
    assert code == 0, text
    settings = load_bare_word_settings(str(pair[0]))
    assert settings["model"] == str(pair[1])
    assert json.loads((pair[0] / "specbranch.json").read_text())["model"] == "draft"
    SpecBranchConfig.from_user(settings)
    assert "c = 10.0" in text and "best so far" in text and "plain vLLM" in text and "draft_model" in text
    assert f"vllm serve {pair[0]} --speculative-config specbranch" in text
    assert "every outcome guessed" in text


def test_elsewhere_the_draft_is_named_in_full(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "other"
    out.mkdir()
    file = out / "mine.json"
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), "--out", str(file))
    assert code == 0 and json.loads(file.read_text())["model"] == str(pair[1])
    monkeypatch.setenv("VLLM_SPECBRANCH_CONFIG", str(file))
    assert load_bare_word_settings("nowhere")["model"] == str(pair[1])
    assert f"VLLM_SPECBRANCH_CONFIG={file} vllm serve" in text


@pytest.mark.parametrize(
    ("agrees", "times", "why"),
    [
        (BAD, Times(10.0, 1.0), "first choices are the target's"),
        (GOOD, Times(0.5, 1.0), "only 0.5 draft steps"),
    ],
)
def test_a_pair_that_does_not_pay_gets_none(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, agrees: list[list[bool]], times: Times, why: str
) -> None:
    code, text = tuned(pair, monkeypatch, agrees, times)
    assert code == 0
    assert "not worth it" in text and why in text and "Nothing was written" in text
    assert not (pair[0] / "specbranch.json").exists()
    code, text = tuned(pair, monkeypatch, agrees, times, "--always-write")
    assert code == 0 and (pair[0] / "specbranch.json").exists()


def test_draft_model_is_recommended_where_it_is_better(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large overhead of ours alone."""
    slow = Measured(Times(10.0, 1.0), Times(10.0, 1.0, overhead_ms=30.0), {1: 10.0}, {1: 10.0}, {1: 1.0}, True)
    monkeypatch.setattr("tests.unit.test_tune.made_up", lambda _: slow)
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0))
    assert code == 0
    assert "draft_model with" in text and '"method": "draft_model"' in text and "Nothing was written" in text


def test_engines_have_the_last_word_on_which_settings(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the search found is expected to be quicker than the defaults, and was not."""
    told = tmp_path / "told.json"
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), "--json", str(told), check=engines_say(1.1, 1.5, 1.4))
    assert code == 0 and "specbranch decoded 1.50 times" in text and "1.50x (1.40 to 1.70)" in text
    written = json.loads((pair[0] / "specbranch.json").read_text())
    assert written == {"model": "draft", **STARTS[0]}
    kept = json.loads(told.read_text())
    gamma = kept["draft_model_tokens"]
    assert kept["settings"] == STARTS[0]
    assert kept["on_engines"][sequential_name(gamma)] == pytest.approx([1.0, 1.1, 1.3])
    assert f"draft_model with {gamma} draft tokens 1.10 times" in text
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), check=engines_say(1.1, 1.5, 1.6))
    assert json.loads((pair[0] / "specbranch.json").read_text()) != written and "decoded 1.60 times" in text


def test_engines_have_the_last_word_on_whether_it_pays(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), check=engines_say(0.9, 1.02, 1.04))
    assert code == 0 and "not worth it" in text and "specbranch 1.04 times" in text
    file = pair[0] / "specbranch.json"
    assert not file.exists() and "from before" not in text
    file.write_text("{}")
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), check=engines_say(1.3, 1.02, 1.04))
    assert "draft_model with" in text and "1.30 times plain decoding" in text
    assert file.read_text() == "{}" and f"{file} is from before and stays" in text


def test_what_fails_on_engines_is_left_out(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), check=engines_say(None, 1.2, None))
    assert code == 0 and "decoded 1.20 times" in text and "draft_model could not be run" in text
    assert json.loads((pair[0] / "specbranch.json").read_text()) == {"model": "draft", **STARTS[0]}
    # What engines say of one is never held against what replays expect of the other.
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), check=engines_say(5.0, None, None))
    assert "Nothing could be checked on engines" in text and "should decode" in text and "5.00" not in text


def test_a_batch_that_is_never_full_is_told(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--batch-size", "16", "--num-prompts", "2")
    assert "2 prompts never fill a batch of 16" in tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), *words)[1]
    assert "never fill" not in tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0))[1]


class Stand:
    """In the place of an engine: decodes at a given pace, and writes down when it was asked."""

    def __init__(self, spec: EngineSpec, asked: list[str]) -> None:
        self.spec, self._asked = spec, asked

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1]] * len(texts)

    def run(self, prompts: Sequence[Sequence[int]], *_: int) -> RunResult:
        self._asked.append(f"{self.spec.name} {len(prompts)}")
        speculative = self.spec.speculative or {}
        gap_ms = {None: 20.0, "draft_model": 16.0, "specbranch": 10.0}[speculative.get("method")]
        is_alone = speculative.get("policy") == "fanout"
        counted = {"num_rounds": 0.0 if is_alone else 9.0} if speculative.get("policy") else {}
        found = result(gap_ms, server_counters=counted)
        if speculative.get("policy") == "pearl":
            found.requests[0].token_ids[3] = -1
        return found


def test_each_alternative_is_run_beside_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    specs: list[EngineSpec] = []
    said: list[str] = []

    @contextmanager
    def running(given: Sequence[EngineSpec]) -> Iterator[list[Stand]]:
        if given[1].name == sequential_name(4):
            raise MeasureError("no memory")
        specs.extend(given)
        yield [Stand(spec, asked) for spec in given]

    monkeypatch.setattr(tune_check, "running", running)
    lineup = Lineup("target", "draft", Placement((0,), (1,)), observe=True)
    candidates = {AS_IT_COMES: STARTS[0], "other": STARTS[3], "alone": STARTS[2]}
    ratios = tune_check.check(lineup, ["a", "b", "c"], (3, 4), candidates, 9, 2, said.append)
    times = tune_check.NUM_REPETITIONS
    assert {name: list(map(pytest.approx, one)) for name, one in ratios.items()} == {
        sequential_name(3): [1.25] * times,
        AS_IT_COMES: [2.0] * times,
        "other": [2.0] * times,
    }
    own = sequential_name(3)
    in_turn = (["plain 3", f"{own} 3", f"{own} 3", "plain 3"] * times)[: 2 * times]
    assert asked[: 2 + 2 * times] == ["plain 2", f"{own} 2", *in_turn]
    assert not any(spec.observe for spec in specs)
    lines = "".join(said).splitlines()
    assert any("no memory" in line for line in lines) and any("without drafts" in line for line in lines)
    assert any(AS_IT_COMES in line and "identical" in line for line in lines)
    assert any("other" in line and f"{times} of {times} answers differ" in line for line in lines)


def test_what_was_measured_in_words() -> None:
    text = tune.describe(made_up(Times(10.0, 2.0, 0.05, 0.1, overhead_ms=1.0)), study_of([[True, False] * 8]))
    assert "10.00 ms" in text and "adds 5.0%" in text and "adds 10.0%" in text and "c = 5.5" in text
    assert "1: 50%, 2: 100%" in text
    unseen = dataclasses.replace(made_up(Times(10.0, 2.0)), target_ms={9: 10.0})
    assert "further tokens not seen" in tune.describe(unseen, study_of([[True, False] * 8]))


def test_what_was_measured_and_tried_is_kept(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "told.json"
    code, text = tuned(pair, monkeypatch, GOOD, Times(10.0, 1.0), "--json", str(file))
    assert code == 0
    told = json.loads(file.read_text())
    assert told["measured"]["c"] == 10.0 and told["measured"]["draft_ms"] == {"1": 1.0}
    assert told["coverage"]["8"] == 1.0 and len(told["acceptance_by_position"]) == 6
    assert told["verdict"]["method"] == "specbranch" and told["verdict"]["reason"] in text
    best = max(told["tried"], key=lambda one: one["speed_up"])
    # A value is not changed for a gain that is chance.
    assert told["settings"] in [one["settings"] for one in told["tried"]] and told["on_engines"] == {}
    assert {one["settings"].get("on_miss") for one in told["tried"]} >= {"go", "auto", "wait:2"}
    assert told["expected"][0]["speed_up"] == 1.0 and best["speed_up"] <= told["expected"][-1]["speed_up"] + 1e-9
    assert {"git_sha", "versions", "machine", "argv"} <= told.keys()
    written = json.loads((pair[0] / "specbranch.json").read_text())
    assert {"model": "draft", **told["settings"]} == written


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--target nowhere", "--target='nowhere'"),
        ("--draft nowhere", "--draft='nowhere'"),
        ("--prompts nowhere.txt", "--prompts='nowhere.txt'"),
        ("--out /nowhere/out.json", "--out='/nowhere/out.json'"),
        ("--json /nowhere/out.json", "--json='/nowhere/out.json'"),
        ("--target-cores x", "--target-cores='x'"),
        ("--draft-cores 4096", "--draft-cores='4096'"),
        ("--max-model-len 100", "--max-model-len=100"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: str, said: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given_words = ["tune", "--target", str(pair[0]), "--draft", str(pair[1]), *words.split()]
    assert cli.main(given_words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("vllm-specbranch: ") and said in line


def test_vocabularies_are_compared_before_anything_starts(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (pair[1] / "config.json").write_text('{"text_config": {"vocab_size": 51}}')
    assert cli.main(["tune", "--target", str(pair[0]), "--draft", str(pair[1])]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "with 51 tokens" in line and "50 tokens" in line


@pytest.mark.parametrize(
    "words", ["", "--target a", "--target a --draft b --num-prompts 0", "--target a --draft b --dtype int3"]
)
def test_words_that_do_not_exist_exit_with_2(words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["tune", *words.split()])
    assert caught.value.code == 2


def test_the_first_start_of_the_search_is_what_a_user_gets_who_says_nothing() -> None:
    default, first = SpecBranchConfig.from_user({"model": "m"}), SpecBranchConfig.from_user({"model": "m"} | STARTS[0])
    assert first == default


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_model_folder_is_refused_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert (
        cli.main(["tune", "--target", str(tmp_path), "--draft", str(tmp_path), "--out", str(tmp_path / "o.json")]) == 2
    )
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "config.json" in line
