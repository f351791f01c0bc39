"""Make from a Llama-architecture model a heavier one that computes the same function (see `vllm_specbranch.deepen`).

Owns the command line only. Runs on its own, offline:

    python benchmarks/deepen.py SOURCE --layers 6 --mlp 2816 --out DIR
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_specbranch.deepen import check, deepen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a heavier model of the same function.")
    parser.add_argument("source", type=Path, help="folder of a Llama-architecture model")
    parser.add_argument("--layers", type=int, default=0, help="layers to add (default 0)")
    parser.add_argument(
        "--mlp", type=int, default=None, help="MLP neurons per layer of the result (default: as the source)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    parser.add_argument(
        "--no-check", action="store_true", help="do not compare logits (needs both models in float32 in memory)"
    )
    return parser


def main(argv: Sequence[str] | None = None, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Run the command line; the last line written is the report as JSON. Returns 1 when the check failed."""
    args = _parser().parse_args(argv)
    report = deepen(args.source, args.out, args.layers, args.mlp, args.seed)
    if not args.no_check:
        report = check(report, args.seed)
    write(json.dumps(dataclasses.asdict(report)) + "\n")
    return 1 if report.same_argmax is False else 0


if __name__ == "__main__":
    sys.exit(main())
