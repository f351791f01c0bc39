"""The papers' pairs: which made-up result stands for which pair, what is missing, and what the table says. No engine is started."""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import papers
from benchmarks.decode_options import parse_words
from benchmarks.decode_report import measured_as_json
from benchmarks.papers import MOST_C, NOISES, PAIRS, SHIPPED, WEAK, Measurement, acceptance_rate, choose, doubts
from benchmarks.portable import portable
from tests.decode_results import made_measured, made_row
from vllm_specbranch.measure_messages import Emulation
from vllm_specbranch.shipped_pair import draft_path, target_path

FAST, FASTER, UNUSED = Emulation(35.0, 4.0), Emulation(100.0, 4.0), Emulation(20.0, 4.0)
LLAMA, VICUNA, DEEPSEEK, LLAMA_3 = PAIRS


def made_condition(emulation: Emulation | None, batch_size: int = 1) -> dict[str, Any]:
    measured = made_measured(batch_size, emulation)
    measured.rows.append(made_row("best_first", [1.4, 1.5, 1.6], batch_size, 3, 5))
    condition: dict[str, Any] = json.loads(json.dumps(measured_as_json(measured)))
    for row in condition["rows"]:
        row["overrun_share"] = 0.0
        if row["group"] == "draft_model":
            row["speculative_config"] = {"num_speculative_tokens": int(row["name"].split()[1])}
    return condition


def made_result(noise: float, *emulations: Emulation | None) -> dict[str, Any]:
    return {
        "schema_version": 2,
        "git_sha": "0123456789",
        "dirty": False,
        "options": {"target": portable(target_path()), "draft": portable(draft_path()), "draft_noise": noise},
        "conditions": [made_condition(one) for one in emulations],
    }


def measured(noise: float, *emulations: Emulation | None) -> list[Measurement]:
    result = made_result(noise, *emulations)
    return [Measurement("made.json", result, condition) for condition in result["conditions"]]


def run(tmp_path: Path, results: Sequence[Any], *words: str) -> tuple[int, str, dict[str, Any]]:
    """Return (exit code, text, JSON)."""
    files = []
    for place, result in enumerate(results):
        files.append(tmp_path / f"{place}.json")
        files[-1].write_text(json.dumps(result))
    out, texts = tmp_path / "papers.json", list[str]()
    code = papers.main([*map(str, files), "--out", str(out), *words], write=texts.append)
    return code, "".join(texts), json.loads(out.read_text())


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_c_is_the_ratio_of_parameters_up_to_the_cap() -> None:
    assert [round(pair.parameter_ratio, 2) for pair in PAIRS] == [102.94, 191.18, 25.38, 8.75]
    assert [pair.c for pair in PAIRS] == [MOST_C, MOST_C, MOST_C, 8.75]


def test_the_papers_figures() -> None:
    """As arXiv:2506.01979 has them: on HumanEval, and the mean of three sets."""
    found = [
        tuple(one[name] for one in (pair.human_eval, pair.mean) for name in ("pearl", "specbranch")) for pair in PAIRS
    ]
    assert found == [
        (1.69, 2.04, 1.74, 2.01),
        (2.02, 2.47, 1.77, 2.10),
        (3.39, 3.71, 2.93, 3.23),
        (3.75, 4.02, 3.38, 3.69),
    ]
    assert [pair.alignment for pair in PAIRS] == [WEAK, WEAK, SHIPPED, SHIPPED]


# --- which condition stands for which pair -----------------------------------------------------------------------------


def test_a_condition_stands_for_its_alignment_and_its_c() -> None:
    for noise, aligned in ((0.0, (DEEPSEEK, LLAMA_3)), (NOISES[WEAK], (LLAMA, VICUNA))):
        known = measured(noise, None, FAST, FASTER, UNUSED)
        for pair in PAIRS:
            chosen = choose(pair, known, "python_holdout")
            wanted = {8.75: known[1], MOST_C: known[2]}[pair.c] if pair in aligned else None
            assert chosen is wanted


@pytest.mark.parametrize(
    "emulation",
    [None, UNUSED, Emulation(35.0, 4.0, 0.0, 0.12), Emulation(35.0, 4.0, 0.1), Emulation(35.0, 4.2)],
)
def test_other_durations_stand_for_nothing(emulation: Emulation | None) -> None:
    assert choose(LLAMA_3, measured(0.0, emulation), "python_holdout") is None


@pytest.mark.parametrize(
    ("key", "value"), [("draft", "draft"), ("target", "elsewhere"), ("draft_noise", 0.2), ("draft_noise", NOISES[WEAK])]
)
def test_other_models_stand_for_nothing(key: str, value: object) -> None:
    (one,) = measured(0.0, FAST)
    assert one.stands_for(LLAMA_3, "python_holdout") and not one.stands_for(LLAMA_3, "humaneval")
    one.result["options"][key] = value
    assert not one.stands_for(LLAMA_3, "python_holdout")


def test_several_requests_at_a_time_stand_for_nothing() -> None:
    result = made_result(0.0)
    assert not Measurement("made.json", result, made_condition(FAST, 4)).stands_for(LLAMA_3, "python_holdout")


def test_the_result_given_last_wins() -> None:
    first, second = measured(0.0, FAST), measured(0.0, FAST)
    assert choose(LLAMA_3, [*first, *second], "python_holdout") is second[0]


# --- numbers ---------------------------------------------------------------------------------------------------------


@given(st.floats(0.05, 0.95), st.integers(1, 16))
def test_alpha_is_found_again(alpha: float, gamma: int) -> None:
    num_rounds = 10**6
    accepted = [num_rounds * alpha ** (place + 1) for place in range(gamma)]
    found = acceptance_rate({"accepted_by_position": accepted, "drafted_by_position": [num_rounds] * gamma})
    assert found is not None and math.isclose(found, alpha)


def test_alpha_of_nothing_is_not_known() -> None:
    assert acceptance_rate({"accepted_by_position": [], "drafted_by_position": []}) is None
    assert acceptance_rate({"accepted_by_position": [0, 0], "drafted_by_position": [0, 0]}) is None


def test_alpha_counts_reached_tokens_that_nothing_was_accepted_of() -> None:
    assert acceptance_rate({"accepted_by_position": [3], "drafted_by_position": [4, 4]}) == pytest.approx(3 / 7)


def test_columns_are_rows_of_the_target_core_alone() -> None:
    (one,) = measured(0.0, FAST)
    names = {column: row["name"] for column, row in one.rows().items()}
    assert list(names) == list(papers.COLUMNS)
    # The other one, on two cores, is faster.
    assert names.pop("draft_model") == "draft_model 2"
    assert all(column == name for column, name in names.items())


def test_what_makes_numbers_doubtful_is_said() -> None:
    (one,) = measured(0.0, FAST)
    assert doubts(one) == ["draft_model was best at the edge of the draft tokens tried, 2: its real best may be beyond"]
    rows = one.rows()
    rows["draft_model"]["speculative_config"]["num_speculative_tokens"] = 3
    # Between the 2 of the row on two cores and the 4 of the other one.
    assert doubts(one) == []
    rows["pearl"]["overrun_share"] = 0.5
    difference = {"engine": "e", "prompt": 0, "position": 1, "expected": 2, "got": 3, "gap": 1e-7}
    rows["specbranch"]["differences"] = [difference]
    (found,) = doubts(one)
    assert "longer than emulated: pearl 50%" in found
    rows["specbranch"]["differences"] = [{**difference, "gap": 0.5}]
    assert "not at a tie, in specbranch" in doubts(one)[1]


# --- text, JSON, words -------------------------------------------------------------------------------------------------


def test_all_pairs_measured(tmp_path: Path) -> None:
    results = [made_result(0.0, FAST, FASTER), made_result(NOISES[WEAK], FASTER)]
    code, text, written = run(tmp_path, results)
    assert code == 0 and written["missing"] == [] and written["emulated"] is True
    assert "EMULATED" in text.splitlines()[0] and "Not measured" not in text
    assert json.loads(text.splitlines()[-1]) == written
    ours = [line for line in text.splitlines() if "ours, emulated" in line]
    assert len(ours) == 4 and all(" 1.00 " in line and "2.0" in line for line in ours)
    (paper,) = [line for line in text.splitlines() if "3.75" in line and "HumanEval" in line]
    assert paper.split() == ["paper,", "HumanEval", "1.00", "-", "3.75", "4.02", "-", "1.07"]
    assert [one["measured"]["result"] for one in written["pairs"]] == ["1.json", "1.json", "0.json", "0.json"]
    last = written["pairs"][-1]["measured"]
    assert last["emulation"]["target_forward_ms"] == 35.0 and last["measured_c"] > 0 and last["git_sha"] == "0123456789"
    assert list(last["speed_ups"]) == list(papers.COLUMNS)
    assert last["speed_ups"]["specbranch"]["over_pearl"]["to"] == "pearl"
    assert last["speed_ups"]["best_first"]["over_plain"]["median"] > last["speed_ups"]["pearl"]["over_plain"]["median"]


def test_medians_and_spread_are_those_of_the_result(tmp_path: Path) -> None:
    result = made_result(0.0, FAST)
    for row in result["conditions"][0]["rows"]:
        row["ratio_to_baseline"] |= {"median": 2.5, "least": 2.25, "most": 2.75}
    _, text, _ = run(tmp_path, [result])
    (line,) = [line for line in text.splitlines() if line.startswith("Llama-3.1") and "ours" in line]
    assert line.count("2.50 (2.25..2.75)") == 4 and "2.50 (2.25..2.75) [2]" in line


@pytest.mark.parametrize("prompts", ["python_holdout", "humaneval"])
def test_what_is_missing_comes_with_a_command_that_measures_it(prompts: str, tmp_path: Path) -> None:
    code, text, written = run(tmp_path, [], "--prompts", prompts)
    assert code == 1 and len(written["missing"]) == 2 and all(line in text.splitlines() for line in written["missing"])
    durations = {SHIPPED: [35.0, 100.0], WEAK: [100.0]}
    for alignment, line in zip(NOISES, written["missing"], strict=True):
        assert all((pair.name in line) == (pair.alignment == alignment) for pair in PAIRS)
        command = shlex.split(line.partition(": ")[2])
        assert command[:2] == ["python", "benchmarks/bench_decode.py"]
        # The command is one that the benchmark takes, and what it writes stands for the pairs.
        options = parse_words(command[2:])
        assert options.prompts == [prompts] and options.draft_noise == NOISES[alignment]
        assert [one.target_forward_ms for one in options.emulate] == durations[alignment]
        found = measured(options.draft_noise, *options.emulate)
        for pair in (pair for pair in PAIRS if pair.alignment == alignment):
            assert choose(pair, found, "python_holdout") is not None


def test_only_what_is_missing_is_named(tmp_path: Path) -> None:
    result = made_result(0.0, FAST)
    result["conditions"][0]["rows"] = [one for one in result["conditions"][0]["rows"] if one["group"] != "best_first"]
    code, _, written = run(tmp_path, [result])
    shipped, weak, without = written["missing"]
    assert code == 1 and "--emulate 100:4" in shipped and "35:4" not in shipped and "--draft-noise" not in shipped
    assert "Llama-3.1" not in shipped and weak.endswith("--emulate 100:4 --draft-noise 0.35")
    assert "best_first" in without and "0.json" in without and "pearl" not in without.lower()


@pytest.mark.parametrize(
    ("text", "said"), [(None, "No such file"), ("{", "bench_decode"), ('{"schema_version": 1}', "not 1")]
)
def test_what_is_no_result_is_one_line_and_exit_code_2(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    assert papers.main([str(path), "--out", str(tmp_path / "out.json")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and str(path) in line


def test_a_folder_that_does_not_exist_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert papers.main(["--out", str(tmp_path / "no" / "out.json")]) == 2
    assert "--out" in capsys.readouterr().err
