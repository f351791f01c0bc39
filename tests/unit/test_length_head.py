"""The length head: its two files, what is refused, and whether it fits a pair."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specbranch.errors import ConfigError
from vllm_specbranch.length_head import (
    SPEC_FILE,
    WEIGHTS_FILE,
    HeadSpec,
    LengthHead,
    load_head,
    load_spec,
    model_identity,
    save_head,
    target_layers,
)

SPEC = HeadSpec(
    num_features=20,
    hidden_size=8,
    embedding_size=4,
    num_target_layers=6,
    layers=(5, 6),
    gamma=8,
    epsilon=0.3,
    target="big",
    draft="small",
    target_identity="t" * 8,
    draft_identity="d" * 8,
    label_counts=(3, 4, 5),
    validation={"accuracy": 0.5},
    seed=1,
    prompts="python_holdout.json",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved head with weights and standardisation of its own."""
    torch.manual_seed(0)
    head = LengthHead(SPEC.num_features)
    head.standardise(torch.randn(SPEC.num_features) * 10, torch.rand(SPEC.num_features) + 0.5)
    save_head(tmp_path / "head", head, SPEC)
    return tmp_path / "head"


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_head(folder)
    assert caught.value.field == "length_head" and caught.value.value == str(folder)
    return caught.value.allowed


def test_what_was_saved_is_loaded(folder: Path) -> None:
    head, spec = load_head(folder)
    assert spec == SPEC == load_spec(folder)
    assert spec.num_layers == 2
    assert not head.training and not any(one.requires_grad for one in head.parameters())
    torch.manual_seed(0)
    again = LengthHead(SPEC.num_features)
    assert all(
        torch.equal(head.state_dict()[name], one) for name, one in again.state_dict().items() if "layers" in name
    )
    assert not (folder / (SPEC_FILE + ".new")).exists()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), num_rows=st.integers(0, 17), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_classes_are_the_likeliest_of_the_network_that_was_trained(
    seed: int, num_rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    head = LengthHead(24)
    head.standardise(torch.randn(24) * 5, torch.rand(24) + 0.1)
    z = (torch.randn(num_rows, 24) * 5).to(dtype)
    found = head.classes(z)
    with torch.no_grad():
        logits = head.eval()(z.float())
    assert len(found) == num_rows and all(type(one) is int for one in found)
    # Folding changes the order of sums, so a tie may fall either way.
    assert all(logits[row].max() - logits[row, one] < 1e-3 for row, one in enumerate(found))


def test_dropout_is_for_training_only() -> None:
    torch.manual_seed(0)
    head, z = LengthHead(24), torch.randn(4, 24)
    assert not torch.equal(head.train()(z), head(z))
    head.freeze()
    assert torch.equal(head(z), head(z))


@pytest.mark.parametrize("name", [SPEC_FILE, WEIGHTS_FILE])
def test_a_missing_or_broken_file_is_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for broken in (None, b"", content[: len(content) // 2], b"\xff" + content):
        if broken is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(broken)
        assert name in refused(folder)


def test_no_folder_at_all(tmp_path: Path) -> None:
    assert "a folder that exists" in refused(tmp_path / "none")


def change(folder: Path, **changes: Any) -> None:
    spec = json.loads((folder / SPEC_FILE).read_text())
    (folder / SPEC_FILE).write_text(json.dumps(spec | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"hidden_size": 9}, "layers and sizes make 22"),
        ({"num_features": "20"}, "for num_features"),
        ({"layers": [6, 5]}, "not rising"),
        ({"layers": [6, 7]}, "1..6"),
        ({"layers": []}, "for layers"),
        ({"gamma": 0}, "for gamma"),
        ({"gamma": True}, "for gamma"),
        ({"epsilon": None}, "for epsilon"),
        ({"label_counts": [1, 2]}, "for label_counts"),
        ({"validation": {"accuracy": "good"}}, "for validation"),
        ({"target": 3}, "for target"),
        ({"target_identity": 3}, "for target_identity"),
        ({"colour": "red"}, "colour"),
        ({"num_features": 28, "embedding_size": 12}, "head.json asks for"),
    ],
)
def test_a_description_that_cannot_be_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    change(folder, **changes)
    assert said in refused(folder)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HeadSpec)])
def test_every_field_of_the_description_is_needed(folder: Path, field: str) -> None:
    spec = json.loads((folder / SPEC_FILE).read_text())
    del spec[field]
    (folder / SPEC_FILE).write_text(json.dumps(spec))
    assert field in refused(folder) or "format version None" in refused(folder)
    (folder / SPEC_FILE).write_text("[]")
    assert "no object" in refused(folder)


def test_weights_that_are_no_numbers_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS_FILE)
    for name, value, said in (("layers.0.weight", float("nan"), "not finite"), ("scale", 0.0, "not above 0")):
        wrong = {key: tensor.clone() for key, tensor in tensors.items()}
        wrong[name].view(-1)[0] = value
        save_file(wrong, folder / WEIGHTS_FILE)
        assert said in refused(folder)
    save_file({key: tensor for key, tensor in tensors.items() if key != "mean"}, folder / WEIGHTS_FILE)
    assert "None for mean" in refused(folder)


def test_a_head_and_a_description_of_different_sizes_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        save_head(tmp_path / "head", LengthHead(21), SPEC)
    assert not (tmp_path / "head").exists()


FITTING: dict[str, Any] = {
    "hidden_size": 8,
    "num_target_layers": 6,
    "gamma": 8,
    "target_identity": "t" * 8,
    "draft_identity": "d" * 8,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 16}, "hidden size of the target: 8 in training, 16 here"),
        ({"num_target_layers": 7}, "number of layers of the target: 6 in training, 7 here"),
        ({"gamma": 4}, "num_speculative_tokens: 8 in training, 4 here"),
        ({"target_identity": "x"}, "another target model: it was trained for 'big'"),
        ({"draft_identity": "x"}, "another draft model: it was trained for 'small'"),
    ],
)
def test_a_head_of_another_pair_is_refused_and_says_how_it_differs(changes: dict[str, Any], said: str) -> None:
    SPEC.check_fits("heads/a", **FITTING)
    with pytest.raises(ConfigError) as caught:
        SPEC.check_fits("heads/a", **FITTING | changes)
    assert said in caught.value.allowed and "train-head" in caught.value.allowed
    assert (caught.value.field, caught.value.value) == ("length_head", "heads/a")


def test_what_is_not_known_of_a_model_fits() -> None:
    SPEC.check_fits("heads/a", **FITTING | {"target_identity": None, "draft_identity": None})
    dataclasses.replace(SPEC, target_identity=None, draft_identity=None).check_fits("heads/a", **FITTING)


def test_the_last_layers() -> None:
    assert target_layers(6, 4) == (3, 4, 5, 6)
    assert target_layers(6, 6) == (1, 2, 3, 4, 5, 6)
    for wrong in (0, 7):
        with pytest.raises(ConfigError, match="head_layers"):
            target_layers(6, wrong)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "1"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return folder


def test_a_model_has_one_identity_wherever_it_is(model: Path, tmp_path: Path) -> None:
    before = model_identity(model)
    assert before is not None
    (model / "config.json").write_text(json.dumps({"transformers_version": "2", "hidden_size": 8}))
    (model / "README.md").write_text("notes")
    model.rename(tmp_path / "elsewhere")
    assert model_identity(tmp_path / "elsewhere") == before


def test_config_tokenizer_and_weights_are_part_of_it(model: Path) -> None:
    found = {model_identity(model)}
    (model / "config.json").write_text(json.dumps({"hidden_size": 16}))
    found.add(model_identity(model))
    (model / "tokenizer.json").write_text('{"a": 1}')
    found.add(model_identity(model))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[:] = bytes(byte ^ 1 for byte in weights)
    (model / "model.safetensors").write_bytes(weights)
    found.add(model_identity(model))
    (model / "model.safetensors").write_bytes(weights + b"x")
    found.add(model_identity(model))
    assert len(found) == 5 and None not in found


def test_a_model_that_is_not_here_yet_has_none(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    assert model_identity(model) is None
    assert model_identity(tmp_path / "none") is None


def test_the_shipped_pair_is_two_models() -> None:
    from tests.model_paths import DRAFT, TARGET

    identities = {model_identity(TARGET), model_identity(DRAFT)}
    assert len(identities) == 2 and None not in identities
