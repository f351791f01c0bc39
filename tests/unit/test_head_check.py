"""What is asked of a length head and its target before any weights load; real configs of small models."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.heads import make_head
from tests.model_paths import DRAFT, TARGET, make_weak_draft
from vllm_specbranch import head_check, patching
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_check import known_identity
from vllm_specbranch.length_head import WEIGHTS_FILE, model_identity
from vllm_specbranch.patches import arg_utils


@pytest.fixture(scope="module", autouse=True)
def hooks() -> Iterator[None]:
    there = [patch for patch in arg_utils.PATCHES if patching.is_applied(patch)]
    patching.apply(arg_utils.PATCHES, "0.32.0")
    yield
    patching.revert([patch for patch in arg_utils.PATCHES if patch not in there])


def speculative_config(target: str = TARGET, **settings: object) -> Any:
    from vllm import EngineArgs

    given = {"method": "specbranch", "model": DRAFT} | settings
    args = EngineArgs(model=target, speculative_config=given, dtype="float32")
    return args.create_engine_config().speculative_config


def refused(target: str = TARGET, **settings: object) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        speculative_config(target, **settings)
    return caught.value


@pytest.fixture
def head(tmp_path: Path) -> str:
    return make_head(tmp_path / "head", "random")


def test_a_head_says_which_hidden_states_are_needed(head: str) -> None:
    config = speculative_config(length_head=head)
    assert config.feature_layers == (3, 4, 5, 6)
    assert config.specbranch.length_head == head
    assert speculative_config(length_head=head, head_layers=4).feature_layers == (3, 4, 5, 6)
    error = refused(length_head=head, head_layers=3)
    assert error.field == "head_layers" and "4" in error.allowed


def test_without_a_head_they_are_only_taken_when_asked_for() -> None:
    assert speculative_config().feature_layers == ()
    assert speculative_config(length_head="online").feature_layers == ()
    assert speculative_config(head_layers=2).feature_layers == (5, 6)
    error = refused(head_layers=7)
    assert error.field == "head_layers" and "1..6" in error.allowed


def test_compiled_graphs_with_and_without_hidden_states_have_different_names(head: str) -> None:
    plain = speculative_config().compute_hash()
    found = [speculative_config(**given).compute_hash() for given in ({"length_head": head}, {"head_layers": 2})]
    assert len({plain, *found}) == 3
    assert speculative_config(head_layers=4).compute_hash() == found[0], "the same graph has one name"


def test_another_pair_is_refused(tmp_path: Path, head: str) -> None:
    weak = make_weak_draft(tmp_path / "weak")
    error = refused(model=weak, length_head=head)
    assert (error.field, error.value) == ("length_head", head)
    assert "another draft model" in error.allowed and "another target" not in error.allowed
    assert (
        "num_speculative_tokens: 8 in training, 4 here" in refused(num_speculative_tokens=4, length_head=head).allowed
    )
    other = make_head(tmp_path / "other", "random", num_target_layers=7)
    assert "number of layers of the target: 7 in training, 6 here" in refused(length_head=other).allowed
    foreign = make_head(tmp_path / "foreign", "random", target_identity="x")
    assert "another target model" in refused(length_head=foreign).allowed


def test_what_cannot_be_compared_is_said(tmp_path: Path, head: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vllm.specbranch"):
        speculative_config(length_head=head)
        assert "not checked" not in caplog.text
        speculative_config(length_head=make_head(tmp_path / "unnamed", "random", draft_identity=None))
        assert "not checked whether it was trained for this draft model" in caplog.text
        assert "target model" not in caplog.text
        caplog.clear()
        with mock.patch.object(head_check, "known_identity", lambda model, revision: None):
            speculative_config(length_head=head)
        assert caplog.text.count("that is not on this machine yet") == 2


def test_broken_files_are_found_before_the_target_loads(tmp_path: Path, head: str) -> None:
    assert "a folder that exists" in refused(length_head=str(tmp_path / "none")).allowed
    (Path(head) / WEIGHTS_FILE).write_bytes(b"")
    assert WEIGHTS_FILE in refused(length_head=head).allowed


@pytest.fixture
def unsupported(tmp_path: Path) -> str:
    """A target of an architecture whose hidden states vLLM cannot return."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TARGET) / file, folder)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "vocab_size": 4096}
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes})
    )
    return str(folder)


@pytest.mark.parametrize("given", ["length_head", "head_layers"])
def test_a_target_without_hidden_states_is_named_and_works_without_a_head(
    unsupported: str, head: str, given: str
) -> None:
    error = refused(unsupported, **{given: {"length_head": head, "head_layers": 2}[given]})
    assert error.field == given
    assert "GPT2LMHeadModel" in error.allowed and unsupported in error.allowed
    assert speculative_config(unsupported).feature_layers == ()
    assert speculative_config(unsupported, length_head="online").feature_layers == ()


def test_the_identity_of_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, str] = {}
    look: Callable[..., Any] = lambda model, file, revision: known.get(model)  # noqa: E731
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", look)
    assert known_identity(TARGET) == model_identity(TARGET)
    assert known_identity("org/model") is None
    known["org/model"] = f"{TARGET}/config.json"
    assert known_identity("org/model", "main") == model_identity(TARGET)
    (tmp_path / "config.json").write_text("{}")
    known["org/partly"] = str(tmp_path / "config.json")
    assert known_identity("org/partly") is None
