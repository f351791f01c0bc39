"""Rounds to train a length head on: what one is, how they are kept on disk, and which are still to be collected.

Owns the shards and their manifest, and the order in which prompts and temperatures come. The rounds are recorded by `head_recorder`
in the target's worker; `train_head` drives the engine. Runs in both processes.

    DIR/manifest.json              what the rounds were made with; another start with other settings is refused
    DIR/rounds-00000.safetensors   one shard: some prompts at one temperature; complete or not there at all
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vllm_specbranch.errors import ConfigError

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Rounds:
    """Rounds of verification whose chunk had its full length (gamma tokens, uncut), so that what the target said is a label.

    Attributes:
        features: `[n, num_features]` the target's, in its own dtype, after the round before (see `head_features`).
        top_probs: `[n, gamma] float32`, the draft's top probability where each token of the chunk was drawn.
        accepted: `[n] int64`, how many of the chunk's tokens were accepted, 0..gamma.
        prompts: `[n] int64`, index of the prompt.
        temperatures: `[n] float32`.
    """

    features: torch.Tensor
    top_probs: torch.Tensor
    accepted: torch.Tensor
    prompts: torch.Tensor
    temperatures: torch.Tensor

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in _NAMES}
        assert len(set(sizes.values())) == 1, f"fields of different lengths: {sizes}"

    def __len__(self) -> int:
        return len(self.accepted)

    @property
    def gamma(self) -> int:
        """Tokens of a full chunk."""
        return int(self.top_probs.shape[1])

    @property
    def labels(self) -> torch.Tensor:
        """`[n] int64`: 0 where nothing was accepted, 2 where all was, else 1."""
        return labels_of(self.accepted, self.gamma)

    def select(self, which: torch.Tensor | slice) -> "Rounds":
        """Some of them.

        Args:
            which: `[n] bool`, or indices; a slice copies nothing.
        """
        return Rounds(**{name: getattr(self, name)[which] for name in _NAMES})

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, as a shard holds them."""
        return {name: getattr(self, name).contiguous() for name in _NAMES}


_NAMES = tuple(one.name for one in fields(Rounds))


def labels_of(accepted: torch.Tensor, gamma: int) -> torch.Tensor:
    """The class of each round (arXiv:2506.01979, section 4): 0 nothing accepted, 2 everything, 1 in between.

    Args:
        accepted: `[n] int64`, 0..gamma.
        gamma: tokens of a full chunk.
    """
    return (accepted > 0).long() + (accepted >= gamma).long()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one shard is made of.

    Attributes:
        index: of the shard.
        first, last: prompts `[first, last)`.
        first_seed: of the first request's sampling; None for greedy ones.
    """

    index: int
    first: int
    last: int
    temperature: float
    first_seed: int | None


def pieces(num_prompts: int, prompts_each: int, temperatures: Sequence[float], seed: int) -> Iterator[Piece]:
    """The shards in the order in which they are collected: each block of prompts at every temperature, then the next block.

    When all prompts are through, sampled requests are made of them again with other seeds; a greedy one would only repeat itself.
    """
    index = count()
    for round_trip in count():
        hot = [one for one in temperatures if one > 0.0 or round_trip == 0]
        if not hot:
            return
        for first in range(0, num_prompts, prompts_each):
            for temperature in hot:
                number = next(index)
                # Requests of different shards never share a seed.
                first_seed = (seed + number) * 2**20 if temperature > 0.0 else None
                yield Piece(number, first, min(first + prompts_each, num_prompts), temperature, first_seed)


class Shards:
    """The shards of one folder.

    Args:
        folder: made when missing.
        settings: what the rounds depend on; plain values only.

    Raises:
        ConfigError: the folder holds shards that were made with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        wanted = json.loads(json.dumps({"format_version": FORMAT_VERSION, **settings}))
        path = folder / _MANIFEST
        if path.is_file():
            _require_same(path, wanted)
            return
        folder.mkdir(parents=True, exist_ok=True)
        _write_whole(path, json.dumps(wanted, indent=1) + "\n")

    def path(self, index: int) -> Path:
        """Of a shard."""
        return _shard(self.folder, index)

    def num_rounds(self, index: int) -> int | None:
        """How many rounds a shard holds, by its header; None if it is not there, or cannot be read (it is then made again)."""
        return _num_rounds(self.path(index))

    def remove(self, index: int) -> None:
        """Take a shard away, if it is there: it is made again."""
        self.path(index).unlink(missing_ok=True)

    def load(self) -> Rounds:
        """All rounds; see `read_rounds`."""
        return read_rounds(self.folder)


def read_rounds(folder: Path) -> Rounds:
    """All rounds of a folder's shards, up to the first that is missing or cannot be read.

    They are read one shard after the other into their place: features of a large target are gigabytes.

    Raises:
        ConfigError: there are none.
    """
    counts: list[int] = []
    while (found := _num_rounds(_shard(folder, len(counts)))) is not None:
        counts.append(found)
    if not sum(counts):
        raise ConfigError(str(folder), "a folder with rounds to train on: longer or more prompts", "--prompts")
    whole: dict[str, torch.Tensor] = {}
    start = 0
    for index, num_rounds in enumerate(counts):
        if not num_rounds:
            continue
        for name, tensor in load_file(_shard(folder, index)).items():
            if name not in whole:
                whole[name] = torch.empty((sum(counts), *tensor.shape[1:]), dtype=tensor.dtype)
            whole[name][start : start + num_rounds] = tensor
        start += num_rounds
    return Rounds(**whole)


def _shard(folder: Path, index: int) -> Path:
    return folder / f"rounds-{index:05d}.safetensors"


def _num_rounds(path: Path) -> int | None:
    """As `Shards.num_rounds`."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(_NAMES):
                return None
            num_rounds: int = file.get_slice("accepted").get_shape()[0]
            return num_rounds
    except SafetensorError:
        return None


def save_rounds(path: Path, rounds: Rounds) -> None:
    """Write a shard, complete or not at all."""
    aside = path.with_suffix(".unfinished")
    save_file(rounds.tensors(), aside)
    aside.rename(path)


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_suffix(".unfinished")
    aside.write_text(text)
    aside.rename(path)


def _require_same(path: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(str(path), f"a manifest of collected rounds ({error})", "--out") from error
    if not isinstance(found, dict):
        raise ConfigError(str(path), "a manifest of collected rounds: a JSON object", "--out")
    for name in sorted({*wanted, *found}):
        if found.get(name) != wanted.get(name):
            allowed = (
                f"an empty folder, or the settings that its rounds were collected with: {name} {found.get(name)!r}"
            )
            raise ConfigError(f"{path.parent} with {name} {wanted.get(name)!r}", allowed, "--out")
