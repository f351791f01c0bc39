"""Decoding speed of plain vLLM, its own `draft_model`, `pearl` and `specbranch`, all in one run.

Every row is an engine in a process of its own; all are alive at once, and each repetition goes round all of them in a
new order, so that a busy moment of the machine hits none in particular. Each engine is warmed up first, and that run is
left out. Target and draft have a core each (`pearl`, `specbranch`); plain and `draft_model` run on the target's core, and
again on both cores.

Owns what is run; `decode_report` owns what is written: a table, then all results as one line of JSON, which is also what
`--out` gets. Runs offline:

    python benchmarks/bench_decode.py --out result.json
"""

import argparse
import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from vllm_specbranch.compare import first_differences, transformers_gaps, with_gaps
from vllm_specbranch.config import parse_cores
from vllm_specbranch.deepen import cached
from vllm_specbranch.demo import EXTRA_LAYERS, MLP_SIZE
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.lineup import Lineup, Placement, place, require_model
from vllm_specbranch.measure import Engine, running
from vllm_specbranch.prompts import default_prompts_path, read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.shipped_pair import draft_path, target_path

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode_report import SEQUENTIAL, Row, model_times, notes, row_as_json, rows_as_table

SCHEMA_VERSION = 1
BASELINE = "plain"
NUM_STARTING = 3
NUM_WARM_UP_PROMPTS = 2
# What an engine takes beside weights and KV cache (measured, as proportional set size); its draft server takes less.
ENGINE_BYTES = 700 << 20

Write = Callable[[str], object]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a token id differs other than at a tie, 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        return bench(args, _write)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_decode: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def bench(args: argparse.Namespace, write: Write) -> int:
    """Run all rows, write table and JSON."""
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(str(args.out), "a file in a folder that exists", "--out")
    prompts = read_prompts(args.prompts or default_prompts_path(), args.num_prompts)
    lineup = _lineup(args)
    rows = _rows(args, lineup)
    _check_memory(rows)
    origin = provenance(Path(__file__).parent)
    write(f"Starting {len(rows)} engines, {NUM_STARTING} at a time.\n")
    with running([row.spec for row in rows], _Progress(write), NUM_STARTING) as engines:
        token_ids = engines[0].encode([prompt.text for prompt in prompts])
        _check_lengths(token_ids, args)
        for repetition in _repeat(args, rows, engines, token_ids):
            write(f"Repetition {repetition} of {args.repetitions} done.\n")
    _compare(rows, token_ids, lineup.target)
    times = model_times(rows, args.batch_size)
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "seed": args.seed,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "device": "gpu" if lineup.placement.target_device is not None else "cpu",
        "target": lineup.target,
        "draft": lineup.draft,
        "prompts": [prompt.name for prompt in prompts],
        "prompt_tokens": [len(one) for one in token_ids],
        "baseline": BASELINE,
        "model_times": dataclasses.asdict(times),
        "rows": [row_as_json(row, rows[0]) for row in rows],
    }
    write("\n" + rows_as_table(rows) + "\n\n" + notes(rows, times) + "\n")
    line = json.dumps(result)
    args.out.write_text(line + "\n")
    write(line + "\n")
    return 0 if all(one.is_tie for row in rows for one in row.differences) else 1


def _lineup(args: argparse.Namespace) -> Lineup:
    target, draft = require_model(args.target, "--target"), require_model(args.draft, "--draft")
    if args.target_layers or args.target_mlp:
        target = Path(cached(target, args.target_layers, args.target_mlp or None).out)
    if args.draft_layers or args.draft_mlp:
        draft = Path(cached(draft, args.draft_layers, args.draft_mlp or None).out)
    return Lineup(
        target=str(target),
        draft=str(draft),
        placement=place(available_cores(), len(gpus()), args.target_cores, args.draft_cores),
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=args.batch_size,
        kv_cache_bytes=args.kv_cache_mib << 20,
        enforce_eager=args.enforce_eager,
        seed=args.seed,
        num_engines=1 + len(args.gammas) + 2 * len(args.policies),
    )


def _rows(args: argparse.Namespace, lineup: Lineup) -> list[Row]:
    """All rows, the baseline first."""
    places = lineup.placement
    all_cores = tuple(sorted({*places.target_cores, *places.draft_cores}))
    rows = []
    for cores in dict.fromkeys((places.target_cores, all_cores)):
        is_wide = cores != places.target_cores
        suffix = f" on {len(cores)} cores" if is_wide else ""
        runs_on = Placement(cores, (), places.target_device).describe(with_draft=False)
        rows.append(Row(lineup.plain(BASELINE + suffix, cores), runs_on, is_wide))
        for gamma in args.gammas:
            spec = lineup.draft_model(gamma, f"{SEQUENTIAL} {gamma}{suffix}", cores)
            rows.append(Row(spec, runs_on, is_wide))
    for policy in args.policies:
        # Keys that are a matter of one policy only are given to that one.
        settings = args.settings.get(policy, {})
        spec = lineup.specbranch(args.num_speculative_tokens, policy, policy=policy, **settings)
        rows.append(Row(spec, places.describe(with_draft=True)))
    return rows


def _check_memory(rows: Sequence[Row]) -> None:
    """Refuse what would make the machine swap, or end engines in the middle of a run."""
    if rows[0].spec.visible_devices is not None:
        return
    weights = sum(file.stat().st_size for file in Path(rows[0].spec.model).glob("*.safetensors"))
    # Weights may be stored in 16 bits and loaded in 32.
    needed = len(rows) * (ENGINE_BYTES + rows[0].spec.kv_cache_bytes + 2 * weights)
    free = psutil.virtual_memory().available
    if needed > free:
        missing = f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free"
        raise ConfigError(len(rows), f"fewer engines: {missing} (see --gammas, --kv-cache-mib)", "number of engines")


def _check_lengths(token_ids: Sequence[Sequence[int]], args: argparse.Namespace) -> None:
    longest = max(map(len, token_ids))
    if longest + args.max_tokens > args.max_model_len:
        raise ConfigError(longest, f"prompts of at most {args.max_model_len - args.max_tokens} tokens", "--prompts")


def _repeat(
    args: argparse.Namespace, rows: Sequence[Row], engines: Sequence[Engine], token_ids: Sequence[Sequence[int]]
) -> Iterator[int]:
    """Warm up, then go round; yields the number of each finished repetition. Mutates: rows."""
    for row, engine in zip(rows, engines, strict=True):
        row.facts = engine.facts
        engine.run(token_ids[: max(NUM_WARM_UP_PROMPTS, args.batch_size)], args.max_tokens, args.batch_size)
    order = list(zip(rows, engines, strict=True))
    shuffler = random.Random(args.seed)
    for repetition in range(1, args.repetitions + 1):
        shuffler.shuffle(order)
        for row, engine in order:
            row.runs.append(engine.run(token_ids, args.max_tokens, args.batch_size))
        yield repetition


def _compare(rows: Sequence[Row], token_ids: Sequence[Sequence[int]], target: str) -> None:
    """Compare every repetition of every row with the first one of the baseline. Mutates: rows."""
    expected = [request.token_ids for request in rows[0].runs[0].requests]
    gap_of = transformers_gaps(target)
    for row in rows:
        outputs = [[request.token_ids for request in run.requests] for run in row.runs]
        found = dict.fromkeys(one for got in outputs for one in first_differences(row.name, expected, got))
        row.differences = with_gaps(list(found), token_ids, expected, gap_of)


class _Progress:
    """A line whenever one more engine is ready."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._told: set[str] = set()

    def __call__(self, engines: Sequence[Engine]) -> None:
        for engine in engines:
            if engine.is_ready and engine.spec.name not in self._told:
                self._told.add(engine.spec.name)
                self._write(f"  {engine.spec.name}: ready after {engine.facts['load_s']:.0f} s\n")


# --- words -----------------------------------------------------------------------------------------------------------


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _cores(text: str) -> tuple[int, ...]:
    return parse_cores(text, "cores")


def _settings(text: str) -> dict[str, dict[str, Any]]:
    parsed = json.loads(text)
    if not isinstance(parsed, dict) or not all(isinstance(one, dict) for one in parsed.values()):
        raise argparse.ArgumentTypeError('allowed: JSON such as {"specbranch": {"stop_threshold": 0.1}}')
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Decoding speed of plain vLLM, draft_model, pearl and specbranch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--target", type=Path, default=target_path(), help="folder of the target model")
    add("--draft", type=Path, default=draft_path(), help="folder of the draft model")
    add(
        "--target-layers", type=int, default=EXTRA_LAYERS, help="layers to add to the target (same function, more cost)"
    )
    add("--target-mlp", type=int, default=MLP_SIZE, help="MLP neurons of the target; 0 leaves them as they are")
    add("--draft-layers", type=int, default=0, help="layers to add to the draft")
    add("--draft-mlp", type=int, default=0, help="MLP neurons of the draft; 0 leaves them as they are")
    add("--prompts", type=Path, help="file of prompts; those of the demo if not given")
    add("--num-prompts", type=int, default=12, help="use the first so many")
    add("--max-tokens", type=int, default=96, help="new tokens per prompt")
    add("--batch-size", type=int, default=1, help="requests at the same time")
    add("--repetitions", type=int, default=5, help="of every row, after the warm-up")
    add("--gammas", type=_numbers, default=[2, 3, 4, 6, 8], help="draft tokens of draft_model")
    add("--num-speculative-tokens", type=int, default=8, help="of our policies")
    add("--policies", type=_words, default=["pearl", "specbranch"], help="of ours")
    add("--settings", type=_settings, default={}, help="more keys of speculative_config, by policy, as JSON")
    add("--target-cores", type=_cores, help="the first core if not given")
    add("--draft-cores", type=_cores, help="the next core if not given")
    add("--dtype", default="float32", help="of both models")
    add("--max-model-len", type=int, default=512, help="longest prompt and output together")
    add("--kv-cache-mib", type=int, default=128, help="of each target")
    add("--seed", type=int, default=0, help="of the engines and of the order of rows")
    add("--enforce-eager", action="store_true", help="do not compile the models")
    return parser


if __name__ == "__main__":
    sys.exit(main())
