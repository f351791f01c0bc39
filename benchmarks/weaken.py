"""Make from a draft model a weaker one: a poorly aligned pair for benchmarks (see `vllm_specbranch.weaken`).

Owns the command line only. Runs on its own, offline:

    python benchmarks/weaken.py DRAFT --noise 0.35 --out DIR
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_specbranch.errors import ConfigError
from vllm_specbranch.shipped_pair import draft_path
from vllm_specbranch.weaken import WEAK_NOISE, weaken


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make a weaker draft model.")
    add = parser.add_argument
    add("source", type=Path, nargs="?", default=draft_path(), help="folder of a model (default: the shipped draft)")
    add("--noise", type=float, default=WEAK_NOISE, help="in standard deviations of each matrix (default %(default)s)")
    add("--out", type=Path, required=True, help="folder to write")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    return parser


def main(argv: Sequence[str] | None = None, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Run the command line; the last line written is the report as JSON. Returns 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        report = weaken(args.source, args.out, args.noise, args.seed)
    except ConfigError as error:
        sys.stderr.write(f"weaken: {error}\n")
        return 2
    write(json.dumps(dataclasses.asdict(report)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
