"""What one more row costs in a draft step: it decides how many branches pay.

Loads the draft model alone, as the draft server does, and times decode steps by their number of rows and by how many candidates
each row returns. b = the time that one more row adds, relative to a step with one row: the slope of a straight line through the
medians, once through those of at most 16 rows and once through all. Rows with 1, 16 and 32 candidates show how much of it is the
way of the best tokens into Python.

Owns what is timed and its table. Runs offline on one core:

    python benchmarks/bench_draft_step.py --out result.json
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.result_file import begin, finish, require_counts, say
from vllm_specbranch.draft_model import DraftModel, DraftModelSettings, Row
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.kv_blocks import BlockCopy
from vllm_specbranch.lineup import require_model
from vllm_specbranch.provenance import provenance
from vllm_specbranch.report import number, table
from vllm_specbranch.shipped_pair import draft_path

SCHEMA_VERSION = 2
CONTEXT = 256
MAX_ROWS = 64
# Up to so many rows a further one should cost little; steps with more are rare.
USUAL_ROWS = 16


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
    begin(args.out)
    require_counts({"--repetitions": args.repetitions})
    available = os.sched_getaffinity(0)
    if args.core not in available:
        raise ConfigError(args.core, f"one of the cores {sorted(available)}", "--core")
    draft = require_model(args.draft, "--draft")
    for option, values in (("--rows", args.rows), ("--candidates", args.candidates)):
        if not values or min(values) < 1 or max(values) > MAX_ROWS:
            raise ConfigError(values, f"whole numbers in 1..{MAX_ROWS}", option)
    if len(set(args.rows)) < 2:
        raise ConfigError(args.rows, "at least two numbers of rows, for a slope", "--rows")
    os.sched_setaffinity(0, {args.core})
    settings = DraftModelSettings(
        str(draft), 2 * CONTEXT, args.dtype, enforce_eager=args.enforce_eager, max_num_rows=MAX_ROWS
    )
    model = DraftModel.load(settings)
    steps: dict[str, Callable[[int], object]] = {
        f"{count} candidates": _step(model, count) for count in args.candidates
    }
    steps["a block copied per row"] = _step(model, min(args.candidates), copies=True)
    samples = _time(steps, args.rows, args.repetitions)
    lines = [_line(name, samples[name], args.rows) for name in steps]
    say(as_table(lines, args.rows) + "\n" + describe(args) + "\n")
    result = {
        "schema_version": SCHEMA_VERSION,
        **provenance(Path(__file__).parent),
        "options": vars(args),
        "num_cores": 1,
        "context_tokens": CONTEXT,
        "lines": lines,
        "samples_ms": samples,
    }
    finish(result, args.out)


def as_table(lines: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> str:
    """A line per kind of step."""
    head = [
        "step",
        *(f"{count} rows, ms" for count in rows),
        f"b, up to {USUAL_ROWS} rows",
        f"b, up to {max(rows)} rows",
    ]
    cells = [
        [one["step"], *map(number, one["ms"]), number(one["b"], 3), number(one["b_of_all_rows"], 3)] for one in lines
    ]
    return table(head, cells)


def describe(args: argparse.Namespace) -> str:
    """With what options it was timed."""
    how = "not compiled" if args.enforce_eager else "compiled"
    return (
        f"Draft model {args.draft.name}, {args.dtype}, {how}, on core {args.core} alone; contexts of {CONTEXT} tokens and fewer; "
        f"medians of {args.repetitions} steps.\nb: what a further row costs, relative to a step with {min(args.rows)}."
    )


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


def _line(name: str, samples: Mapping[int, Sequence[float]], rows: Sequence[int]) -> dict[str, Any]:
    medians = {count: statistics.median(samples[count]) for count in rows}
    usual = {count: ms for count, ms in medians.items() if count <= USUAL_ROWS}
    return {"step": name, "ms": list(medians.values()), "b": slope(usual), "b_of_all_rows": slope(medians)}


def slope(times_ms: Mapping[int, float]) -> float | None:
    """What a further row costs, relative to the fewest that were timed; None for fewer than two numbers of rows."""
    if len(times_ms) < 2:
        return None
    per_row, _ = statistics.linear_regression(list(map(float, times_ms)), list(times_ms.values()))
    return per_row / times_ms[min(times_ms)]


def _numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench_draft_step",
        description="What one more row costs in a draft step: it decides how many branches pay.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
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
