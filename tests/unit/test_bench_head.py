"""The benchmarks of the length head without engines: rows, words, picture; classes along a text; transfer; prompts."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from benchmarks import bench_head, bench_head_call, head_results, head_transfer
from benchmarks.bench_head import HEAD, HYBRID, KNOWN, NONE, PEARL, Variant, variants
from benchmarks.head_ablation_report import as_text, draw_ablation, spread
from benchmarks.head_classes import features_along
from benchmarks.head_prompts import make_prompts
from benchmarks.head_transfer import Learned
from tests.made_rounds import made_rounds
from tests.unit.test_bench_replay import study
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_data import save_rounds
from vllm_specbranch.head_report import HEAD as HEAD_NAME
from vllm_specbranch.head_report import ONE, SAVED, Predictions, by_temperature, figures
from vllm_specbranch.head_rules import classes_by_length, lengths_by_confidence
from vllm_specbranch.head_training import TrainSettings, split, train
from vllm_specbranch.length_head import HeadSpec, save_head
from vllm_specbranch.measure_messages import Emulation
from vllm_specbranch.replay import Recording


def test_rows_are_settings_and_each_is_there_once() -> None:
    rows = variants((0.1, 0.5))
    assert len(set(rows)) == len(rows) == 3 + 3 * 2
    for row in rows:
        config = SpecBranchConfig.from_user({"model": "draft", **row.settings(8)})
        assert config.policy == ("pearl" if row.rule == PEARL else "specbranch")
        assert config.stop_rule == ("none" if row.epsilon is None else "confidence")
        assert row.epsilon is None or config.stop_threshold == row.epsilon
    assert [row.has_head for row in (Variant(NONE, None), Variant(HEAD, None), Variant(HYBRID, 0.1))] == [
        False,
        True,
        True,
    ]


def replayed() -> list[dict[str, Any]]:
    made = study()
    said = [[1] * len(one.tokens) for one in made.recordings]
    return bench_head.replay_rows(made, said, 4, Emulation(20.0, 4.0))


def test_a_head_that_says_class_1_is_confidence_alone() -> None:
    rows = {(row["rule"], row["epsilon"]): row["time_s"] for row in replayed()}
    for epsilon in bench_head.EPSILONS:
        assert rows["hybrid", epsilon] == rows["confidence", epsilon]
    assert rows["head", None] == rows["none", None]


def test_the_second_half_of_an_online_row_is_what_comes_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many passes again, the whole of the shorter run is the first half of the longer one."""
    monkeypatch.setattr(bench_head, "NUM_PASSES", 4)
    longer = bench_head.online_rows(study(), 4, Emulation(20.0, 4.0))
    monkeypatch.setattr(bench_head, "NUM_PASSES", 2)
    shorter = bench_head.online_rows(study(), 4, Emulation(20.0, 4.0))
    for long, short in zip(longer, shorter, strict=True):
        for key in ("tokens_per_s", "confidence_tokens_per_s"):
            halves = [2 / short[half][key] for half in ("first_half", "second_half")]
            assert sum(halves) / 4 == pytest.approx(1 / long["first_half"][key])
        assert long["second_half"]["ratio"] > 0.9


def test_known_classes_are_those_of_the_outcomes() -> None:
    made = study()
    for ours, said in zip(made.agreements, made.known_classes(4), strict=True):
        for place, its in enumerate(said[:-5]):
            run = ours.run_length(place + 1, 4)
            assert its == (0 if run == 0 else 2 if run == 4 else 1)


def test_words_and_picture(tmp_path: Path) -> None:
    rows = replayed()
    engines = [
        {"rule": rule, "epsilon": None, "tokens_per_s": 50.0, "speed_up": 1.0, "hit_rate": None, "rollback_rate": None}
        | {"is_lossless": rule != "head"}
        for rule in ("plain", "pearl", "head")
    ]
    online = bench_head.online_rows(study(), 4, Emulation(20.0, 4.0))
    pairs = [
        {"noise": noise, "gamma": 4, "replays": rows, "online": online, "engines": engines} for noise in (0.0, 0.35)
    ]
    emulation = {"target_forward_ms": 20.0, "draft_step_ms": 4.0, "draft_token_cost": 0.02}
    result = {"pairs": pairs, "emulation": emulation}
    text = as_text(result)
    assert (
        "poorly aligned pair (noise 0.35), real engines" in text
        and "DIFFERENT" in text
        and "head and confidence, 0.7" in text
        and "learned while serving" in text
    )
    assert 0.0 <= spread(rows, KNOWN) < 1.0
    for count in (1, 2):
        path = draw_ablation(result | {"pairs": pairs[:count]}, tmp_path / f"{count}.png")
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pairs_of_an_earlier_result_are_of_the_same_durations(tmp_path: Path) -> None:
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps({"emulation": msgspec.to_builtins(Emulation(20.0, 4.0)), "pairs": [{"noise": 0.0}]}))
    assert bench_head._earlier(path, Emulation(20.0, 4.0)) == [{"noise": 0.0}]
    with pytest.raises(ConfigError, match="same durations"):
        bench_head._earlier(path, Emulation(20.0, 2.0))


@pytest.mark.parametrize(
    "words",
    [
        ["--emulate", "none"],
        ["--out", "missing/x.json"],
        ["--prompts", "missing.txt"],
        ["--after", "missing.json"],
    ],
)
def test_mistakes_exit_with_2(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_head.main(["--out", str(tmp_path / "x.json"), *words]) == 2
    assert capsys.readouterr().err.startswith("bench_head: ")


def test_features_along_a_text_are_the_hidden_states_at_the_token_before() -> None:
    """A small random model; `output_hidden_states` is another way to the same, but for the last layer, which it gives normed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "vocab_size": 50,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    recording = Recording((3, 4, 5), (6, 7, 8, 9), 4)
    found = features_along(model, (1, 2, 3), recording)
    with torch.inference_mode():
        ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
        states = model(ids, output_hidden_states=True).hidden_states
        normed = model.model.norm(found[:, 16:24])
        embedded = model.model.embed_tokens(ids)[0, 3:7]
    assert found.shape == (4, 4 * 8)
    # The token 6, at place 3, was sampled where 5 went in, at place 2.
    assert torch.allclose(found[:, :8], states[1][0, 2:6], atol=1e-6)
    assert torch.allclose(found[:, 8:16], states[2][0, 2:6], atol=1e-6)
    assert torch.allclose(normed, states[3][0, 2:6], atol=1e-5)
    assert torch.equal(found[:, 24:], embedded)


def made_folder(folder: Path, seed: int, told: float) -> Path:
    rounds = made_rounds(600, seed=seed, told_by_features=told)
    (folder / "rounds").mkdir(parents=True)
    save_rounds(folder / "rounds" / "rounds-00000.safetensors", rounds)
    parts = split(rounds, seed=0)
    found = train(parts.train, parts.choose, TrainSettings(num_epochs=2))
    spec = HeadSpec(12, 2, 4, 5, (2, 3, 4, 5), 4, 0.1, "target", "draft", None, None, (1, 1, 1), {}, 0, "made up")
    save_head(folder, found.head, spec)
    return folder


def test_transfer_is_told_in_both_directions_and_at_both_temperatures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same law on both sets: nothing is lost; the opposite law: much is, whichever of the two is asked."""
    ours = made_folder(tmp_path / "ours", 0, 4.0)
    alike, opposite = made_folder(tmp_path / "alike", 1, 4.0), made_folder(tmp_path / "opposite", 2, -4.0)
    out = tmp_path / "transfer.json"
    assert head_transfer.main([str(ours), str(alike), str(opposite), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert json.loads(text.splitlines()[-1]) == result and result["git_sha"]
    cells = result["held_out"]
    for kind in ("all", "greedy", "sampled"):
        assert f"{kind} rounds" in text
        lost, low, high = cells["ours"]["alike"][kind]["gain_over_own_head"]
        assert abs(lost) < 0.15 and low <= lost <= high
        for one, other in (("ours", "opposite"), ("opposite", "ours")):
            here, there = cells[one][other][kind], cells[other][other][kind]
            assert here["num_rounds"] == there["num_rounds"]
            assert here["gain_over_own_head"][0] == pytest.approx(
                here["accuracy"][SAVED] - there["accuracy"][SAVED], abs=1e-6
            )
            assert here["gain_over_own_head"][0] < -0.2
    assert result["whole"]["ours"]["alike"]["all"]["num_rounds"] == 600 and "ours" not in result["whole"]["ours"]


def test_the_confidence_rule_is_that_of_the_set_it_was_fitted_to(tmp_path: Path) -> None:
    ours = Learned.read(made_folder(tmp_path / "ours", 0, 4.0))
    rounds = made_rounds(200, seed=9)
    said = ours.says(rounds)[ONE]
    for kind, which in by_temperature(rounds).items():
        if kind != "all":
            lengths = lengths_by_confidence(rounds.top_probs[which], ours.thresholds[kind][0])
            assert torch.equal(said[which], classes_by_length(lengths, rounds.gamma))


def test_folders_that_cannot_be_compared(tmp_path: Path) -> None:
    ours, out = str(made_folder(tmp_path / "ours", 0, 4.0)), str(tmp_path / "transfer.json")
    assert head_transfer.main([ours, str(tmp_path), "--out", out]) == 2
    assert head_transfer.main([ours, ours, "--out", out]) == 2
    assert head_transfer.main([ours, "--out", out]) == 2


def test_prompts_are_whole_lines_of_other_files(tmp_path: Path) -> None:
    lines = [f"value_{number} = compute({number})  # line\n" for number in range(60)]
    files = ["".join(f"# file {name}\n" + line for line in lines) for name in range(12)]
    for name, text in enumerate(files):
        (tmp_path / f"{name}.py").write_text(text)
    found = make_prompts([tmp_path], 100, 1, held_out=[files[3], files[7]])
    assert len(found) == 10
    assert not [text for text in found if "# file 3\n" in text or "# file 7\n" in text]
    assert all(text.endswith("\n") and 80 <= len(text) <= 500 for text in found)
    assert found == make_prompts([tmp_path], 100, 1, held_out=[files[3], files[7]])
    assert found != make_prompts([tmp_path], 100, 2, held_out=[files[3], files[7]])
    assert len(make_prompts([tmp_path], 4, 1)) == 4


def test_the_price_of_a_call_is_told_for_every_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    out = tmp_path / "call.json"
    try:
        assert bench_head_call.main(["--out", str(out), "--num-blocks", "2"]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert [row["batch_size"] for row in result["rows"]] == list(bench_head_call.BATCH_SIZES)
    assert all(len(row["block_ms"]) == 2 and row["median_ms"] > 0 for row in result["rows"])
    # 1,280 features to 256, 64 and 3: the first layer is nearly all of it.
    least = {row["batch_size"]: row["least_ms_by_rate"] for row in result["rows"]}
    assert least[16] * result["operations_per_s"] / 1e3 == pytest.approx(16 * 2 * (1280 * 256 + 256 * 64 + 64 * 3))
    assert bench_head_call.main(["--out", str(tmp_path / "none" / "x.json")]) == 2
    assert bench_head_call.main(["--out", str(out), "--head", str(tmp_path)]) == 2


def test_a_report_becomes_a_result_without_places(tmp_path: Path) -> None:
    parts = split(made_rounds(600), seed=0)
    chosen, held_out = (
        Predictions({HEAD_NAME: one.labels}, {HEAD_NAME: one.labels}) for one in (parts.choose, parts.held_out)
    )
    report = {
        "argv": ["/some/where/cli.py", "train-head", "--out", "good"],
        "figures": figures(parts, chosen, held_out, 5.0),
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    words = [str(tmp_path), "--out", str(tmp_path / "head.json"), "--picture", str(tmp_path / "head.png")]
    assert head_results.main(words) == 0
    found = json.loads((tmp_path / "head.json").read_text())
    assert found["argv"] == ["cli.py", "train-head", "--out", "good"] and found["figures"] == report["figures"]
    assert (tmp_path / "head.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert head_results.main([str(tmp_path / "none"), *words[1:]]) == 2
