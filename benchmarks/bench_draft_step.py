"""What one more row costs in a draft step: it decides how many branches pay.

Loads the draft model alone, as the draft server does, and times decode steps by their number of rows and by how many candidates
each row returns. b = the time that one more row adds, relative to a step with one row: the slope of a straight line through the
medians. Rows with 1, 16 and 32 candidates show how much of it is the way of the best tokens into Python.

Owns what is timed and its table. Runs offline on one core:

    python benchmarks/bench_draft_step.py --out result.json
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.portable import portable
from vllm_specbranch.draft_model import DraftModel, DraftModelSettings, Row
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.kv_blocks import BlockCopy
from vllm_specbranch.provenance import provenance
from vllm_specbranch.report import number, table
from vllm_specbranch.shipped_pair import draft_path

SCHEMA_VERSION = 1
CONTEXT = 256
MAX_ROWS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        bench(args)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_draft_step: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def bench(args: argparse.Namespace) -> None:
    """Time all steps, write table and JSON."""
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(str(args.out), "a file in a folder that exists", "--out")
    for option, values in (("--rows", args.rows), ("--candidates", args.candidates)):
        if min(values) < 1 or max(values) > MAX_ROWS:
            raise ConfigError(values, f"whole numbers in 1..{MAX_ROWS}", option)
    if len(set(args.rows)) < 2:
        raise ConfigError(args.rows, "at least two numbers of rows, for a slope", "--rows")
    os.sched_setaffinity(0, {args.core})
    settings = DraftModelSettings(
        str(args.draft), 2 * CONTEXT, args.dtype, enforce_eager=args.enforce_eager, max_num_rows=MAX_ROWS
    )
    model = DraftModel.load(settings)
    steps: dict[str, Callable[[int], object]] = {
        f"{count} candidates": _step(model, count) for count in args.candidates
    }
    steps["a block copied per row"] = _step(model, min(args.candidates), copies=True)
    samples = _time(steps, args.rows, args.repetitions)
    lines = [_line(name, samples[name], args.rows) for name in steps]
    head = ["step", *(f"{count} rows, ms" for count in args.rows), "b"]
    sys.stdout.write(table(head, [[one["step"], *map(number, one["ms"]), f"{one['b']:.3f}"] for one in lines]) + "\n")
    result = {
        "schema_version": SCHEMA_VERSION,
        **provenance(Path(__file__).parent),
        "options": vars(args),
        "num_cores": 1,
        "lines": lines,
        "samples_ms": samples,
    }
    args.out.write_text(json.dumps(portable(result)) + "\n")


def _step(model: DraftModel, num_candidates: int, *, copies: bool = False) -> Callable[[int], object]:
    """A decode step: each row continues a context of its own length, as branches of a few requests do."""
    per_row = -(-CONTEXT // model.block_size) + 1
    if model.num_blocks < (MAX_ROWS + 1) * per_row:
        raise ConfigError(model.num_blocks, f"at least {(MAX_ROWS + 1) * per_row} KV blocks", "--draft")
    tables = [list(range(row * per_row, (row + 1) * per_row)) for row in range(MAX_ROWS + 1)]

    def run(num_rows: int) -> object:
        rows = [Row([row % model.vocab_size], CONTEXT - row, tables[row]) for row in range(num_rows)]
        forks = [BlockCopy(tables[-1][0], tables[row][0]) for row in range(num_rows)] if copies else []
        return model.forward(rows, forks, num_candidates)

    return run


def _time(
    steps: dict[str, Callable[[int], object]], rows: Sequence[int], repetitions: int
) -> dict[str, dict[int, list[float]]]:
    """Milliseconds by step and number of rows, interleaved; the first round is thrown away."""
    samples: dict[str, dict[int, list[float]]] = {name: {count: [] for count in rows} for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            for count in rows:
                step(count)
                started_s = time.perf_counter()
                step(count)
                if repetition:
                    samples[name][count].append(1e3 * (time.perf_counter() - started_s))
    return samples


def _line(name: str, samples: dict[int, list[float]], rows: Sequence[int]) -> dict[str, Any]:
    medians = [statistics.median(samples[count]) for count in rows]
    slope, _ = statistics.linear_regression(list(map(float, rows)), medians)
    first = medians[list(rows).index(min(rows))]
    return {"step": name, "ms": medians, "b": slope / first}


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="bench_draft_step", description=__doc__.partition("\n")[0])
    made.add_argument("--out", type=Path, required=True, help="file for the JSON")
    made.add_argument("--draft", type=Path, default=draft_path(), help="folder of the draft model")
    made.add_argument("--rows", type=_numbers, default=[1, 2, 4, 8, 16, 32], help="numbers of rows, with commas")
    made.add_argument("--candidates", type=_numbers, default=[1, 16, 32], help="candidates per row, with commas")
    made.add_argument("--repetitions", type=int, default=300, help="of every step")
    made.add_argument("--dtype", default="float32", help="of the draft model")
    made.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)), help="the core that it runs on")
    made.add_argument("--enforce-eager", action="store_true", help="do not compile the model")
    return made


if __name__ == "__main__":
    sys.exit(main())
