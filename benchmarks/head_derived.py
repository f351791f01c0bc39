"""A report of `train-head` from before figures were told by temperature, in the form of today; nothing is measured or trained anew.

What follows from its counts is worked out again: the head as saved beside its likeliest class, and for all rounds together the
rules on confidence with the thresholds of each temperature, whose counts of right rounds add up. What would need the rounds
themselves (intervals over prompts of these sums) is left out. The result says so under `derived`.

    python benchmarks/head_derived.py OLD.json --out head.json
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MAJORITY, ONE, TWO = "the most frequent class", "confidence, one threshold", "confidence, two thresholds"
LIKELIEST, SAVED = "the head, likeliest class", "the head as saved"
_NAMES = {"the head": LIKELIEST, "the head as it is saved": SAVED}
NOTE = (
    "Worked out by head_derived.py from the counts of the run named here: names of rules, thresholds of each temperature in the "
    "group of all rounds, gains without an interval (null), best_without, miss_cost; the verdict's words and rollback."
)


def derive(report: Mapping[str, Any]) -> dict[str, Any]:
    """The same report in today's form.

    Args:
        report: with `figures.groups` of `all`, `greedy` and `sampled`.
    """
    found = copy.deepcopy(dict(report))
    figures = found["figures"]
    figures["thresholds"] = {
        kind: {name: figures["groups"][kind][name] for name in ("epsilon", "bounds")} for kind in ("greedy", "sampled")
    }
    figures["miss_cost"] = figures["dear_misses"][0]["miss_cost"]
    groups = figures["groups"]
    for group in groups.values():
        for name in ("accuracy", "balanced_accuracy", "confusion"):
            group[name] = {_NAMES.get(rule, rule): value for rule, value in group[name].items()}
        del group["epsilon"], group["bounds"]
    whole = groups["all"]
    for rule in (ONE, TWO):
        parts = [groups[kind]["confusion"][rule] for kind in ("greedy", "sampled")]
        matrix = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)]
        right = [row[label] for label, row in enumerate(matrix)]
        whole["confusion"][rule] = matrix
        whole["accuracy"][rule] = sum(right) / whole["num_rounds"]
        shares = [count / sum(row) for count, row in zip(right, matrix, strict=True) if sum(row)]
        whole["balanced_accuracy"][rule] = sum(shares) / len(shares)
    for kind, group in groups.items():
        known = group.pop("head_gains")
        group["gains"] = {head: _gains(group["accuracy"], head) for head in (LIKELIEST, SAVED)}
        # Their intervals were told; those of all rounds together were for other thresholds.
        group["gains"][LIKELIEST] |= {rule: gain for rule, gain in known.items() if kind != "all" or rule == MAJORITY}
    for speeds in figures["speeds"]:
        rules = speeds["rules"]
        speeds["best_without"] = max(("no cut", "confidence"), key=lambda name, rules=rules: rules[name]["speed"])
    found["derived"] = NOTE
    return found


def _gains(accuracy: Mapping[str, float], head: str) -> dict[str, list[float | None]]:
    return {rule: [accuracy[head] - accuracy[rule], None, None] for rule in (MAJORITY, ONE, TWO)}


def main(argv: Sequence[str] | None = None) -> int:
    """Work it out and write it."""
    parser = argparse.ArgumentParser(description="An old report of train-head in the form of today.")
    parser.add_argument("report", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON")
    args = parser.parse_args(argv)
    args.out.write_text(json.dumps(derive(json.loads(args.report.read_text()))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
