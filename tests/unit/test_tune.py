"""The command `tune` on made-up measurements: the file, what it says, and mistakes in its words. No engine is started.

What is made of measurements: test_tune_measure; the search and the verdict: test_tune_search.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.made_recordings import BLOCK_SIZE, NUM_BLOCKS, fake, recordings_of
from vllm_specbranch import cli, tune
from vllm_specbranch.config import SpecBranchConfig, load_bare_word_settings
from vllm_specbranch.replay import Times
from vllm_specbranch.replay_study import Study
from vllm_specbranch.tune_check import Ratios, sequential_name
from vllm_specbranch.tune_measure import Measured
from vllm_specbranch.tune_report import AS_IT_COMES
from vllm_specbranch.tune_search import STARTS, Settings

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
