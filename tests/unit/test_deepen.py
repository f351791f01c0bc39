"""Deepen: the same function at a real cost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.deepen import main
from vllm_specbranch.config import cache_directory
from vllm_specbranch.deepen import cached, check, deepen
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.shipped_pair import draft_path, target_path


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with biases everywhere and an output matrix of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    path = tmp_path_factory.mktemp("biased")
    model.save_pretrained(path)
    return path


def test_extra_layers_change_no_logit(tmp_path: Path) -> None:
    report = check(deepen(target_path(), tmp_path, extra_layers=7, mlp_size=None))
    assert report.num_layers == (6, 13)
    assert report.max_logit_difference == 0.0
    assert report.same_argmax


def test_extra_neurons_change_logits_by_rounding_only(tmp_path: Path) -> None:
    report = check(deepen(target_path(), tmp_path, extra_layers=1, mlp_size=1000))
    assert report.mlp_size == (704, 1000)
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4
    assert report.same_argmax


def test_biases_of_new_layers_add_nothing(biased: Path, tmp_path: Path) -> None:
    report = check(deepen(biased, tmp_path, extra_layers=3, mlp_size=64))
    assert report.max_logit_difference is not None and report.max_logit_difference < 1e-4


def test_check_sees_a_difference(tmp_path: Path) -> None:
    report = deepen(draft_path(), tmp_path, extra_layers=1, mlp_size=None)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name] += 0.05
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checked = check(report)
    assert checked.max_logit_difference is not None and checked.max_logit_difference > 1e-3


def test_every_new_weight_is_stored_and_used(tmp_path: Path) -> None:
    report = deepen(draft_path(), tmp_path, extra_layers=2, mlp_size=512)
    tensors = load_file(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size > 2 * report.num_parameters[1]
    assert sum(tensor.numel() for tensor in tensors.values()) == report.num_parameters[1]
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    for layer in range(4):
        prefix = f"model.layers.{layer}."
        assert tensors[prefix + "mlp.gate_proj.weight"].shape == (512, 128)
        assert tensors[prefix + "mlp.gate_proj.weight"][352:].float().std() > 0
        assert (tensors[prefix + "mlp.down_proj.weight"][:, 352:] == 0).all()
        assert (tensors[prefix + "self_attn.o_proj.weight"] == 0).all() == (layer >= 2)
        assert tensors[prefix + "self_attn.q_proj.weight"].float().std() > 0


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        deepen(draft_path(), tmp_path / name, extra_layers=1, mlp_size=400, seed=seed)
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again != other


@pytest.mark.parametrize(
    ("layers", "mlp", "field"),
    [(-1, None, "layers"), (0, 351, "mlp")],
)
def test_sizes_that_would_shrink_are_refused(tmp_path: Path, layers: int, mlp: int | None, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deepen(draft_path(), tmp_path, layers, mlp)
    assert caught.value.field == field


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(ConfigError, match="GPT2LMHeadModel"):
        deepen(tmp_path, tmp_path / "out", 1, None)


def test_source_is_never_overwritten() -> None:
    with pytest.raises(ConfigError, match="other than the source"):
        deepen(draft_path(), draft_path(), 1, None)


def test_command_line_writes_the_report_last_and_copies_the_tokenizer(tmp_path: Path) -> None:
    lines: list[str] = []
    assert main([str(draft_path()), "--layers", "1", "--out", str(tmp_path)], write=lines.append) == 0
    report = json.loads(lines[-1])
    assert report["num_layers"] == [2, 3] and report["same_argmax"] is True
    assert (tmp_path / "tokenizer.json").read_bytes() == (draft_path() / "tokenizer.json").read_bytes()


def test_cached_model_is_made_once_and_checked(tmp_path: Path) -> None:
    first = cached(draft_path(), 1, 400, tmp_path)
    assert first.same_argmax and Path(first.out).parent == tmp_path
    stamp = (Path(first.out) / "model.safetensors").stat().st_mtime_ns
    assert cached(draft_path(), 1, 400, tmp_path) == first
    assert (Path(first.out) / "model.safetensors").stat().st_mtime_ns == stamp
    other = cached(draft_path(), 2, 400, tmp_path)
    assert other.out != first.out and other.num_layers == (2, 4)
    assert not list(tmp_path.glob("unfinished-*"))


def test_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "vllm-specbranch"
