"""The demo's parts: prompts, places, comparison, and how it is told."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch import demo
from vllm_specbranch.compare import Difference, as_json, first_differences, transformers_gaps, verdict, with_gaps
from vllm_specbranch.demo import DemoSettings, Progress, _Results
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.lineup import Lineup, Placement, place, require_model
from vllm_specbranch.measure_messages import RequestTrace, RunResult
from vllm_specbranch.prompts import Prompt, default_prompts_path, read_prompts
from vllm_specbranch.shipped_pair import draft_path

# --- prompts ---------------------------------------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_three_forms_of_prompt_files(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '{"id": "x/1", "prompt": "one"}\n\n{"prompt": "two"}\n"three"\n')
    assert read_prompts(lines) == [Prompt("x/1", "one"), Prompt("line 3", "two"), Prompt("line 4", "three")]
    items = write(tmp_path / "a.json", json.dumps(["one", {"id": 7, "prompt": "two"}]))
    assert read_prompts(items) == [Prompt("item 1", "one"), Prompt("7", "two")]
    plain = write(tmp_path / "a.txt", "one\n\n  \ntwo\n")
    assert read_prompts(plain) == [Prompt("line 1", "one"), Prompt("line 4", "two")]
    assert read_prompts(plain, 1) == [Prompt("line 1", "one")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "one", "of the form"),
        ("a.json", "[", "valid JSON"),
        ("a.json", '{"prompt": "one"}', "a JSON list"),
        ("a.json", "[]", "at least one prompt"),
        ("a.json", '[{"text": "one"}]', "item 1 has none"),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": 2}\n', "line 2 has none"),
        ("a.jsonl", "{", "line 1 is not"),
        ("a.txt", "\n \n", "at least one prompt"),
    ],
)
def test_bad_prompt_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_prompts(write(tmp_path / name, text))
    assert caught.value.field == "--prompts" and "\n" not in str(caught.value)


def test_unreadable_prompt_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can be read"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="can be read"):
        read_prompts(tmp_path / "binary.txt")


def test_default_prompts_are_shipped() -> None:
    prompts = read_prompts(default_prompts_path())
    assert len(prompts) == 16 and all(prompt.name.startswith("HumanEval/") for prompt in prompts)


# --- places ----------------------------------------------------------------------------------------------------------


def test_target_and_draft_get_a_core_each() -> None:
    two = place([4, 5, 6], 0)
    assert (two.target_cores, two.draft_cores, two.is_shared) == ((4,), (5,), False)
    assert (two.describe(False), two.describe(True)) == ("core 4", "core 4 + core 5")
    one = place([4], 0)
    assert one.is_shared and one.describe(True) == "core 4, shared"


def test_users_cores_are_taken_or_refused() -> None:
    chosen = place([0, 1, 2, 3], 0, (0, 1), (3,))
    assert chosen.describe(True) == "cores 0,1 + core 3"
    assert place([0, 1, 2], 0, (0, 1)).draft_cores == (2,)
    with pytest.raises(ConfigError, match="--draft-cores='9'"):
        place([0, 1], 0, None, (9,))


def test_gpus_are_named_and_shared_when_there_is_one() -> None:
    assert place([0, 1], 2).describe(True) == "GPU 0 + GPU 1"
    assert place([0, 1], 1).describe(True) == "GPU 0, shared"


def test_lineup_makes_engines_that_differ_in_the_method_only() -> None:
    lineup = Lineup("t", "d", place([0, 1], 0))
    plain, sequential, ours = lineup.plain(), lineup.draft_model(4), lineup.specbranch(8, policy="pearl")
    assert plain.speculative is None
    assert sequential.speculative == {"method": "draft_model", "model": "d", "num_speculative_tokens": 4}
    assert ours.speculative is not None
    assert ours.speculative["draft_cpu_cores"] == [1] and ours.speculative["policy"] == "pearl"
    assert plain.cores == sequential.cores == ours.cores == (0,)
    assert lineup.plain("wide", (0, 1)).cores == (0, 1)


def test_gpu_engines_share_memory() -> None:
    spec = Lineup("t", "d", Placement(target_device=0, draft_device=1)).specbranch(8)
    assert spec.visible_devices == "0" and spec.cores == ()
    assert spec.speculative is not None and spec.speculative["draft_device"] == 1
    assert spec.gpu_memory_utilization is not None and 4 * spec.gpu_memory_utilization < 0.9


def test_model_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        require_model(tmp_path, "--target")
    assert require_model(draft_path(), "--target") == draft_path()


# --- comparison ------------------------------------------------------------------------------------------------------


def test_first_difference_of_each_prompt() -> None:
    expected = [[1, 2, 3], [1, 2], [5]]
    got = [[1, 9, 3], [1, 2], [5, 6]]
    found = first_differences("ours", expected, got)
    assert found == [Difference("ours", 0, 1, 2, 9), Difference("ours", 2, 1, None, 6)]
    with pytest.raises(ValueError, match="shorter"):
        first_differences("ours", expected, got[:1])


@given(st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=5))
def test_equal_outputs_have_no_difference(outputs: list[list[int]]) -> None:
    assert first_differences("ours", outputs, [list(one) for one in outputs]) == []


def test_gap_is_taken_on_the_common_prefix() -> None:
    prefixes: list[list[int]] = []

    def gap_of(asked: Any) -> list[float]:
        prefixes.extend(asked)
        return [1e-7] * len(asked)

    found = with_gaps([Difference("ours", 1, 2, 3, 4)], [[9], [8, 7]], [[0], [1, 2, 3]], gap_of)
    assert prefixes == [[8, 7, 1, 2]]
    assert found[0].gap == 1e-7 and found[0].is_tie
    assert with_gaps([], [], [], gap_of) == []


def test_verdict_says_where_and_by_how_much() -> None:
    names = ["a", "b"]
    assert verdict([], names, 128).startswith("token ids: IDENTICAL to plain vLLM (128 tokens of 2 prompts")
    tie = Difference("ours", 1, 7, 3, 4, 2e-7)
    assert "equal but for ties: ours, prompt b, position 7, logit gap 2.0e-07" in verdict([tie], names, 128)
    real = Difference("ours", 0, 3, 3, 4, 0.5)
    text = verdict([tie, real], names, 128)
    assert "DIFFERENT from plain vLLM" in text and "position 3, logit gap 5.0e-01" in text and "\n" not in text
    assert as_json([real])[0]["gap"] == 0.5


def test_gap_of_the_shipped_draft() -> None:
    (gap,) = transformers_gaps(str(draft_path()))([[10, 20, 30]])
    assert gap > 0


# --- telling ---------------------------------------------------------------------------------------------------------


def engines(*stages: str) -> Any:
    return [
        SimpleNamespace(spec=SimpleNamespace(name=f"e{i}"), stage=s, is_ready=s == "ready")
        for i, s in enumerate(stages)
    ]


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = Progress(lines.append, None, lambda: now[0])
    for now[0], stages in ((0.0, ("loading", "loading")), (4.0, ("ready", "loading")), (11.0, ("ready", "loading"))):
        progress(engines(*stages))
    now[0] = 12.0
    progress(engines("ready", "ready"))
    assert lines == [
        "  [   0 s] e0: loading, e1: loading\n",
        "  [  11 s] e0: ready, e1: loading\n",
        "  [  12 s] e0: ready, e1: ready\n",
    ]


def test_progress_on_a_terminal_rewrites_one_line() -> None:
    parts: list[str] = []
    progress = Progress(parts.append, 20, lambda: 0.0)
    progress(engines("loading"))
    progress(engines("ready"))
    assert all(part.startswith("\r") and len(part.strip("\r\n")) == 19 for part in parts)
    assert [part.endswith("\n") for part in parts] == [False, True]


def result(token_ids: list[int], wall_s: float, ours: bool = False) -> RunResult:
    times = [wall_s * (index + 1) / len(token_ids) for index in range(len(token_ids))]
    request = RequestTrace(0.0, times, [1] * len(token_ids), token_ids, "def f():\n    pass")
    counters = {"wait_s": 0.1, "propose_s": 0.1} if ours else {}
    return RunResult(wall_s, len(token_ids), [request], counters)


def results(ours_s: float) -> _Results:
    runs = {
        "plain": [result([1, 2, 3, 4], 1.0)],
        "draft_model": [result([1, 2, 3, 4], 0.8)],
        "specbranch": [result([1, 2, 3, 4], ours_s, ours=True)],
    }
    return _Results([Prompt("a", "x\ny")], [[7]], runs, Lineup("t", "d", place([0, 1], 0)))


def test_results_are_told_as_they_are() -> None:
    fast, slow = results(0.5), results(2.0)
    assert fast.differences() == [] and fast.num_compared() == 8
    table = fast.table(4, 8).splitlines()
    assert [line.split("  ")[0] for line in table[2:]] == [
        "plain vLLM",
        "vLLM draft_model, up to 4 draft tokens",
        "specbranch, up to 8 draft tokens",
    ]
    assert "2.00x" in table[4] and table[4].endswith("core 0 + core 1")
    assert "NOT" not in fast.speed() and "does NOT pay" in slow.speed()
    assert "[a] ...y" in fast.texts() and "def f():" in fast.texts()


def test_results_as_json_carry_their_origin() -> None:
    written = json.loads(json.dumps(results(0.5).as_json([])))
    assert {"schema_version", "git_sha", "dirty", "versions", "machine", "argv", "rows", "differences"} <= set(written)
    assert written["rows"]["specbranch"]["runs_on"] == "core 0 + core 1"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (DemoSettings(target=Path("x")), "--draft"),
        (DemoSettings(draft=Path("x")), "--target"),
        (DemoSettings(target=Path("/none"), draft=Path("/none")), "--target"),
        (DemoSettings(prompts=Path("/none.txt")), "--prompts"),
        (DemoSettings(json_out=Path("/none/out.json")), "--json"),
    ],
)
def test_mistakes_are_found_before_any_engine_starts(settings: DemoSettings, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        demo.run(settings, lambda text: None)
    assert caught.value.field == field


def test_prompts_that_do_not_fit_are_refused() -> None:
    settings = DemoSettings(max_tokens=10, max_model_len=20)
    with pytest.raises(ConfigError, match="a: 11 tokens"):
        demo._check_lengths([Prompt("a", "")], [[0] * 11], settings)
    demo._check_lengths([Prompt("a", "")], [[0] * 10], settings)


def test_heavier_target_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cast(Any, SimpleNamespace(num_layers=(6, 8), mlp_size=(704, 2816), max_logit_difference=0.0, out="/made"))
    monkeypatch.setattr(demo.deepen, "cached", lambda *_: made)
    said: list[str] = []
    assert demo._shipped_target(2, said.append) == Path("/made")
    assert "same function, checked: logits equal" in "".join(said)
    assert demo._shipped_target(0, said.append).name == "target"
