"""What each part of the draft side is worth: predicted by replays, and measured on engines under emulated devices.

`best_first` as it is, and with one thing taken away at a time; and plain vLLM, for scale. The prediction is a replay of the same
prompts with the same draft server code, less the same part, in virtual time; the measurement is a real engine whose forwards are
stretched to the same times, interleaved with the others in a new order each time. Their ratios to the whole need not be the same: a
replay has neither threads nor messages nor vLLM's own work. Also kept is where a step of each engine goes, how many of its forwards
took too long for their emulation, and whether its token ids are those of plain vLLM. Owns which parts, and its table. Runs offline
on two cores:

    python benchmarks/bench_parts.py --out result.json
"""

import argparse
import random
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
from benchmarks.decode_report import MOST_OVERRUNS
from benchmarks.decode_rows import BASELINE, Entry, Row
from benchmarks.decode_times import overrun_share, step_parts
from benchmarks.replay import HOLDOUT, PROMPT_CHARACTERS, record
from benchmarks.replay_engine import times_of
from benchmarks.result_file import begin, finish, require_counts, say
from vllm_specbranch import setting_values, weaken
from vllm_specbranch.compare import GapOf, as_json, first_differences, transformers_gaps, with_gaps
from vllm_specbranch.draft_ablations import without
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.lineup import Lineup, place, require_model
from vllm_specbranch.measure import Engine, running
from vllm_specbranch.measure_messages import Emulation
from vllm_specbranch.metrics import rates
from vllm_specbranch.prompts import read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.replay import Recording, Times
from vllm_specbranch.replay_study import Study
from vllm_specbranch.report import number, percent, table
from vllm_specbranch.shipped_pair import draft_path, target_path

SCHEMA_VERSION = 2
NUM_SPECULATIVE_TOKENS = 8
WHOLE = "best_first"


@dataclass
class Case:
    """Best_first less something.

    Attributes:
        settings: keys of `speculative_config` that take it away; None for plain vLLM.
        without: or parts of the draft server that are taken away.
        predicted: speed in virtual time, relative to the whole.
    """

    name: str
    settings: Mapping[str, object] | None = field(default_factory=dict)
    without: tuple[str, ...] = ()
    predicted: float = 1.0

    def entry(self, lineup: Lineup) -> Entry:
        """Its engine."""
        if self.settings is None:
            return Entry(lineup.plain(self.name), BASELINE, lineup.placement.describe(with_draft=False), 1)
        settings = {"policy": WHOLE, **self.settings}
        spec = lineup.specbranch(NUM_SPECULATIVE_TOKENS, self.name, **settings)
        spec = msgspec.structs.replace(spec, without=self.without)
        return Entry(spec, WHOLE, lineup.placement.describe(with_draft=True), 2)


def cases() -> list[Case]:
    """The whole first, plain vLLM last."""
    return [
        Case(WHOLE),
        Case("no replies during a draft step", without=("replies in flight",)),
        Case("all rows in every draft step", without=("row budget",)),
        Case("no calibration of the draft's confidence", without=("calibration",)),
        Case("no wait after a miss", {"on_miss": "go"}),
        Case("no branches inside the chunk", {"policy": "specbranch", "stop_rule": "none", "max_branches": 32}),
        Case("neither branches nor waits (pearl)", {"policy": "pearl"}),
        Case("plain vLLM", None),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a token id differs other than at a tie, 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        return bench(args)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_parts: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def bench(args: argparse.Namespace) -> int:
    """Predict, measure, write table and JSON."""
    begin(args.out)
    options = ("num_prompts", "max_tokens", "repetitions")
    require_counts({"--" + name.replace("_", "-"): getattr(args, name) for name in options})
    emulation = parse_emulation(args.emulate, "--emulate")
    if emulation is None:
        raise ConfigError(args.emulate, "durations; nothing is predicted for the real devices", "--emulate")
    found = cases()
    lineup = _lineup(args, len(found))
    origin = provenance(Path(__file__).parent)
    texts = [one.text[:PROMPT_CHARACTERS] for one in read_prompts(args.prompts, args.num_prompts)]
    say("Recording the target's outputs, then replaying them ...\n")
    prompts, recordings = record(lineup, texts, args.max_tokens)
    predict(found, Study.load(lineup.draft, lineup.dtype, recordings), times_of(emulation))
    rows = [Row(case.entry(lineup)) for case in found]
    say(f"Starting {len(rows)} engines ...\n")
    with running([row.entry.spec for row in rows], at_once=3) as engines:
        measure(args, rows, engines, prompts, emulation)
    compare(rows, recordings, transformers_gaps(lineup.target))
    lines = [_line(case, row, rows[0], emulation, args.seed) for case, row in zip(found, rows, strict=True)]
    say("\n" + as_table(lines) + "\n" + notes(lines))
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "seed": args.seed,
        "options": vars(args),
        "target": lineup.target,
        "draft": lineup.draft,
        "runs_on": lineup.placement.describe(with_draft=True),
        "emulation": emulation,
        "prompt_tokens": [len(one) for one in prompts],
        "lines": lines,
    }
    finish(result, args.out)
    return 0 if all(one.is_tie for row in rows for one in row.differences) else 1


def _lineup(args: argparse.Namespace, num_engines: int) -> Lineup:
    target, draft = require_model(args.target, "--target"), require_model(args.draft, "--draft")
    cores = {
        option: setting_values.cores(given, option) if given else None
        for option, given in (("--target-cores", args.target_cores), ("--draft-cores", args.draft_cores))
    }
    return Lineup(
        target=str(target),
        draft=str(weaken.weakened(draft, args.draft_noise)),
        placement=place(available_cores(), len(gpus()), *cores.values()),
        dtype=args.dtype,
        kv_cache_bytes=64 << 20,
        enforce_eager=args.enforce_eager,
        seed=args.seed,
        num_engines=num_engines,
        observe=True,
    )


def predict(found: Sequence[Case], study: Study, times: Times) -> None:
    """Replay each case. Mutates: found."""
    speeds = []
    for case in found:
        with without(case.without):
            settings = {"policy": WHOLE, "num_speculative_tokens": NUM_SPECULATIVE_TOKENS, **(case.settings or {})}
            replayed = study.plain(times) if case.settings is None else study.run(settings, times)
        speeds.append(replayed.tokens_per_s)
        case.predicted = speeds[-1] / speeds[0]


def measure(
    args: argparse.Namespace,
    rows: Sequence[Row],
    engines: Sequence[Engine],
    prompts: Sequence[Sequence[int]],
    emulation: Emulation,
) -> None:
    """Warm up, then repeat; in each repetition all engines have their turn, in a new order. Mutates: rows."""
    shuffler = random.Random(args.seed)
    pairs = list(zip(rows, engines, strict=True))
    for repetition in range(args.repetitions + 1):
        for row, engine in shuffler.sample(pairs, len(pairs)):
            run = engine.run(prompts, args.max_tokens, 1, emulation=emulation)
            if repetition:  # The first round is the warm-up.
                row.runs.append(run)
        say(f"Repetition {repetition} of {args.repetitions} done.\n" if repetition else "Warm.\n")


def compare(rows: Sequence[Row], recordings: Sequence[Recording], gap_of: GapOf) -> None:
    """Compare every repetition of every engine with what plain vLLM wrote before. Mutates: rows."""
    expected = [one.tokens[: one.num_tokens] for one in recordings]
    prompts = [one.prompt for one in recordings]
    for row in rows:
        outputs = [[request.token_ids for request in run.requests] for run in row.runs]
        found = dict.fromkeys(one for got in outputs for one in first_differences(row.name, expected, got))
        row.differences = with_gaps(list(found), prompts, expected, gap_of)


def _line(case: Case, row: Row, whole: Row, emulation: Emulation, seed: int) -> dict[str, Any]:
    ratios = row.ratios(whole)
    parts = step_parts(row)
    counters = [run.server_counters for run in row.runs if run.server_counters]
    total = {name: sum(one[name] for one in counters) for name in (counters[0] if counters else ())}
    shares = rates({}, total)
    return {
        "case": case.name,
        "settings": None if case.settings is None else dict(case.settings),
        "without": list(case.without),
        "predicted": case.predicted,
        "measured": statistics.median(ratios),
        "interval": bootstrap(ratios, seed),
        "tokens_per_s": row.tokens_per_s,
        "whole_run_tokens_per_s": row.whole_run_tokens_per_s,
        "hit_rate": shares["hit_rate"] if counters else None,
        "rollback_rate": shares["rollback_rate"] if counters else None,
        "step_ms": parts.step_ms,
        "target_ms": parts.target_ms,
        "wait_ms": parts.draft_wait_ms,
        "messages_ms": parts.messages_ms,
        "propose_ms": parts.propose_ms,
        "rest_ms": parts.rest_ms,
        "num_overruns": sum(run.num_overruns for run in row.runs),
        "overrun_share": overrun_share(row, emulation),
        "token_ids": row.sameness,
        "differences": as_json(row.differences),
    }


def as_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """One line per case: its speed relative to the whole, and where a step goes."""
    headers = ["", "predicted", "measured", "95%", "hits", "rollback", "step ms", "target", "wait"]
    headers += ["messages", "proposer", "rest", "overruns", "token ids"]
    parts = ("step_ms", "target_ms", "wait_ms", "messages_ms", "propose_ms", "rest_ms")
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
                percent(line["overrun_share"]),
                line["token_ids"],
            ]
            for line in lines
        ],
    )


def notes(lines: Sequence[Mapping[str, Any]]) -> str:
    """What to know before believing the table."""
    text = "Speeds are those of steady decoding relative to the whole; a step's parts are of whole runs, with their prefills.\n"
    late = [line["case"] for line in lines if line["overrun_share"] > MOST_OVERRUNS]
    if late:
        text += (
            f"Of the forwards in {', '.join(late)} more than {MOST_OVERRUNS:.0%} took longer than emulated: these cores are too "
            "slow for these durations, or the machine is busy.\n"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench_parts",
        description="What each part of the draft side is worth, predicted and measured.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--emulate", default="20:4", help="TARGET_MS:DRAFT_MS[:ROW_COST], durations of the forwards of both models")
    add("--target", type=Path, default=target_path(), help="folder of the target model")
    add("--draft", type=Path, default=draft_path(), help="folder of the draft model")
    add("--draft-noise", type=float, default=0.0, help="weaken the draft by so much noise")
    add("--target-cores", default="", help="such as 0 or 0-2; the first core if not given")
    add("--draft-cores", default="", help="the next core if not given")
    add("--dtype", default="float32", help="of both models")
    add("--prompts", type=Path, default=HOLDOUT, help="file of prompts; the first 400 characters of each are used")
    add("--num-prompts", type=int, default=4, help="use the first so many")
    add("--max-tokens", type=int, default=64, help="new tokens per prompt")
    add("--repetitions", type=int, default=5, help="of every engine, after the warm-up")
    add("--enforce-eager", action="store_true", help="do not compile the models")
    add("--seed", type=int, default=0, help="of the engines, of their order, of the intervals")
    return made


if __name__ == "__main__":
    sys.exit(main())
