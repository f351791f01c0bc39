"""The papers' pairs of models at their c, with emulated devices, beside the papers' own figures.

Reads results of `bench_decode` (schema version 2) that ran under `--emulate`, picks for each pair of the papers the condition with
its c and its kind of alignment, and writes a table and a small JSON. Measures nothing; what is not measured yet is named, with the
command that measures it.

What this can say: how the methods compare in one and the same engine, real vLLM with all its overheads, when target and draft model
have a device each and a target forward lasts c draft steps; and whether the order of the methods is that of the papers.

What this cannot say: how fast the papers' models are. Durations are *emulated*: forwards of our small models are stretched by
sleeping, one more token is free in a target forward and costs 2% in a draft step. The alignment (alpha) is that of *our* pairs, the
shipped one or the one with noise on its draft, not of the papers' models. Text, prompts and number of draft tokens are ours too.
c is the ratio of *parameters*; on real devices a draft step also has parts that do not shrink with the model, so the real c is
smaller. The papers' figures were taken on GPUs with another engine, whose plain decoding is another yardstick. SpS is vLLM's
draft_model, the rest is this project's; SpecBranch has a trained length head (H-RAD) in the papers, and by default none here. Pairs
of the same alignment and emulated c show one and the same measurement. So: compare the methods within a line, not our number with
the paper's.

c above 25 is emulated as 25; the table says the ratio without that cap. A draft step below about 4 ms cannot be emulated on two
cores, where our draft model takes some milliseconds by itself, and a target forward above 100 ms makes a run long. For PEARL,
SpecBranch and best_first the cap matters little: once c is far above the 8 draft tokens, drafting hides behind the target. For
SpS it does matter: gamma draft steps are part of each round, with 4 tokens 16% of a target forward at c = 25, but 4% at c = 100.
So the lines of the 68M pairs show SpS slower, relative to the other methods, than it would be without the cap.

Owns the papers' pairs and figures, which condition stands for which pair, and its words. Runs on its own, offline:

    python benchmarks/papers.py shipped.json weak.json --out papers.json
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode_conditions import describe_emulation
from benchmarks.decode_report import MOST_OVERRUNS, edge_doubt
from benchmarks.decode_rows import BASELINE, PEARL, SEQUENTIAL
from benchmarks.pictures import read_result
from benchmarks.portable import portable
from benchmarks.result_file import finish, require_out
from vllm_specbranch.compare import Difference
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.measure_messages import Emulation
from vllm_specbranch.picture_style import best_sequential
from vllm_specbranch.provenance import provenance
from vllm_specbranch.report import number, table
from vllm_specbranch.shipped_pair import draft_path, target_path
from vllm_specbranch.weaken import WEAK_NOISE

SCHEMA_VERSION = 1
# See the module: what this project's machines can emulate.
MOST_C = 25.0
SHORTEST_DRAFT_STEP_MS = 4.0
# By so much an emulated c may be away from the wanted one, relative to it.
C_TOLERANCE = 0.03
PROMPT_SET = "python_holdout"
SHIPPED, WEAK = "shipped", "weak"
NOISES: Mapping[str, float] = {SHIPPED: 0.0, WEAK: WEAK_NOISE}
OURS = (PEARL, "specbranch", "best_first")
# How a reader calls the columns. SpS, "speculative sampling", is the papers' word for drafting and verifying by turns.
COLUMNS: Mapping[str, str] = {
    BASELINE: "plain",
    SEQUENTIAL: "SpS (draft_model)",
    PEARL: "PEARL",
    "specbranch": "SpecBranch",
    "best_first": "best_first (ours)",
}
# Fills a gap in the table, in as short a run as says something.
COMMAND = (
    "python benchmarks/bench_decode.py --out {out} --target-layers 0 --target-mlp 0 --rows draft_model,pearl,specbranch,best_first "
    "--max-tokens 64 --repetitions 5 --gammas {gammas}"
)
# Around the best of sequential decoding at these alphas and c: (gamma + c) draft steps make 1 + alpha + ... + alpha^gamma tokens.
GAMMAS: Mapping[str, str] = {SHIPPED: "3,6,12", WEAK: "2,4,8"}

Row = Mapping[str, Any]
Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair of models of the papers, and the speed-ups over plain decoding that arXiv:2506.01979 reports for it.

    Attributes:
        draft_parameters, target_parameters: nominal, as in the models' names.
        alignment: which of our pairs stands for it. The 68M drafts are poorly aligned: weak; the others well: shipped.
        human_eval: speed-up on HumanEval, by policy.
        mean: over HumanEval, GSM8K and CNN/DM, by policy.
    """

    name: str
    draft_parameters: float
    target_parameters: float
    alignment: str
    human_eval: Mapping[str, float]
    mean: Mapping[str, float]

    @property
    def parameter_ratio(self) -> float:
        """Parameters of the target per parameter of the draft: c, if time were parameters."""
        return self.target_parameters / self.draft_parameters

    @property
    def c(self) -> float:
        """What is emulated."""
        return min(self.parameter_ratio, MOST_C)


def _figures(pearl: float, specbranch: float) -> Mapping[str, float]:
    return {PEARL: pearl, "specbranch": specbranch}


PAIRS = (
    Pair("LLaMA 68M & 7B", 68e6, 7e9, WEAK, _figures(1.69, 2.04), _figures(1.74, 2.01)),
    Pair("Vicuna 68M & 13B", 68e6, 13e9, WEAK, _figures(2.02, 2.47), _figures(1.77, 2.10)),
    Pair("DeepSeek-Coder 1.3B & 33B", 1.3e9, 33e9, SHIPPED, _figures(3.39, 3.71), _figures(2.93, 3.23)),
    Pair("Llama-3.1 8B & 70B", 8e9, 70e9, SHIPPED, _figures(3.75, 4.02), _figures(3.38, 3.69)),
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A condition of a result.

    Attributes:
        source: name of the file.
        result: all of the file.
        condition: the one table of it that this is.
    """

    source: str
    result: Result
    condition: Mapping[str, Any]

    @property
    def emulation(self) -> Emulation | None:
        """Durations of the forwards; None for real devices."""
        given = self.condition["emulation"]
        return None if given is None else Emulation(**given)

    @property
    def alignment(self) -> str | None:
        """Which of our pairs this is; None for any other."""
        options = self.result.get("options", {})
        if (options.get("target"), options.get("draft")) != (portable(target_path()), portable(draft_path())):
            return None
        noise = options.get("draft_noise", 0.0)
        return next((name for name, known in NOISES.items() if math.isclose(noise, known)), None)

    def stands_for(self, pair: Pair, prompt_set: str) -> bool:
        """Whether it has the pair's alignment and c, one request at a time, and nothing else that differs."""
        how = self.emulation
        if how is None or self.alignment != pair.alignment:
            return False
        usual = Emulation(how.target_forward_ms, how.draft_step_ms)
        c = how.target_forward_ms / how.draft_step_ms
        fits = how == usual and math.isclose(c, pair.c, rel_tol=C_TOLERANCE)
        return fits and self.condition["batch_size"] == 1 and self.condition["prompt_set"] == prompt_set

    def rows(self) -> dict[str, Row]:
        """The row of each column, where there is one; of draft_model the fastest."""
        rows = self.condition["rows"]
        found = {row["name"]: row for row in rows}
        for row in best_sequential(rows, is_wide=False):
            found[SEQUENTIAL] = row
        return {name: found[name] for name in COLUMNS if name in found}


def main(argv: Sequence[str] | None = None, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Write the table and the JSON; return 1 if something is not measured yet, 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        require_out(args.out)
        known = [one for path in args.results for one in measurements(path)]
    except ConfigError as error:
        sys.stderr.write(f"papers: {error}\n")
        return 2
    chosen = {pair.name: choose(pair, known, args.prompts) for pair in PAIRS}
    gaps = missing(chosen, args.prompts)
    result = {
        "schema_version": SCHEMA_VERSION,
        **provenance(Path(__file__).parent),
        "emulated": True,
        "prompt_set": args.prompts,
        "pairs": [pair_as_json(pair, chosen[pair.name]) for pair in PAIRS],
        "missing": gaps,
    }
    write("\n\n".join([as_text(chosen, args.prompts), *gaps]) + "\n\n")
    finish(result, args.out, write)
    return 1 if gaps else 0


def measurements(path: Path) -> list[Measurement]:
    """All conditions of a result.

    Raises:
        ConfigError: not a result of `bench_decode`, or of another schema version.
    """
    result = read_result(path)
    return [Measurement(path.name, result, condition) for condition in result["conditions"]]


def choose(pair: Pair, known: Sequence[Measurement], prompt_set: str) -> Measurement | None:
    """The last one that stands for the pair: files that are given later win."""
    return next((one for one in reversed(known) if one.stands_for(pair, prompt_set)), None)


def missing(chosen: Mapping[str, Measurement | None], prompt_set: str) -> list[str]:
    """A line for each run that is needed still, with its command; and one for each condition in which a method is."""
    lines = []
    for alignment, noise in NOISES.items():
        absent = [pair for pair in PAIRS if pair.alignment == alignment and chosen[pair.name] is None]
        if absent:
            ratios = sorted({pair.c for pair in absent})
            names = ", ".join(f"{pair.name} (c = {pair.c:.4g})" for pair in absent)
            command = COMMAND.format(out=f"{alignment}.json", gammas=GAMMAS[alignment]) + "".join(map(_emulate, ratios))
            command += f" --draft-noise {noise:g}" if noise else ""
            command += f" --prompts {prompt_set}" if prompt_set != PROMPT_SET else ""
            lines.append(f"Not measured, {alignment} pair, for {names}: {command}")
    for one in _distinct(chosen.values()):
        lacking = [COLUMNS[name] for name in COLUMNS if name not in one.rows()]
        if lacking:
            label = f"{one.source}, {one.condition['label']}"
            lines.append(f"Without a row for {', '.join(lacking)} (see --rows of bench_decode): {label}")
    return lines


def _emulate(c: float) -> str:
    return f" --emulate {c * SHORTEST_DRAFT_STEP_MS:g}:{SHORTEST_DRAFT_STEP_MS:g}"


def _distinct(found: Iterable[Measurement | None]) -> list[Measurement]:
    """Each once; one condition may stand for several pairs."""
    return list({id(one): one for one in found if one is not None}.values())


# --- numbers ---------------------------------------------------------------------------------------------------------


def acceptance_rate(row: Row) -> float | None:
    """Estimate alpha from a row whose chunks are never cut: the share accepted of the draft tokens whose prefix was accepted."""
    accepted, drafted = row["accepted_by_position"], row["drafted_by_position"]
    reached = [min(pair) for pair in zip(drafted, [math.inf, *accepted], strict=False)]
    return sum(accepted) / sum(reached) if reached and sum(reached) else None


def num_draft_tokens(row: Row) -> int | None:
    """Most draft tokens of a chunk."""
    given = (row["speculative_config"] or {}).get("num_speculative_tokens")
    return None if given is None else int(given)


def ratio_to_pearl(row: Row) -> Mapping[str, Any] | None:
    """Speed relative to PEARL, repetition by repetition."""
    found: Iterable[Mapping[str, Any]] = (one for one in row["ratios_to_rivals"] if one["to"] == PEARL)
    return next(iter(found), None)


def pair_as_json(pair: Pair, measurement: Measurement | None) -> dict[str, Any]:
    """All that the table says of a pair, and where it comes from."""
    return {
        **asdict(pair),
        "parameter_ratio": pair.parameter_ratio,
        "emulated_c": pair.c,
        "measured": None if measurement is None else _measured_as_json(measurement),
    }


def _measured_as_json(one: Measurement) -> dict[str, Any]:
    rows, result = one.rows(), one.result
    return {
        "result": one.source,
        "git_sha": result.get("git_sha"),
        "dirty": result.get("dirty"),
        "versions": result.get("versions"),
        "machine": result.get("machine"),
        "label": one.condition["label"],
        "emulation": one.emulation,
        "measured_c": one.condition["model_times"]["c"],
        "acceptance_rate": acceptance_rate(rows[SEQUENTIAL]) if SEQUENTIAL in rows else None,
        "doubts": doubts(one),
        "speed_ups": {
            name: {
                "row": row["name"],
                "speculative_config": row["speculative_config"],
                "over_plain": row["ratio_to_baseline"],
                "over_plain_whole_run": row["whole_run_ratio_to_baseline"],
                "over_pearl": ratio_to_pearl(row),
            }
            for name, row in rows.items()
        },
    }


def doubts(one: Measurement) -> list[str]:
    """What a reader should know before believing the numbers of a condition."""
    rows, found = one.rows(), []
    late = {row["name"]: row["overrun_share"] for row in rows.values() if row["overrun_share"] > MOST_OVERRUNS}
    if late:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in late.items())
        found.append(f"forwards that took longer than emulated: {shares}; the machine was too slow or too busy")
    other = [row["name"] for row in rows.values() if not all(Difference(**gap).is_tie for gap in row["differences"])]
    if other:
        found.append(f"token ids differ from plain, and not at a tie, in {', '.join(other)}")
    gammas = [num_draft_tokens(row) or 0 for row in one.condition["rows"] if row["group"] == SEQUENTIAL]
    best = num_draft_tokens(rows[SEQUENTIAL]) if SEQUENTIAL in rows else None
    found += edge_doubt(best, gammas)
    return found


# --- text ------------------------------------------------------------------------------------------------------------


def as_text(chosen: Mapping[str, Measurement | None], prompt_set: str) -> str:
    """Both tables, and what to think of them."""
    found = _distinct(chosen.values())
    notes = [f"Doubt: {one.source}, {one.condition['label']}: {text}." for one in found for text in doubts(one)]
    return "\n\n".join(
        [
            "=== The papers' pairs, EMULATED: durations by sleeping, models, alpha and text are ours ===",
            stands_table(chosen),
            f"c is target per draft step: of parameters; emulated (at most {MOST_C:g}); measured (with vLLM around the target's "
            "forward). alpha: share accepted of the draft tokens that were reached, from draft_model.",
            speed_table(chosen),
            f"Times plain decoding: median (least..most) of repetitions; batch 1, greedy, prompts {prompt_set}, steady decoding.\n"
            "SpS: in [] its best number of draft tokens. It and plain have one device; the others one more, for the draft.\n"
            f"Where c is capped at {MOST_C:g} SpS looks too slow: without the cap drafting would be a smaller part of its rounds.\n"
            "Papers' figures: arXiv:2506.01979; real GPUs, another engine, other text and alpha. Mean: HumanEval, GSM8K, CNN/DM.\n"
            "The papers' SpecBranch has a trained length head, ours by default none. Same c and pair of ours: same numbers.\n"
            "Compare the methods within a line, not our number with the paper's.",
            *(["\n".join(notes)] if notes else []),
        ]
    )


def stands_table(chosen: Mapping[str, Measurement | None]) -> str:
    """What stands for each pair."""
    headers = ["pair", "c of parameters", "c emulated", "c measured", "our pair", "alpha of ours", "durations"]
    lines = []
    for pair in PAIRS:
        one = chosen[pair.name]
        cells = ["-", "-", "not measured"]
        if one is not None:
            rows = one.rows()
            alpha = acceptance_rate(rows[SEQUENTIAL]) if SEQUENTIAL in rows else None
            cells = [number(one.condition["model_times"]["c"], 1), number(alpha), describe_emulation(one.emulation)]
        ratios = [f"{c:.4g}" for c in (pair.parameter_ratio, pair.c)]
        lines.append([pair.name, *ratios, cells[0], pair.alignment, *cells[1:]])
    return table(headers, lines)


def speed_table(chosen: Mapping[str, Measurement | None]) -> str:
    """Three lines for each pair: ours, and the papers' on one set and on the mean."""
    headers = ["pair", "figures", *COLUMNS.values(), "SpecBranch / PEARL"]
    lines = []
    for pair in PAIRS:
        one = chosen[pair.name]
        rows = one.rows() if one is not None else {}
        over = ratio_to_pearl(rows["specbranch"]) if "specbranch" in rows else None
        cells = [_speed_up(name, rows.get(name)) for name in COLUMNS]
        lines.append([pair.name, "ours, emulated", *cells, _spread(over)])
        for what, figures in (("paper, HumanEval", pair.human_eval), ("paper, mean", pair.mean)):
            theirs = [number({BASELINE: 1.0, **figures}.get(name)) for name in COLUMNS]
            lines.append(["", what, *theirs, number(figures["specbranch"] / figures[PEARL])])
    return table(headers, lines)


def _speed_up(name: str, row: Row | None) -> str:
    if row is None or name == BASELINE:
        return "-" if row is None else "1.00"
    gamma = num_draft_tokens(row)
    return _spread(row["ratio_to_baseline"]) + (f" [{gamma}]" if name == SEQUENTIAL and gamma is not None else "")


def _spread(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f} ({found['least']:.2f}..{found['most']:.2f})"


# --- words -----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="papers",
        description="The papers' pairs of models at their c, with emulated devices, beside the papers' own figures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "results",
        type=Path,
        nargs="*",
        help="JSON files of bench_decode, run with --emulate; without one, what to run is said",
    )
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--prompts", default=PROMPT_SET, help="prompt set whose conditions are taken")
    return parser


if __name__ == "__main__":
    sys.exit(main())
