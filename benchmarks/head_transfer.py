"""How much a length head loses on prompts of another kind: each head on the held-out rounds of each collection.

Takes folders that `vllm-specbranch train-head` made for one pair on different prompt sets. Row: what the head was trained on;
column: what it was asked. Held-out rounds are those that the training on that set did not see.

    python benchmarks/head_transfer.py CODE_DIR MATHS_DIR --out transfer.json

Owns the comparison; trains nothing. Runs offline, without any engine.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.head_data import Rounds, read_rounds
from vllm_specbranch.head_training import balanced_accuracy, predict, split
from vllm_specbranch.length_head import NUM_CLASSES, load_head
from vllm_specbranch.provenance import provenance
from vllm_specbranch.report import table

SCHEMA_VERSION = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; return 2 for words that cannot be used."""
    parser = argparse.ArgumentParser(description="Length heads on prompts of another kind.")
    parser.add_argument("folders", type=Path, nargs="+", help="--out of train-head")
    parser.add_argument("--names", type=lambda text: text.split(","), help="of the folders, with commas between them")
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON")
    args = parser.parse_args(argv)
    names = args.names or [folder.name for folder in args.folders]
    try:
        if len(names) != len(args.folders):
            raise ConfigError(args.names, f"{len(args.folders)} names, one per folder", "--names")
        held_out = [_held_out(folder) for folder in args.folders]
        cells = {
            name: {other: compare(folder, rounds) for other, (rounds, _) in zip(names, held_out, strict=True)}
            for name, folder in zip(names, args.folders, strict=True)
        }
        majorities = {name: _majority(rounds, most) for name, (rounds, most) in zip(names, held_out, strict=True)}
    except SpecBranchError as error:
        sys.stderr.write(f"head_transfer: {error}\n")
        return 2
    result = {
        "schema_version": SCHEMA_VERSION,
        **provenance(Path(__file__).parent),
        "majority": majorities,
        "heads": cells,
    }
    sys.stdout.write(as_text(result) + "\n\n" + json.dumps(result) + "\n")
    args.out.write_text(json.dumps(result) + "\n")
    return 0


def _held_out(folder: Path) -> tuple[Rounds, int]:
    """The rounds that the head of this folder has not seen, and the most frequent class of those that it was trained on."""
    _, spec = load_head(folder)
    parts = split(read_rounds(folder / "rounds"), spec.seed)
    return parts.held_out, int(torch.bincount(parts.train.labels, minlength=NUM_CLASSES).argmax())


def _majority(rounds: Rounds, most: int) -> float:
    return float((rounds.labels == most).float().mean())


def compare(folder: Path, rounds: Rounds) -> dict[str, float]:
    """Accuracies of the head in a folder on some rounds.

    Raises:
        ConfigError: the head is for other features or chunks.
    """
    head, spec = load_head(folder)
    if (spec.num_features, spec.gamma) != (rounds.features.shape[1], rounds.gamma):
        raise ConfigError(
            str(folder), f"a head for {rounds.features.shape[1]} features, {rounds.gamma} tokens", "folder"
        )
    said = predict(head, rounds.features)
    return {
        "num_rounds": len(rounds),
        "accuracy": float((said == rounds.labels).float().mean()),
        "balanced_accuracy": balanced_accuracy(said, rounds.labels),
    }


def as_text(result: Mapping[str, Any]) -> str:
    """The matrix."""
    names = list(result["majority"])
    rows = [["the most frequent class", *(f"{result['majority'][name]:.1%}" for name in names)]]
    for name, cells in result["heads"].items():
        rows.append(
            [f"trained on {name}"]
            + [f"{cells[one]['accuracy']:.1%} ({cells[one]['balanced_accuracy']:.1%})" for one in names]
        )
    return table(["accuracy (mean over the classes) on held-out", *names], rows)


if __name__ == "__main__":
    sys.exit(main())
