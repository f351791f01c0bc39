"""Sampled requests: how often drafts are accepted by temperature and sampling method, and what `deterministic` costs.

Four engines that differ in two settings only, `draft_sample_method` and `deterministic`, are alive at once; each repetition goes
round all of them at every temperature, with new seeds. The acceptance figures to look at are those of the deterministic engines:
there the machine's speed has no part in them. Owns what is run and its table. Runs offline:

    python benchmarks/bench_sampling.py --out result.json
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.result_file import begin, finish, require_counts, say
from vllm_specbranch.deepen import cached
from vllm_specbranch.demo import EXTRA_LAYERS, MLP_SIZE
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure import running
from vllm_specbranch.measure_messages import RunResult
from vllm_specbranch.prompts import default_prompts_path, read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.report import table
from vllm_specbranch.shipped_pair import draft_path, target_path

SCHEMA_VERSION = 1
TEMPERATURES = (0.0, 0.5, 1.0, 1.5)


@dataclasses.dataclass
class Row:
    """One engine at one temperature, all repetitions."""

    method: str
    deterministic: bool
    temperature: float
    runs: list[RunResult] = dataclasses.field(default_factory=list)

    def _total(self, name: str) -> float:
        return sum(run.engine_counters[name] for run in self.runs)

    def figures(self) -> dict[str, float]:
        """Acceptance over all repetitions, the median speed and its range (tokens/s)."""
        speeds = [run.num_tokens / run.wall_s for run in self.runs]
        return {
            "acceptance_rate": self._total("num_accepted_tokens") / max(1.0, self._total("num_draft_tokens")),
            "mean_acceptance_length": 1 + self._total("num_accepted_tokens") / max(1.0, self._total("num_rounds")),
            "tokens_per_s": statistics.median(speeds),
            "least_tokens_per_s": min(speeds),
            "most_tokens_per_s": max(speeds),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        bench(args)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_sampling: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def bench(args: argparse.Namespace) -> None:
    """Run all rows, write table and JSON."""
    begin(args.out)
    options = ("num_prompts", "max_tokens", "batch_size", "repetitions")
    require_counts({"--" + name.replace("_", "-"): getattr(args, name) for name in options})
    prompts = read_prompts(default_prompts_path(), args.num_prompts)
    lineup = Lineup(
        target=str(cached(target_path(), EXTRA_LAYERS, MLP_SIZE).out),
        draft=str(draft_path()),
        placement=place(available_cores(), len(gpus()), None, None),
        max_num_seqs=args.batch_size,
        kv_cache_bytes=128 << 20,
        enforce_eager=args.enforce_eager,
        num_engines=4,
    )
    origin = provenance(Path(__file__).parent)
    kinds = [(method, fixed) for method in ("probabilistic", "greedy") for fixed in (False, True)]
    specs = [
        lineup.specbranch(
            8, f"{method}{' deterministic' if fixed else ''}", draft_sample_method=method, deterministic=fixed
        )
        for method, fixed in kinds
    ]
    rows = {(kind, temperature): Row(*kind, temperature) for kind in kinds for temperature in TEMPERATURES}
    say(f"Starting {len(specs)} engines.\n")
    with running(specs, at_once=2) as engines:
        token_ids = engines[0].encode([prompt.text for prompt in prompts])
        for repetition in range(args.repetitions + 1):
            for temperature in TEMPERATURES:
                for kind, engine in zip(kinds, engines, strict=True):
                    seed = None if temperature == 0.0 else 1000 * repetition
                    run = engine.run(token_ids, args.max_tokens, args.batch_size, temperature, seed)
                    if repetition:  # The first round is the warm-up.
                        rows[kind, temperature].runs.append(run)
            say(f"Repetition {repetition} of {args.repetitions} done.\n" if repetition else "Warm.\n")
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "options": vars(args),
        "runs_on": lineup.placement.describe(with_draft=True),
        "rows": [
            {"method": row.method, "deterministic": row.deterministic, "temperature": row.temperature, **row.figures()}
            for row in rows.values()
        ],
    }
    say("\n" + as_table(result["rows"]) + "\n")
    finish(result, args.out)


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per temperature: acceptance of both methods, and the speed that `deterministic` leaves."""
    found = {(row["method"], row["deterministic"], row["temperature"]): row for row in rows}
    lines = []
    for temperature in TEMPERATURES:
        drawn, greedy = (found[method, True, temperature] for method in ("probabilistic", "greedy"))
        free = found["probabilistic", False, temperature]
        lines.append(
            [
                f"{temperature:.1f}",
                f"{drawn['acceptance_rate']:.0%}",
                f"{greedy['acceptance_rate']:.0%}",
                f"{drawn['mean_acceptance_length']:.2f}",
                f"{greedy['mean_acceptance_length']:.2f}",
                f"{drawn['tokens_per_s'] / free['tokens_per_s']:.2f}x",
            ]
        )
    headers = [
        "temperature",
        "accepted, probabilistic",
        "accepted, greedy",
        "acceptance length, probabilistic",
        "acceptance length, greedy",
        "speed of deterministic",
    ]
    return table(headers, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Acceptance of sampled drafts, and the price of deterministic.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--num-prompts", type=int, default=12, help="prompts of the demo")
    add("--max-tokens", type=int, default=64, help="new tokens per prompt")
    add("--batch-size", type=int, default=1, help="requests at the same time")
    add("--repetitions", type=int, default=5, help="after the warm-up")
    add("--enforce-eager", action="store_true", help="do not compile the models")
    return parser


if __name__ == "__main__":
    sys.exit(main())
