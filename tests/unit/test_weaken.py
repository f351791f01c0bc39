"""Weaken: a draft that costs the same and guesses less often."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.weaken import main
from tests.model_paths import DRAFT, TARGET, holdout_prompts
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.made_models import read_tensors
from vllm_specbranch.weaken import WEAK_NOISE, cached, weaken

NUM_PROMPT_TOKENS = 96


def test_noise_has_the_asked_size_and_spares_the_norms(tmp_path: Path) -> None:
    report = weaken(Path(DRAFT), tmp_path, seed=3)
    strong, weak = load_file(f"{DRAFT}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert report.num_matrices == sum(weight.dim() == 2 for weight in strong.values())
    for name, weight in strong.items():
        assert weak[name].dtype == weight.dtype
        if weight.dim() == 2:
            added = (weak[name].float() - weight.float()).std() / weight.float().std()
            assert float(added) == pytest.approx(WEAK_NOISE, rel=0.05)
        else:
            assert torch.equal(weak[name], weight)
    assert (tmp_path / "tokenizer.json").read_bytes() == Path(DRAFT, "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(Path(DRAFT, "config.json").read_text())


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    other=st.integers(0, 2**31),
    noise=st.floats(0.05, 1.0),
)
def test_the_same_seed_gives_the_same_weights_and_only_that(
    tmp_path_factory: pytest.TempPathFactory, seed: int, other: int, noise: float
) -> None:
    folder = tmp_path_factory.mktemp("weak")
    for name, chosen in (("a", seed), ("b", seed), ("c", other)):
        weaken(Path(DRAFT), folder / name, noise, chosen)
    first, again, different = (read_tensors(folder / name) for name in "abc")
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        if weight.dim() == 2:
            assert torch.equal(weight, different[name]) == (seed == other)


def greedy_paths(prompts: Sequence[Sequence[int]], num_tokens: int) -> torch.Tensor:
    """The target's greedy continuations: `[num_prompts, NUM_PROMPT_TOKENS + num_tokens]`."""
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    paths: torch.Tensor = target.generate(
        torch.tensor([list(one) for one in prompts]),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
    )
    return paths


def agreement(model: str, paths: torch.Tensor) -> float:
    """How often the model's first choice is the next token of the path, over the continuations."""
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(paths).logits
    choices = logits[:, NUM_PROMPT_TOKENS - 1 : -1].argmax(-1)
    return float((choices == paths[:, NUM_PROMPT_TOKENS:]).float().mean())


def test_the_weak_draft_agrees_with_the_target_half_of_the_time(tmp_path: Path) -> None:
    encode = AutoTokenizer.from_pretrained(TARGET).encode
    prompts = [ids[:NUM_PROMPT_TOKENS] for ids in map(encode, holdout_prompts(24)) if len(ids) >= NUM_PROMPT_TOKENS]
    assert len(prompts) >= 16
    paths = greedy_paths(prompts, 96)
    weak = agreement(cached(Path(DRAFT), cache=tmp_path).out, paths)
    strong = agreement(DRAFT, paths)
    print(f"agreement: shipped draft {strong:.3f}, weak draft {weak:.3f}")
    assert weak < 0.55
    assert strong > 0.65


def test_it_is_made_once_for_each_noise_and_seed(tmp_path: Path) -> None:
    first = cached(Path(DRAFT), cache=tmp_path)
    stamp = (Path(first.out) / "model.safetensors").stat().st_mtime_ns
    assert cached(Path(DRAFT), cache=tmp_path) == first
    assert (Path(first.out) / "model.safetensors").stat().st_mtime_ns == stamp
    others = [cached(Path(DRAFT), 0.2, 0, tmp_path), cached(Path(DRAFT), WEAK_NOISE, 1, tmp_path)]
    assert len({first.out, *(one.out for one in others)}) == 3
    assert not list(tmp_path.glob("unfinished-*"))


@pytest.mark.parametrize(("noise", "out", "field"), [(0.0, None, "noise"), (0.3, DRAFT, "out")])
def test_what_makes_no_sense_is_refused(tmp_path: Path, noise: float, out: str | None, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        weaken(Path(DRAFT), Path(out) if out else tmp_path, noise)
    assert caught.value.field == field


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    assert main([DRAFT, "--out", str(tmp_path), "--seed", "2"], write=lines.append) == 0
    assert json.loads(lines[-1])["seed"] == 2
    assert main([DRAFT, "--out", str(tmp_path), "--noise", "-1"], write=lines.append) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "-1" in line and "noise" in line and "above 0" in line
