"""What a call of the length head costs: features of a batch in, classes out, on one core.

Owns the measurement alone; what a head is, is in `vllm_specbranch.length_head`. Blocks of calls of all batch sizes take turns.
Beside the times stands what the machine could do at most: the multiplications of a call at the rate of a large matrix product.
Runs offline, without any engine:

    python benchmarks/bench_head_call.py --out result.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.portable import portable
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.length_head import HIDDEN_SIZES, NUM_CLASSES, load_head
from vllm_specbranch.provenance import provenance
from vllm_specbranch.report import table
from vllm_specbranch.shipped_pair import head_path

SCHEMA_VERSION = 1
BATCH_SIZES = (1, 4, 16, 64)
CALLS_PER_BLOCK = 100
# Of the product that says how fast the core is.
LARGE = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; return 2 for words that cannot be used."""
    parser = argparse.ArgumentParser(description="What a call of the length head costs.")
    parser.add_argument("--out", type=Path, required=True, help="file for the JSON")
    parser.add_argument("--head", type=Path, default=head_path(), help="folder of the head (default: the shipped one)")
    parser.add_argument("--num-blocks", type=int, default=30, help="blocks of 100 calls for each size (default 30)")
    args = parser.parse_args(argv)
    try:
        if not args.out.absolute().parent.is_dir():
            raise ConfigError(str(args.out), "a file in a folder that exists", "--out")
        result = measure(args.head, args.num_blocks)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_head_call: {error}\n")
        return 2
    line = json.dumps(portable({**result, "options": vars(args)})) + "\n"
    args.out.write_text(line)
    sys.stdout.write(f"{as_text(result)}\n\n{line}")
    return 0


def measure(folder: Path, num_blocks: int) -> dict[str, Any]:
    """Time calls of a head.

    Args:
        folder: of the head.

    Returns:
        For JSON; `rows` by batch size, `block_ms` being the mean time of a call in each block.
    """
    origin = provenance(Path(__file__).parent)
    head, spec = load_head(folder)
    # As in an engine whose target has one core.
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    inputs = {size: torch.randn(size, spec.num_features, generator=generator) for size in BATCH_SIZES}
    blocks: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    for _ in range(num_blocks + 1):
        for size, features in inputs.items():
            blocks[size].append(_mean_ms(partial(head.classes, features), CALLS_PER_BLOCK))
    left, right = (torch.randn(LARGE, LARGE, generator=generator) for _ in range(2))
    rate = 2 * LARGE**3 / min(_mean_ms(lambda: left @ right, 1) for _ in range(10))
    first, second = HIDDEN_SIZES
    work = 2 * (spec.num_features * first + first * second + second * NUM_CLASSES)
    rows = [
        {
            "batch_size": size,
            # The first block warms up.
            "median_ms": statistics.median(found[1:]),
            "block_ms": found[1:],
            "least_ms_by_rate": size * work / rate,
        }
        for size, found in blocks.items()
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "seed": 0,
        "num_features": spec.num_features,
        "operations_per_s": 1e3 * rate,
        "rows": rows,
    }


def _mean_ms(call: Callable[[], object], num_calls: int) -> float:
    started_s = time.perf_counter()
    for _ in range(num_calls):
        call()
    return 1e3 * (time.perf_counter() - started_s) / num_calls


def as_text(result: dict[str, Any]) -> str:
    """A line per batch size."""
    lines = [
        [
            str(row["batch_size"]),
            f"{row['median_ms']:.3f} ({min(row['block_ms']):.3f}..{max(row['block_ms']):.3f})",
            f"{row['least_ms_by_rate']:.3f}",
        ]
        for row in result["rows"]
    ]
    headers = ["batch size", "ms a call (blocks of 100)", "ms at the rate of a large product"]
    return f"A head of {result['num_features']} features, one core:\n" + table(headers, lines)


if __name__ == "__main__":
    sys.exit(main())
