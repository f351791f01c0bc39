"""What each part of the draft side is worth: predicted by replays, and measured on engines under emulated devices.

`best_first` as it is, and with one thing taken away at a time. The prediction is a replay of the same prompts with the same draft
server code, less the same part, in virtual time; the measurement is a real engine whose forwards are stretched to the same times,
interleaved with the others. Their ratios to the whole need not be the same: a replay has neither threads nor messages nor vLLM's
own work. Also kept is where a step of each engine goes. Owns which parts, and its table. Runs offline on two cores:

    python benchmarks/bench_parts.py --out result.json
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode_conditions import parse_emulation
from benchmarks.decode_intervals import bootstrap
from benchmarks.decode_rows import Entry, Row
from benchmarks.decode_times import step_parts
from benchmarks.portable import portable
from benchmarks.replay import HOLDOUT, PROMPT_CHARACTERS, record
from benchmarks.replay_engine import times_of
from vllm_specbranch import weaken
from vllm_specbranch.draft_ablations import without
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure import running
from vllm_specbranch.prompts import read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.replay_study import Study
from vllm_specbranch.report import number, percent, table
from vllm_specbranch.shipped_pair import draft_path, target_path

SCHEMA_VERSION = 1
NUM_SPECULATIVE_TOKENS = 8
WHOLE = "best_first"


@dataclass
class Case:
    """Best_first less something.

    Attributes:
        settings: keys of `speculative_config` that take it away.
        without: or parts of the draft server that are taken away.
        predicted: speed in virtual time, relative to the whole.
    """

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    predicted: float = 1.0


def cases() -> list[Case]:
    """The whole first."""
    return [
        Case(WHOLE),
        Case("no replies during a draft step", without=("replies in flight",)),
        Case("all rows in every draft step", without=("row budget",)),
        Case("no calibration of the draft's confidence", without=("calibration",)),
        Case("no wait after a miss", {"on_miss": "go"}),
        Case("no branches inside the chunk", {"policy": "specbranch", "stop_rule": "none", "max_branches": 32}),
        Case("neither branches nor waits (pearl)", {"policy": "pearl"}),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        bench(args)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_parts: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def bench(args: argparse.Namespace) -> None:
    """Predict, measure, write table and JSON."""
    if not args.out.absolute().parent.is_dir():
        raise ConfigError(str(args.out), "a file in a folder that exists", "--out")
    emulation = parse_emulation(args.emulate, "--emulate")
    if emulation is None:
        raise ConfigError(args.emulate, "durations; nothing is predicted for the real devices", "--emulate")
    draft = weaken.cached(draft_path(), args.draft_noise).out if args.draft_noise else str(draft_path())
    found = cases()
    lineup = Lineup(
        target=str(target_path()),
        draft=draft,
        placement=place(available_cores(), len(gpus())),
        kv_cache_bytes=64 << 20,
        enforce_eager=args.enforce_eager,
        num_engines=len(found),
        observe=True,
    )
    origin = provenance(Path(__file__).parent)
    texts = [one.text[:PROMPT_CHARACTERS] for one in read_prompts(HOLDOUT, args.num_prompts)]
    _write("Recording the target's outputs, then replaying them ...\n")
    prompts, recordings = record(lineup, texts, args.max_tokens)
    study = Study.load(draft, lineup.dtype, recordings)
    times = times_of(emulation)
    speeds = []
    for case in found:
        with without(case.without):
            settings = {"policy": WHOLE, "num_speculative_tokens": NUM_SPECULATIVE_TOKENS, **case.settings}
            speeds.append(study.run(settings, times).tokens_per_s)
        case.predicted = speeds[-1] / speeds[0]
    rows = [Row(_entry(lineup, case)) for case in found]
    _write(f"Starting {len(rows)} engines ...\n")
    with running([row.entry.spec for row in rows], at_once=3) as engines:
        for repetition in range(args.repetitions + 1):
            for row, engine in zip(rows, engines, strict=True):
                run = engine.run(prompts, args.max_tokens, 1, emulation=emulation)
                if repetition:  # The first round is the warm-up.
                    row.runs.append(run)
            _write(f"Repetition {repetition} of {args.repetitions} done.\n" if repetition else "Warm.\n")
    lines = [_line(case, row, rows[0], args.seed) for case, row in zip(found, rows, strict=True)]
    _write("\n" + as_table(lines) + "\n")
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "options": vars(args),
        "runs_on": lineup.placement.describe(with_draft=True),
        "lines": lines,
    }
    args.out.write_text(json.dumps(portable(result)) + "\n")


def _entry(lineup: Lineup, case: Case) -> Entry:
    settings = {"policy": WHOLE, **case.settings}
    spec = lineup.specbranch(NUM_SPECULATIVE_TOKENS, case.name, **settings)
    spec = msgspec.structs.replace(spec, without=case.without)
    return Entry(spec, WHOLE, lineup.placement.describe(with_draft=True), 2)


def _line(case: Case, row: Row, whole: Row, seed: int) -> dict[str, Any]:
    ratios = row.ratios(whole)
    parts = step_parts(row)
    counters = [run.server_counters for run in row.runs]
    hits, rounds, kept, rollback = (
        sum(one[name] for one in counters)
        for name in ("num_hits", "num_rounds", "num_kept_tokens", "num_rollback_tokens")
    )
    return {
        "case": case.name,
        "settings": dict(case.settings),
        "without": list(case.without),
        "predicted": case.predicted,
        "measured": statistics.median(ratios),
        "interval": bootstrap(ratios, seed),
        "tokens_per_s": row.tokens_per_s,
        "hit_rate": hits / max(1.0, rounds),
        "rollback_rate": rollback / max(1.0, rollback + kept),
        "step_ms": parts.step_ms,
        "target_ms": parts.target_ms,
        "wait_ms": parts.draft_wait_ms,
        "propose_ms": parts.propose_ms,
        "rest_ms": parts.rest_ms,
        "num_overruns": sum(run.num_overruns for run in row.runs),
    }


def as_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One line per case: its speed relative to the whole, and where a step goes."""
    headers = ["", "predicted", "measured", "95%", "hits", "rollback", "step ms", "target", "wait", "proposer", "rest"]
    parts = ("step_ms", "target_ms", "wait_ms", "propose_ms", "rest_ms")
    return table(
        headers,
        [
            [
                line["case"],
                number(line["predicted"]),
                number(line["measured"]),
                "..".join(map(number, line["interval"])),
                percent(line["hit_rate"]),
                percent(line["rollback_rate"]),
                *(number(line[name]) for name in parts),
            ]
            for line in lines
        ],
    )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench_parts",
        description="What each part of the draft side is worth, predicted and measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--emulate", default="20:4", help="TARGET_MS:DRAFT_MS[:ROW_COST], durations of the forwards of both models")
    add("--draft-noise", type=float, default=0.0, help="weaken the draft by so much noise")
    add("--num-prompts", type=int, default=4, help="prompts of the shipped set")
    add("--max-tokens", type=int, default=64, help="new tokens per prompt")
    add("--repetitions", type=int, default=5, help="of every engine, after the warm-up")
    add("--enforce-eager", action="store_true", help="do not compile the models")
    add("--seed", type=int, default=0, help="of the intervals")
    return made


if __name__ == "__main__":
    sys.exit(main())
