"""Shards of rounds: what is written comes back, a folder of other settings is refused, what is missing is collected again."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.made_rounds import made_rounds
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_data import Piece, Rounds, Shards, labels_of, pieces, save_rounds


def equal(ours: Rounds, theirs: Rounds) -> bool:
    others = theirs.tensors()
    return all(torch.equal(tensor, others[name]) for name, tensor in ours.tensors().items())


def test_labels() -> None:
    assert labels_of(torch.tensor([0, 1, 3, 4]), gamma=4).tolist() == [0, 1, 1, 2]
    # With one token a chunk there is nothing in between.
    assert labels_of(torch.tensor([0, 1]), gamma=1).tolist() == [0, 2]


def test_fields_of_different_lengths_are_refused() -> None:
    rounds = made_rounds(20)
    with pytest.raises(AssertionError, match="different lengths"):
        Rounds(**{**rounds.tensors(), "accepted": rounds.accepted[:-1]})


def test_shards_come_back_in_order(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "rounds", {"gamma": 4})
    parts = [made_rounds(num, seed=num) for num in (30, 40, 50)]
    for index, part in enumerate(parts):
        save_rounds(shards.path(index), part)
    assert [shards.num_rounds(index) for index in range(4)] == [30, 40, 50, None]
    joined = Rounds(**{name: torch.cat([one.tensors()[name] for one in parts]) for name in parts[0].tensors()})
    assert equal(shards.load(), joined)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_load_ends_at_the_first_gap(tmp_path: Path) -> None:
    """What lies beyond a gap was there before an interruption; the same settings will make it again."""
    shards = Shards(tmp_path, {})
    first = made_rounds(30)
    save_rounds(shards.path(0), first)
    save_rounds(shards.path(2), made_rounds(30, seed=1))
    assert equal(shards.load(), first)


def test_an_empty_shard_is_there_and_holds_nothing(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    save_rounds(shards.path(0), made_rounds(30).select(torch.zeros(30, dtype=torch.bool)))
    assert shards.num_rounds(0) == 0
    with pytest.raises(ConfigError, match="longer or more prompts"):
        shards.load()


@pytest.mark.parametrize("content", [b"", b"cut short", b"\xff" * 64])
def test_a_broken_shard_is_made_again(tmp_path: Path, content: bytes) -> None:
    shards = Shards(tmp_path, {})
    shards.path(0).write_bytes(content)
    assert shards.num_rounds(0) is None


def test_a_shard_without_its_end_or_with_other_tensors_is_made_again(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    save_rounds(shards.path(0), made_rounds(30))
    shards.path(1).write_bytes(shards.path(0).read_bytes()[:-8])
    save_file({"accepted": torch.zeros(3)}, shards.path(2))
    assert [shards.num_rounds(index) for index in range(3)] == [30, None, None]
    shards.remove(0)
    shards.remove(0)
    assert shards.num_rounds(0) is None


def test_features_keep_their_dtype(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    rounds = made_rounds(30)
    half = Rounds(**{**rounds.tensors(), "features": rounds.features.bfloat16()})
    save_rounds(shards.path(0), half)
    save_rounds(shards.path(1), half)
    found = shards.load().features
    assert found.dtype == torch.bfloat16 and torch.equal(found, torch.cat([half.features] * 2))


def test_same_settings_go_on_and_others_are_refused(tmp_path: Path) -> None:
    Shards(tmp_path, {"gamma": 4, "temperatures": (0.0, 0.8)})
    Shards(tmp_path, {"gamma": 4, "temperatures": (0.0, 0.8)})
    with pytest.raises(ConfigError, match=r"gamma 4.*--out|gamma 5.*gamma 4"):
        Shards(tmp_path, {"gamma": 5, "temperatures": (0.0, 0.8)})
    with pytest.raises(ConfigError, match="layers"):
        Shards(tmp_path, {"gamma": 4, "temperatures": (0.0, 0.8), "layers": 2})


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match="manifest"):
        Shards(tmp_path, {})


def test_pieces_take_every_prompt_at_every_temperature_then_sampled_ones_again() -> None:
    found = list(islice(pieces(5, 2, (0.0, 0.8), seed=0), 9))
    assert [(one.first, one.last, one.temperature) for one in found] == [
        *[(0, 2, 0.0), (0, 2, 0.8), (2, 4, 0.0), (2, 4, 0.8), (4, 5, 0.0), (4, 5, 0.8)],
        # A greedy request would only say the same again.
        *[(0, 2, 0.8), (2, 4, 0.8), (4, 5, 0.8)],
    ]
    assert [one.index for one in found] == list(range(9))
    seeds = [one.first_seed for one in found if one.first_seed is not None]
    assert len(set(seeds)) == len(seeds) == 6


def test_greedy_pieces_end() -> None:
    assert list(pieces(3, 2, (0.0,), seed=0)) == [Piece(0, 0, 2, 0.0, None), Piece(1, 2, 3, 0.0, None)]
