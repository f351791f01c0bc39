"""benchmarks/train_pair.py on a tiny budget: it learns, it resumes, and what it writes loads."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import train_pair
from tests.model_paths import holdout_texts
from vllm_specbranch.errors import ConfigError


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index, content in enumerate(holdout_texts()):
        (folder / f"{index}.py").write_text(content)
    return folder


def run(out: Path, text: Path, *more: str) -> dict[str, object]:
    lines: list[str] = []
    words = [
        "--out",
        str(out),
        "--text",
        str(text),
        "--size",
        "tiny",
        "--learning-rate",
        "0.01",
        "--precision",
        "float32",
        *more,
    ]
    assert train_pair.main(words, write=lines.append) == 0
    card: dict[str, object] = json.loads(lines[-1])
    return card


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("pair")
    # 8 sequences of 64 tokens a step: 30 steps, and 9 of distillation.
    return out, run(out, text, "--tokens", str(30 * 8 * 64))


def test_every_stage_learns(trained: tuple[Path, dict[str, object]]) -> None:
    stages = {stage["stage"]: stage for stage in trained[1]["stages"]}  # type: ignore[attr-defined]
    assert [stages[name]["num_steps"] for name in ("target", "draft", "distill")] == [30, 30, 9]
    # log(512) = 6.24 is where a model that knows nothing starts.
    assert stages["target"]["first_loss"] > 6.0
    assert stages["target"]["last_loss"] < stages["target"]["first_loss"] - 0.7
    assert stages["draft"]["last_loss"] < stages["draft"]["first_loss"] - 0.5
    assert stages["distill"]["last_loss"] < stages["distill"]["first_loss"]
    assert stages["target"]["held_out_loss"] < 5.7


@pytest.mark.parametrize("role", ["target", "draft"])
def test_the_result_loads_and_speaks_one_vocabulary(trained: tuple[Path, dict[str, object]], role: str) -> None:
    folder = trained[0] / role
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == 512 >= len(tokenizer)
    sample = "def f(x):\n    return '\u00e9'\n"
    tokens = tokenizer(sample, return_tensors="pt")
    assert tokenizer.decode(tokens["input_ids"][0]) == sample
    assert model.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1] > tokens["input_ids"].shape[1]
    assert (folder / "generation_config.json").is_file()


def test_the_card_says_where_it_came_from(trained: tuple[Path, dict[str, object]]) -> None:
    out, card = trained
    assert json.loads((out / "card.json").read_text()) == card
    assert {"git", "versions", "arguments", "text", "size", "stages", "draft_first_choice_is_targets"} <= set(card)
    assert card["text"]["num_files"] == len(holdout_texts())  # type: ignore[index]


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(text: Path, tmp_path: Path) -> None:
    from benchmarks import training_run

    class Stop(Exception):
        pass

    real = training_run._train_step
    steps = 0

    def counted(*args: object, **kwargs: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise Stop
        return real(*args, **kwargs)  # type: ignore[arg-type]

    # 10 steps for the target, 10 for the draft, 3 of distillation.
    arguments = ("--tokens", str(10 * 8 * 64), "--checkpoint-s", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_run, "_train_step", counted)
        with pytest.raises(Stop):
            run(tmp_path / "a", text, *arguments)
        run(tmp_path / "a", text, *arguments)
    assert steps == 6 + (10 - 5) + 10 + 3
    run(tmp_path / "b", text, *arguments)
    for role in ("target", "draft"):
        resumed, straight = (load_file(tmp_path / name / role / "model.safetensors") for name in "ab")
        assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_bf16_autocast_learns_too(text: Path, tmp_path: Path) -> None:
    card = run(tmp_path, text, "--tokens", str(4 * 8 * 64), "--precision", "bf16")
    assert card["bf16"] is True
    assert card["stages"][0]["last_loss"] < card["stages"][0]["first_loss"]  # type: ignore[index]


def test_a_time_budget_ends_the_run(text: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    run(tmp_path, text, "--minutes", "0.02")
    assert time.monotonic() - started < 15


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "out", tmp_path)
    assert caught.value.field == "text"
