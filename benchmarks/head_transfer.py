"""How much a length head loses on prompts of another kind: every head, and the confidence rule, on every collection.

Takes folders that `vllm-specbranch train-head` made for one pair on different prompt sets, two or more. What was learned on a set
(the head as saved, the thresholds on confidence, the most frequent class) is asked about the rounds that training on the other
set held out, so that both sets' heads answer the same questions; and, as these are few, about all rounds of the other set.

    python benchmarks/head_transfer.py CODE_DIR MATHS_DIR --names code,maths --out transfer.json

Owns the comparison; trains nothing. Runs offline, without any engine.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.portable import portable
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.head_data import Rounds, read_rounds
from vllm_specbranch.head_report import (
    MAJORITY,
    ONE,
    SAVED,
    TWO,
    accuracy_gain,
    by_temperature,
    fit_thresholds,
    most_frequent,
    said_by_confidence,
)
from vllm_specbranch.head_training import balanced_accuracy, predict, split
from vllm_specbranch.length_head import LengthHead, load_head
from vllm_specbranch.provenance import provenance
from vllm_specbranch.report import table

SCHEMA_VERSION = 2
RULES = (MAJORITY, ONE, TWO, SAVED)


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned on one set, and the rounds to ask about.

    Attributes:
        most: the class that is most frequent in its training rounds.
        thresholds: of `head_report.fit_thresholds`, fitted to its training rounds.
        held_out: rounds that its training did not see.
        whole: all its rounds.
    """

    head: LengthHead
    most: int
    thresholds: Mapping[str, Any]
    held_out: Rounds
    whole: Rounds

    @classmethod
    def read(cls, folder: Path) -> "Learned":
        """From a folder of `train-head`.

        Raises:
            ConfigError: it has no head or no rounds, or they do not belong together.
        """
        head, spec = load_head(folder)
        whole = read_rounds(folder / "rounds")
        if (spec.num_features, spec.gamma) != (whole.features.shape[1], whole.gamma):
            allowed = f"a head for its rounds, of {whole.features.shape[1]} features and {whole.gamma} tokens"
            raise ConfigError(str(folder), allowed, "folder")
        parts = split(whole, spec.seed)
        return cls(head, most_frequent(parts.train), fit_thresholds(parts.train), parts.held_out, whole)

    def says(self, rounds: Rounds) -> dict[str, torch.Tensor]:
        """By rule, `[n] int64`.

        Raises:
            ConfigError: the rounds have other features or chunks.
        """
        ours = (self.whole.features.shape[1], self.whole.gamma)
        if ours != (rounds.features.shape[1], rounds.gamma):
            raise ConfigError(f"{rounds.features.shape[1]} features, {rounds.gamma} tokens", f"{ours} in all", "folder")
        return {
            MAJORITY: torch.full_like(rounds.labels, self.most),
            **said_by_confidence(rounds, self.thresholds),
            SAVED: predict(self.head, rounds),
        }


def compare(ours: Learned, rounds: Rounds, theirs: Learned | None = None) -> dict[str, Any]:
    """What was learned on one set, on some rounds, by temperature.

    Args:
        theirs: learned on the rounds' own set; what its head says is set against.

    Returns:
        Per kind of rounds: accuracies by rule, what the head has over the confidence rule and, with `theirs`, over the other head:
        `[gain, low, high]`, prompts drawn anew.
    """
    said = ours.says(rounds)
    other = None if theirs is None else theirs.says(rounds)[SAVED]
    found = {}
    for kind, which in by_temperature(rounds).items():
        part = rounds.select(which)
        if not len(part):
            continue
        its = {rule: one[which] for rule, one in said.items()}
        found[kind] = {
            "num_rounds": len(part),
            "num_prompts": len(torch.unique(part.prompts)),
            "accuracy": {rule: float((its[rule] == part.labels).float().mean()) for rule in RULES},
            "balanced_accuracy": {rule: balanced_accuracy(its[rule], part.labels) for rule in RULES},
            "gain_over_one_threshold": accuracy_gain(part, its[SAVED], its[ONE]),
        }
        if other is not None:
            found[kind]["gain_over_own_head"] = accuracy_gain(part, its[SAVED], other[which])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; return 2 for words that cannot be used."""
    parser = argparse.ArgumentParser(description="Length heads on prompts of another kind.")
    parser.add_argument("folders", type=Path, nargs="+", help="--out of train-head, two or more")
    parser.add_argument("--names", type=lambda text: text.split(","), help="of the folders, with commas between them")
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON")
    args = parser.parse_args(argv)
    names = args.names or [folder.name for folder in args.folders]
    origin = provenance(Path(__file__).parent)
    try:
        if len(args.folders) < 2 or len(set(names)) != len(args.folders):
            raise ConfigError(names, "two folders or more, each with a name of its own", "--names")
        sets = {name: Learned.read(folder) for name, folder in zip(names, args.folders, strict=True)}
        held_out = {
            ours: {
                theirs: compare(one, other.held_out, None if one is other else other) for theirs, other in sets.items()
            }
            for ours, one in sets.items()
        }
        whole = {
            ours: {theirs: compare(one, other.whole) for theirs, other in sets.items() if one is not other}
            for ours, one in sets.items()
        }
    except SpecBranchError as error:
        sys.stderr.write(f"head_transfer: {error}\n")
        return 2
    result = {"schema_version": SCHEMA_VERSION, **origin, "names": names, "held_out": held_out, "whole": whole}
    line = json.dumps(portable(result)) + "\n"
    args.out.write_text(line)
    sys.stdout.write(f"{as_text(result)}\n\n{line}")
    return 0


def as_text(result: Mapping[str, Any]) -> str:
    """A table per kind of rounds: what was learned on each set, asked about each."""
    names = result["names"]
    tables = []
    for kind in by_kind(result):
        rows = []
        for ours in names:
            for rule in RULES:
                cells = [_cell(result["held_out"][ours][theirs].get(kind), rule) for theirs in names]
                cells += [_cell(result["whole"][ours].get(theirs, {}).get(kind), rule) for theirs in names]
                rows.append([f"{ours}: {rule}", *cells])
        headers = [*(f"{name}, held out" for name in names), *(f"{name}, all rounds" for name in names)]
        tables.append(table([f"{kind} rounds: right (mean over the classes)", *headers], rows))
    return "\n\n".join(tables)


def by_kind(result: Mapping[str, Any]) -> list[str]:
    """Kinds of rounds that come up, in order."""
    cells = [cell for row in result["held_out"].values() for cell in row.values()]
    return [kind for kind in ("all", "greedy", "sampled") if any(kind in cell for cell in cells)]


def _cell(group: Mapping[str, Any] | None, rule: str) -> str:
    if group is None:
        return "-"
    return f"{group['accuracy'][rule]:.1%} ({group['balanced_accuracy'][rule]:.1%})"


if __name__ == "__main__":
    sys.exit(main())
