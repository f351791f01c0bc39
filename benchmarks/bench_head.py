"""What the length head is worth: none, confidence alone, head alone, and both, over the confidence threshold.

All rows are policy `specbranch` with the same chunk length; `pearl` stands beside them, and a head that is always right, which
is the most that any head could bring. Three parts, in one run, on the same prompts:

  - the whole sweep by replay: transformers record what the target says, the real draft server with the real draft model drafts
    for it in virtual time (`vllm_specbranch.replay`), and the head's classes come along;
  - the head that is learned while serving (`length_head: online`) by replay, against confidence alone: the prompts come round
    again and again, and what follows the first half of that is its speed once it has learned;
  - a few rows on real engines, their forwards stretched to the same durations (with `--engine`).

Both pairs: the draft as it is, and one made weaker by noise; each needs a head of its own (`vllm-specbranch train-head`).

Owns what is run and the result file; `head_ablation_report` writes and draws. Runs offline:

    python benchmarks/bench_head.py --out result.json --pair 0:HEAD --pair 0.35:OTHER_HEAD --engine
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode_conditions import parse_emulation
from benchmarks.decode_rows import steady_tokens_per_s
from benchmarks.head_ablation_report import as_text, draw_ablation
from benchmarks.head_classes import classes_along, load, record
from benchmarks.replay import HOLDOUT, PROMPT_CHARACTERS
from benchmarks.replay_engine import times_of
from benchmarks.result_file import begin, finish, require_counts, say
from vllm_specbranch import weaken
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.length_head import load_head
from vllm_specbranch.lineup import Lineup, place, require_model
from vllm_specbranch.measure import Engine
from vllm_specbranch.measure_messages import Emulation, RunResult
from vllm_specbranch.metrics import rates
from vllm_specbranch.prompts import read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.replay_study import Study, as_json
from vllm_specbranch.shipped_pair import draft_path, head_path, target_path

SCHEMA_VERSION = 1
# The first is the one that the round model of `train-head` chose for both shipped pairs.
EPSILONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
# Of the rows of `online`, and how often their prompts come round.
ONLINE_EPSILONS = (0.1, 0.5)
NUM_PASSES = 6
# Of the engine rows.
ENGINE_EPSILONS = (0.1, 0.5)
NONE, CONFIDENCE, HEAD, HYBRID, KNOWN, PEARL = "none", "confidence", "head", "hybrid", "known", "pearl"


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A draft of the target.

    Attributes:
        noise: on its weights; 0 for the draft as it is.
        head: folder of the head for it.
    """

    noise: float
    head: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """One row: a rule and its threshold.

    Attributes:
        epsilon: None where nothing is cut by confidence.
    """

    rule: str
    epsilon: float | None

    @property
    def has_head(self) -> bool:
        """Whether classes are said, by a trained head or by one that is always right."""
        return self.rule in (HEAD, HYBRID, KNOWN)

    def settings(self, gamma: int) -> dict[str, object]:
        """Of `speculative_config`, without models and head."""
        if self.rule == PEARL:
            return {"policy": "pearl", "num_speculative_tokens": gamma}
        cut = {"stop_rule": "none"} if self.epsilon is None else {"stop_threshold": self.epsilon}
        return {"policy": "specbranch", "num_speculative_tokens": gamma, **cut}


def variants(epsilons: Sequence[float]) -> list[Variant]:
    """All rows."""
    swept = [Variant(rule, epsilon) for rule in (CONFIDENCE, HYBRID, KNOWN) for epsilon in epsilons]
    return [*(Variant(rule, None) for rule in (PEARL, NONE, HEAD)), *swept]


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return 2 for words that cannot be used, 1 if an engine says something else than plain vLLM."""
    args = _parser().parse_args(argv)
    try:
        return bench(args)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_head: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def bench(args: argparse.Namespace) -> int:
    """Record, replay, run engines; write text, picture and JSON."""
    begin(args.out)
    require_counts(
        {"--num-prompts": args.num_prompts, "--max-tokens": args.max_tokens, "--engine-prompts": args.engine_prompts}
    )
    emulation = parse_emulation(args.emulate, "--emulate")
    if emulation is None:
        raise ConfigError(args.emulate, "durations, which a replay needs", "--emulate")
    pairs = _earlier(args.after, emulation) if args.after else []
    texts = [one.text[:PROMPT_CHARACTERS] for one in read_prompts(args.prompts, args.num_prompts)]
    origin = provenance(Path(__file__).parent)
    base = _lineup(args)
    say(f"Recording what the target says after {len(texts)} prompts ...\n")
    target = load(base.target)
    prompts = _encode(base.target, texts)
    recordings = record(target, prompts, args.max_tokens)
    for pair in args.pairs or [Pair(0.0, head_path())]:
        head, spec = load_head(pair.head)
        draft = str(weaken.weakened(args.draft, pair.noise))
        study = Study.load(draft, args.dtype, recordings, enforce_eager=True)
        said = classes_along(target, spec.layers, head, recordings)
        lineup = dataclasses.replace(base, draft=draft)
        rows = replay_rows(study, said, spec.gamma, emulation)
        engines = engine_rows(lineup, prompts, pair.head, spec.gamma, emulation, args) if args.engine else []
        pairs.append(
            {
                "noise": pair.noise,
                "gamma": spec.gamma,
                "replays": rows,
                "online": online_rows(study, spec.gamma, emulation),
                "engines": engines,
            }
        )
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "seed": args.seed,
        "options": vars(args) | {"pairs": [dataclasses.asdict(one) for one in args.pairs or []]},
        "emulation": emulation,
        "pairs": pairs,
    }
    say("\n" + as_text(result) + "\n\n")
    written = finish(result, args.out)
    if args.picture:
        draw_ablation(written, args.picture)
    return 0 if all(row["is_lossless"] for pair in pairs for row in pair["engines"]) else 1


def _earlier(path: Path, emulation: Emulation) -> list[dict[str, Any]]:
    """The pairs of an earlier result.

    Raises:
        ConfigError: it cannot be read, or is of other durations.
    """
    try:
        found = json.loads(path.read_text())
        durations, pairs = found["emulation"], list(found["pairs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(path), f"a result of this benchmark ({error})", "--after") from error
    if durations != msgspec.to_builtins(emulation):
        raise ConfigError(str(path), "a result of the same durations", "--after")
    return pairs


def _encode(target: str, texts: Sequence[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    return [list(tokenizer.encode(text)) for text in texts]


def replay_rows(study: Study, said: Sequence[Sequence[int]], gamma: int, emulation: Emulation) -> list[dict[str, Any]]:
    """Every variant by replay, as JSON.

    Args:
        said: what the head says, per recording and token.
    """
    times = times_of(emulation)
    plain = study.plain(times)
    studies = {HEAD: study.with_classes(said), KNOWN: study.with_classes(study.known_classes(gamma))}
    studies[HYBRID] = studies[HEAD]
    rows = []
    for variant in variants(EPSILONS):
        result = as_json(studies.get(variant.rule, study).run(variant.settings(gamma), times), plain)
        rows.append({**dataclasses.asdict(variant), **result})
        say(
            f"  {variant.rule}, {variant.epsilon}: {result['speed_up']:.2f} times plain, rollback {result['rollback_rate']:.0%}, "
            f"hits {result['hit_rate']:.0%}\n"
        )
    return rows


def online_rows(study: Study, gamma: int, emulation: Emulation) -> list[dict[str, Any]]:
    """`length_head: online` against confidence alone, both over the same prompts many times, as JSON.

    Returns:
        Per threshold and half of the passes: tokens/s of both, and their ratio.
    """
    times, long = times_of(emulation), study.repeated(NUM_PASSES)
    half = len(long.recordings) // 2
    num_tokens = sum(one.num_tokens for one in long.recordings[:half])
    rows = []
    for epsilon in ONLINE_EPSILONS:
        settings = Variant(CONFIDENCE, epsilon).settings(gamma)
        ours, without = (long.run(settings | more, times) for more in ({"length_head": "online"}, {}))
        row: dict[str, Any] = {"epsilon": epsilon, "num_passes": NUM_PASSES, "num_rounds": ours.num_rounds}
        for name, start, end in (("first_half", 0, half), ("second_half", half, 2 * half)):
            speeds = [num_tokens / _duration_s(one.finished_s, start, end) for one in (ours, without)]
            row[name] = {
                "tokens_per_s": speeds[0],
                "confidence_tokens_per_s": speeds[1],
                "ratio": speeds[0] / speeds[1],
            }
        rows.append(row)
        say(f"  online, {epsilon}: {row['second_half']['ratio']:.3f} times confidence alone once it has learned\n")
    return rows


def _duration_s(finished_s: Sequence[float], start: int, end: int) -> float:
    """From the end of request `start - 1` to that of request `end - 1`."""
    return finished_s[end - 1] - (finished_s[start - 1] if start else 0.0)


def engine_rows(
    lineup: Lineup,
    prompts: Sequence[Sequence[int]],
    head: Path,
    gamma: int,
    emulation: Emulation,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Plain vLLM and a few variants on real engines with stretched forwards, one after the other, as JSON."""
    lineup = dataclasses.replace(lineup, observe=True, enforce_eager=True)
    wanted = [one for one in variants(ENGINE_EPSILONS) if one.rule != KNOWN]
    prompts = prompts[: args.engine_prompts]
    rows: list[dict[str, Any]] = []
    plain: RunResult | None = None
    for variant in (None, *wanted):
        if variant is None:
            spec = lineup.plain()
        else:
            ours = {key: value for key, value in variant.settings(gamma).items() if key != "num_speculative_tokens"}
            ours |= {"length_head": str(head)} if variant.has_head else {}
            spec = lineup.specbranch(gamma, f"{variant.rule} {variant.epsilon}", **ours)
        with Engine(spec) as engine:
            engine.wait_until_ready()
            engine.run(prompts[:1], args.max_tokens, emulation=emulation)
            run = engine.run(prompts, args.max_tokens, emulation=emulation)
        plain = plain or run
        rows.append(_engine_row(variant, run, plain))
        say(f"  engine, {spec.name}: {rows[-1]['tokens_per_s']:.1f} tokens/s\n")
    return rows


def _engine_row(variant: Variant | None, run: RunResult, plain: RunResult) -> dict[str, Any]:
    shares = rates(run.engine_counters, run.server_counters) if run.engine_counters else {}
    speed, base = steady_tokens_per_s(run, 1), steady_tokens_per_s(plain, 1)
    return {
        "rule": variant.rule if variant else "plain",
        "epsilon": variant.epsilon if variant else None,
        "tokens_per_s": speed,
        "speed_up": speed / base,
        "hit_rate": shares.get("hit_rate"),
        "rollback_rate": shares.get("rollback_rate"),
        "num_overruns": run.num_overruns,
        "engine_counters": run.engine_counters,
        "server_counters": run.server_counters,
        "is_lossless": [one.token_ids for one in run.requests] == [one.token_ids for one in plain.requests],
    }


def _lineup(args: argparse.Namespace) -> Lineup:
    return Lineup(
        target=str(require_model(args.target, "--target")),
        draft=str(require_model(args.draft, "--draft")),
        placement=place(available_cores(), len(gpus())),
        dtype=args.dtype,
        enforce_eager=True,
        seed=args.seed,
    )


# --- words ----------------------------------------------------------------------------------------------------------------


def _pair(text: str) -> Pair:
    noise, colon, head = text.partition(":")
    try:
        return Pair(float(noise), Path(head if colon else head_path()))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used; allowed: NOISE:HEAD, such as 0.35:folder"
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="What the length head is worth.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--picture", type=Path, help="file for the picture")
    add("--target", type=Path, default=target_path(), help="folder of the target model")
    add("--draft", type=Path, default=draft_path(), help="folder of the draft model")
    add(
        "--pair",
        dest="pairs",
        type=_pair,
        action="append",
        metavar="NOISE:HEAD",
        help=f"noise on the draft's weights, and the head for that pair; again for more (poorly aligned: {weaken.WEAK_NOISE}; "
        "without this option: the shipped pair with its head)",
    )
    add("--after", type=Path, help="an earlier result with the same words for other pairs, which come first")
    add("--prompts", type=Path, default=HOLDOUT, help="file of prompts; the first 400 characters of each are used")
    add("--num-prompts", type=int, default=24, help="use the first so many")
    add("--max-tokens", type=int, default=96, help="new tokens per prompt")
    add("--emulate", default="20:4", help="durations of forwards, TARGET_MS:DRAFT_MS[:ROW_COST]")
    add("--engine", action="store_true", help="also run real engines")
    add("--engine-prompts", type=int, default=6, help="of these, the first so many")
    add("--dtype", default="float32", help="of both models")
    add("--seed", type=int, default=0, help="of the engines")
    return parser


if __name__ == "__main__":
    sys.exit(main())
