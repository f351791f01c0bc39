"""How fast each policy could be on a perfect engine: replays of recorded greedy outputs, a table, and a check against the engine.

The target's outputs are recorded with plain vLLM. Then the real draft server drafts for them with the real draft model, in virtual
time: a target round costs c draft steps, and one more token in a draft step costs b of one. For each pair, c and b the table says
how many times faster than plain decoding each policy is, and with which settings (in brackets, where it has some to choose from).
The pairs are the draft as it is, and one made weaker by noise on its weights.

With `--engine` the same prompts are run by the real engine as well: `deterministic` must take the rounds and hits that the replay
says, and what the engine takes longer than the replay otherwise is split into its parts.

Owns what is replayed and its words; the table is in `replay_report`, the engine in `replay_engine`. Runs offline:

    python benchmarks/replay.py --out replay.json
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_specbranch import weaken
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.lineup import Lineup, place, require_model
from vllm_specbranch.measure import Engine
from vllm_specbranch.prompts import read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.replay import Recording, Times
from vllm_specbranch.replay_bounds import coverage
from vllm_specbranch.replay_study import TOKENS_BEYOND, Study, as_json, recordings_of
from vllm_specbranch.shipped_pair import draft_path, target_path

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.replay_engine import REPETITIONS, check_engine
from benchmarks.replay_report import Line, engine_text, lines_as_table
from benchmarks.result_file import begin, finish, require_counts, say

SCHEMA_VERSION = 1
HOLDOUT = Path(__file__).parent / "prompts" / "python_holdout.json"
PROMPT_CHARACTERS = 400
RECORDING_BATCH = 8
# What each policy may choose from, beside the length of its chunks.
ALTERNATIVES: Mapping[str, Sequence[Mapping[str, object]]] = {
    "pearl": [{}],
    "specbranch, go": [{"on_miss": "go"}],
    "specbranch, wait": [{"on_miss": f"wait:{count}"} for count in (1, 2, 4)],
    "specbranch": [{}],
    "fanout": [{"max_branches": 8}, {"max_branches": 32}],
    "best_first": [{"max_branches": 8}, {"max_branches": 32}],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run; return 1 if the engine does not agree with the replay, 2 for words that cannot be used."""
    args = _parser().parse_args(argv)
    try:
        return bench(args)
    except SpecBranchError as error:
        sys.stderr.write(f"replay: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def bench(args: argparse.Namespace) -> int:
    """Record, replay, and write table and JSON."""
    _check(args)
    texts = [one.text[:PROMPT_CHARACTERS] for one in read_prompts(args.prompts, args.num_prompts)]
    lineup = _lineup(args)
    origin = provenance(Path(__file__).parent)
    say(f"Recording {len(texts)} prompts with plain vLLM ...\n")
    prompts, recordings = record(lineup, texts, args.max_tokens)
    pairs, lines, checks = [], [], []
    for noise in args.noises:
        draft = str(weaken.weakened(args.draft, noise))
        study = Study.load(draft, args.dtype, recordings, args.batch_size)
        pair = {"noise": noise, "draft": draft, "coverage": {k: coverage(study.agreements, k) for k in (1, 2, 4, 8)}}
        pairs.append(pair)
        say(f"Noise {noise:g} on the draft: alpha {pair['coverage'][1]:.3f}, its first choice is the target's token.\n")
        lines += replay_pair(study, noise, args)
        if args.engine:
            paired = dataclasses.replace(lineup, draft=draft)
            checks.append(check_engine(paired, study, prompts, args.max_tokens, args.repetitions, args.seed))
            say(engine_text(checks[-1]) + "\n")
    say("\n" + lines_as_table(lines) + "\n\n")
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "seed": args.seed,
        "options": vars(args),
        "target": lineup.target,
        "pairs": pairs,
        "prompt_tokens": [len(one) for one in prompts],
        "lines": [dataclasses.asdict(line) for line in lines],
        "engine": checks,
    }
    finish(result, args.out)
    return 0 if all(check["agrees"] for check in checks) else 1


def _check(args: argparse.Namespace) -> None:
    begin(args.out)
    options = ("num_prompts", "max_tokens", "batch_size", "repetitions")
    require_counts({"--" + name.replace("_", "-"): getattr(args, name) for name in options})
    for option, numbers in (("--gammas", args.gammas), ("--ratios", args.ratios), ("--row-costs", args.row_costs)):
        least = 0 if option == "--row-costs" else 1e-9
        if not numbers or min(numbers) < least:
            raise ConfigError(numbers, f"numbers {'from' if not least else 'above'} 0", option)
    for name in args.policies:
        if name not in ALTERNATIVES:
            raise ConfigError(name, "some of " + ", ".join(map(repr, ALTERNATIVES)), "--policies")


def _lineup(args: argparse.Namespace) -> Lineup:
    return Lineup(
        target=str(require_model(args.target, "--target")),
        draft=str(require_model(args.draft, "--draft")),
        placement=place(available_cores(), len(gpus())),
        dtype=args.dtype,
        max_num_seqs=max(args.batch_size, RECORDING_BATCH),
        seed=args.seed,
    )


def record(lineup: Lineup, texts: Sequence[str], num_tokens: int) -> tuple[list[list[int]], list[Recording]]:
    """Return (token ids of each prompt, what plain vLLM makes of them)."""
    with Engine(lineup.plain()) as engine:
        engine.wait_until_ready()
        prompts = engine.encode(texts)
        run = engine.run(prompts, num_tokens + TOKENS_BEYOND, RECORDING_BATCH)
    return prompts, recordings_of(prompts, run, num_tokens)


def alternatives(name: str, gammas: Sequence[int]) -> list[dict[str, object]]:
    """All settings that a policy may choose from."""
    policy = name.partition(",")[0]
    return [
        {"policy": policy, "num_speculative_tokens": gamma, **more} for gamma in gammas for more in ALTERNATIVES[name]
    ]


def replay_pair(study: Study, noise: float, args: argparse.Namespace) -> list[Line]:
    """One line for each c and b."""
    lines = []
    for c in args.ratios:
        for b in args.row_costs:
            times = Times(c * args.draft_step_ms, args.draft_step_ms, args.target_token_cost, b)
            plain = study.plain(times)
            gamma, own = study.best_sequential(times)
            line = Line(noise, c, b)
            line.add("draft_model", {"num_speculative_tokens": gamma}, as_json(own, plain))
            for name in args.policies:
                best = study.best(alternatives(name, args.gammas), times)
                line.add(name, best.settings, as_json(best.result, plain))
            bound = study.bound(times, max(args.gammas))
            if bound is not None:
                line.add("every outcome guessed", {}, as_json(bound, plain))
            lines.append(line)
            say(f"  c = {c:g}, b = {b:g}: {line.describe()}\n")
    return lines


# --- words -----------------------------------------------------------------------------------------------------------


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Replays of recorded greedy outputs: how fast each policy could be.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file for the JSON")
    add("--target", type=Path, default=target_path(), help="folder of the target model")
    add("--draft", type=Path, default=draft_path(), help="folder of the draft model")
    add("--noises", type=_numbers, default=[0.0, weaken.WEAK_NOISE], help="of the pairs; 0 is the draft as it is")
    add("--prompts", type=Path, default=HOLDOUT, help="file of prompts; the first 400 characters of each are used")
    add("--num-prompts", type=int, default=24, help="use the first so many")
    add("--max-tokens", type=int, default=160, help="new tokens per prompt")
    add("--batch-size", type=int, default=1, help="requests at the same time")
    add("--ratios", type=_numbers, default=[5.0, 10.0, 20.0], help="c: draft steps that a target round takes")
    add("--row-costs", type=_numbers, default=[0.02, 0.12], help="b: what a further token costs in a draft step")
    add("--target-token-cost", type=float, default=0.0, help="what a further token costs in a target round")
    add("--draft-step-ms", type=float, default=1.0, help="of a step with one token")
    add("--gammas", type=_counts, default=[8, 16], help="most draft tokens of a chunk, to choose from")
    add("--policies", type=_names, default=list(ALTERNATIVES), help="some of the above, with ; between them")
    add("--dtype", default="float32", help="of both models")
    add("--seed", type=int, default=0, help="of the engines and the intervals")
    add("--repetitions", type=int, default=REPETITIONS, help="of every engine under emulation (--engine)")
    add("--engine", action="store_true", help="also run the real engine and compare")
    return parser


if __name__ == "__main__":
    sys.exit(main())
