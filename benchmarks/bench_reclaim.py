"""A KV cache that is too small: preemptions and speed, with and without `reclaim_blocks`.

Beside this project in both ways run plain vLLM and its `draft_model`. All engines are alive at once, each with the same few blocks
and 64 requests of growing contexts; repetitions go round all of them. Before that the same is counted without a model, for many
sizes of the pool (`reclaim_virtual`): a real run has too few preemptions to tell two ways apart. Owns what is run and its tables.
Runs offline:

    python benchmarks/bench_reclaim.py --out result.json
"""

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.portable import portable
from benchmarks.reclaim_virtual import WAYS, Load, VirtualScheduler, sweep
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure import running
from vllm_specbranch.measure_messages import EngineSpec, RunResult
from vllm_specbranch.prompts import read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.report import table
from vllm_specbranch.shipped_pair import draft_path, target_path

SCHEMA_VERSION = 1
PROMPTS = Path(__file__).resolve().parent / "prompts" / "python_holdout.json"
POOL_SHARES = (1.0, 0.9, 0.8, 0.6, 0.4)
ACCEPTANCES = (0.7, 0.4)
COUNTERS = ("num_reclaimed_blocks", "num_reclaims", "num_short_steps", "num_cut_draft_tokens")


@dataclasses.dataclass
class Row:
    """One engine, all repetitions."""

    spec: EngineSpec
    runs: list[RunResult] = dataclasses.field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Medians of preemptions and speed (tokens/s) with all values beside them, and what the scheduler counted."""
        speeds = [run.num_tokens / run.wall_s for run in self.runs]
        preemptions = [run.num_preemptions for run in self.runs]
        return {
            "name": self.spec.name,
            "tokens_per_s": statistics.median(speeds),
            "all_tokens_per_s": speeds,
            "num_preemptions": statistics.median(preemptions),
            "all_num_preemptions": preemptions,
            "num_steps": statistics.median(run.num_steps for run in self.runs),
            "mean_acceptance_length": statistics.median(
                1 + run.num_accepted_tokens / max(1, run.num_drafts) for run in self.runs
            ),
            **{name: statistics.median(run.engine_counters.get(name, 0.0) for run in self.runs) for name in COUNTERS},
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        bench(args)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_reclaim: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def bench(args: argparse.Namespace) -> None:
    """Count without a model, run all engines, write tables and JSON."""
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(str(args.out), "a file in a folder that exists", "--out")
    origin = provenance(Path(__file__).parent)
    lengths = tuple(20 + 37 * index % 161 for index in range(args.num_prompts))
    load = Load(lengths, args.max_tokens, args.gamma, args.block_size, args.batch_size, 0.0, args.pool_share)
    loads = [
        dataclasses.replace(load, acceptance=acceptance, pool_share=share)
        for acceptance in ACCEPTANCES
        for share in POOL_SHARES
    ]
    for one in [load, *loads]:
        most = (one.num_blocks - 1) * one.block_size - one.num_draft_tokens
        if max(lengths) + one.num_new_tokens > most:
            raise ConfigError(
                args.batch_size, "more, or fewer tokens: the longest request fits into no pool", "--batch-size"
            )
    virtual = list(sweep(VirtualScheduler(target_path(), draft_path()), loads, args.seeds)) if args.seeds else []
    if virtual:
        _write(virtual_table(virtual) + "\n\n")
    rows = [row.figures() for row in measure(args, load)] if args.repetitions else []
    if rows:
        _write(engine_table(rows) + "\n")
    result = {"schema_version": SCHEMA_VERSION, **origin, "options": vars(args), "num_blocks": load.num_blocks}
    line = json.dumps(portable({**result, "virtual": virtual, "rows": rows})) + "\n"
    args.out.write_text(line)
    _write("\n" + line)


def measure(args: argparse.Namespace, load: Load) -> list[Row]:
    """Run the real engines."""
    lineup = Lineup(
        target=str(target_path()),
        draft=str(draft_path()),
        placement=place(available_cores(), len(gpus()), None, None),
        max_model_len=load.num_new_tokens + max(load.prompt_lengths) + 64,
        max_num_seqs=args.batch_size,
        enforce_eager=args.enforce_eager,
        num_engines=4,
        arguments={"block_size": load.block_size, "num_gpu_blocks_override": load.num_blocks},
    )
    rows = [
        Row(lineup.plain()),
        Row(lineup.draft_model(args.gamma)),
        Row(lineup.specbranch(args.gamma, "specbranch, cut only", reclaim_blocks=False, policy=args.policy)),
        Row(lineup.specbranch(args.gamma, "specbranch, reclaim_blocks", policy=args.policy)),
    ]
    _write(f"Starting {len(rows)} engines with {load.num_blocks} blocks of {load.block_size} tokens each.\n")
    with running([row.spec for row in rows], at_once=2) as engines:
        texts = [prompt.text for prompt in read_prompts(PROMPTS)]
        known = engines[0].encode(texts)
        prompts = [_cut(known, index, length) for index, length in enumerate(load.prompt_lengths)]
        for repetition in range(args.repetitions + 1):
            # The first round is the warm-up, and short.
            num_new = load.num_new_tokens if repetition else 8
            for row, engine in zip(rows, engines, strict=True):
                run = engine.run(prompts, num_new, args.batch_size)
                if repetition:
                    row.runs.append(run)
            _write(f"Repetition {repetition} of {args.repetitions} done.\n" if repetition else "Warm.\n")
    return rows


def _cut(known: Sequence[list[int]], index: int, length: int) -> list[int]:
    """A prompt of a length: from the next file, a little further inside it each time round."""
    tokens = known[index % len(known)]
    start = min(97 * (index // len(known)), max(0, len(tokens) - length))
    return tokens[start : start + length]


def engine_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per engine."""
    headers = [
        "engine",
        "tokens/s",
        "preemptions",
        "blocks reclaimed",
        "draft tokens cut",
        "acceptance length",
        "steps",
    ]
    lines = [
        [
            row["name"],
            f"{row['tokens_per_s']:.0f} ({min(row['all_tokens_per_s']):.0f}..{max(row['all_tokens_per_s']):.0f})",
            f"{row['num_preemptions']:.0f} ({min(row['all_num_preemptions'])}..{max(row['all_num_preemptions'])})",
            f"{row['num_reclaimed_blocks']:.0f}",
            f"{row['num_cut_draft_tokens']:.0f}",
            f"{row['mean_acceptance_length']:.2f}",
            f"{row['num_steps']:.0f}",
        ]
        for row in rows
    ]
    return table(headers, lines)


def virtual_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per load: preemptions and computed tokens in each way."""
    headers = ["acceptance", "pool", *(f"preemptions, {way}" for way in WAYS)]
    headers += [f"blocks back, {way}" for way in ("reclaim", "both")]
    headers += [f"tokens cut, {way}" for way in ("cut", "both")] + [f"steps, {way}" for way in WAYS]
    lines = []
    for first in range(0, len(rows), len(WAYS)):
        ways = rows[first : first + len(WAYS)]
        lines.append(
            [
                f"{ways[0]['acceptance']:.1f}",
                f"{ways[0]['pool_share']:.0%}",
                *(f"{way['num_preemptions']:.1f}" for way in ways),
                *(f"{way['num_reclaimed_blocks']:.1f}" for way in ways if way["way"] in ("reclaim", "both")),
                *(f"{way['num_cut_draft_tokens']:.0f}" for way in ways if way["way"] in ("cut", "both")),
                *(f"{way['num_steps']:.0f}" for way in ways),
            ]
        )
    return table(headers, lines)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Preemptions and speed with a KV cache that is too small.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--num-prompts", type=int, default=96, help="requests in all, with prompts of 20 to 180 tokens")
    add("--max-tokens", type=int, default=160, help="new tokens per request")
    add("--batch-size", type=int, default=64, help="requests at the same time")
    add("--gamma", type=int, default=16, help="most draft tokens in a chunk")
    add("--block-size", type=int, default=32, help="tokens of a KV block")
    add("--pool-share", type=float, default=0.8, help="blocks, relative to what a full batch needs at its end")
    add("--policy", default="best_first", help="of this project")
    add("--repetitions", type=int, default=2, help="of the engines, after the warm-up; 0 for none")
    add("--seeds", type=int, default=5, help="of the count without a model; 0 for none")
    add("--enforce-eager", action="store_true", help="do not compile the models")
    return parser


if __name__ == "__main__":
    sys.exit(main())
