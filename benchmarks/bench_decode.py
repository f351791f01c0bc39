"""Decoding speed of plain vLLM, its own methods, and this project's policies, all in one run.

Every row is an engine in a process of its own; all are alive at once. A run has conditions (prompts, requests at the same time,
real devices or emulated durations), each with its own table. Each repetition goes through the conditions in a new order, and under
each condition round all engines in a new order, so that a busy moment of the machine hits none in particular. Each engine is
warmed up first under each condition, and that is left out. Target and draft have a core each in our rows; plain and `draft_model`
run on the target's core, and again on both cores.

Speed is that of steady decoding, a full batch and no prefill; the ratio of whole runs stands beside it.

Owns what is run, in which order, and the result file. `decode_rows` says which engines, `decode_conditions` under what,
`decode_report` what is written; `pictures` draws. Runs offline:

    python benchmarks/bench_decode.py --out result.json
    python benchmarks/pictures.py result.json --out pictures
"""

import argparse
import dataclasses
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.decode_conditions import Condition, PromptSet, conditions, cut_prompts, read_prompt_sets, work_of
from benchmarks.decode_options import parse_words
from benchmarks.decode_report import Measured, as_text, measured_as_json
from benchmarks.decode_rows import WIDE, Entry, Row, entries
from benchmarks.result_file import Write, begin, finish, say
from vllm_specbranch import deepen, weaken
from vllm_specbranch.compare import GapOf, first_differences, transformers_gaps, with_gaps
from vllm_specbranch.errors import ConfigError, SpecBranchError
from vllm_specbranch.lineup import Lineup, place, require_model
from vllm_specbranch.measure import Engine, running
from vllm_specbranch.provenance import available_cores, gpus, provenance

SCHEMA_VERSION = 2
NUM_STARTING = 3
# Of the warm-up, under each condition; and, where there are several, before each measured run: the running means by which a
# draft server decides are still those of the condition before.
WARM_UP_TOKENS = 32
SETTLING_TOKENS = 16
NUM_WARM_UP_PROMPTS = 2
# What an engine takes beside weights and KV cache (measured, as proportional set size); its draft server takes less.
ENGINE_BYTES = 700 << 20
LEAST_KV_CACHE_BYTES = 128 << 20
# Blocks that are only partly filled, and what vLLM keeps for itself.
KV_CACHE_MARGIN = 1.25


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a token id differs other than at a tie, 2 for words that cannot be used."""
    try:
        return bench(parse_words(argv), say)
    except SpecBranchError as error:
        sys.stderr.write(f"bench_decode: {error}\n")
        return 2 if isinstance(error, ConfigError) else 1


def bench(args: argparse.Namespace, write: Write) -> int:
    """Run all rows under all conditions, write tables and JSON."""
    begin(args.out)
    most_tokens = args.max_model_len - args.max_tokens
    if args.prompt_tokens > most_tokens:
        allowed = f"at most {most_tokens} (see --max-model-len, --max-tokens)"
        raise ConfigError(args.prompt_tokens, allowed, "--prompt-tokens")
    sets = read_prompt_sets(args.prompts, max(args.num_prompts, *args.batch_sizes))
    wanted = conditions(sets, args.batch_sizes, args.emulate or [None])
    lineup = make_lineup(args)
    if all(one.emulation for one in wanted):
        args.rows = [one for one in args.rows if one != WIDE]
    chosen = entries(lineup, args.rows, args.gammas, args.num_speculative_tokens, args.settings)
    # They share the memory of a GPU.
    lineup = dataclasses.replace(lineup, num_engines=len(chosen))
    chosen = entries(lineup, args.rows, args.gammas, args.num_speculative_tokens, args.settings)
    _check_memory(chosen)
    origin = provenance(Path(__file__).parent)
    write(f"Starting {len(chosen)} engines, {NUM_STARTING} at a time; {len(wanted)} condition(s).\n")
    with running([one.spec for one in chosen], _Progress(write), NUM_STARTING) as engines:
        measured = prepare(args, sets, wanted, engines[0])
        run_all(args, measured, chosen, engines, write)
    gap_of = transformers_gaps(lineup.target)
    for one in measured:
        compare(one, gap_of)
    result = {
        "schema_version": SCHEMA_VERSION,
        **origin,
        "seed": args.seed,
        "options": vars(args),
        "device": "gpu" if lineup.placement.target_device is not None else "cpu",
        "target": lineup.target,
        "draft": lineup.draft,
        "conditions": [measured_as_json(one) for one in measured],
    }
    write("\n" + "\n\n\n".join(map(as_text, measured)) + "\n")
    finish(result, args.out, write)
    return 0 if all(difference.is_tie for one in measured for row in one.rows for difference in row.differences) else 1


def make_lineup(args: argparse.Namespace) -> Lineup:
    """Find or make the models, and choose where they run."""
    target, draft = require_model(args.target, "--target"), require_model(args.draft, "--draft")
    num_gpus = len(gpus())
    if num_gpus and any(args.emulate or ()):
        raise ConfigError("a duration", "none where vLLM runs on GPUs: emulation is for CPUs", "--emulate")
    if args.target_layers or args.target_mlp:
        target = Path(deepen.cached(target, args.target_layers, args.target_mlp or None).out)
    draft = weaken.weakened(draft, args.draft_noise, args.seed)
    if args.draft_layers or args.draft_mlp:
        draft = Path(deepen.cached(draft, args.draft_layers, args.draft_mlp or None).out)
    num_tokens = max(args.batch_sizes) * (args.prompt_tokens + args.max_tokens)
    return Lineup(
        target=str(target),
        draft=str(draft),
        placement=place(available_cores(), num_gpus, args.target_cores, args.draft_cores),
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_num_seqs=max(args.batch_sizes),
        kv_cache_bytes=args.kv_cache_mib << 20 or kv_cache_bytes([target, draft], num_tokens),
        enforce_eager=args.enforce_eager,
        seed=args.seed,
        observe=not num_gpus,
    )


def kv_cache_bytes(models: Sequence[Path], num_tokens: int) -> int:
    """What the KV of so many tokens takes in 32 bits, for all models together (vLLM's draft_model keeps both in one cache)."""
    total = 0
    for model in models:
        config = json.loads((model / "config.json").read_text())
        heads = int(config["num_attention_heads"])
        head_size = int(config.get("head_dim") or config["hidden_size"] // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        total += 2 * 4 * int(config["num_hidden_layers"]) * kv_heads * head_size
    return max(LEAST_KV_CACHE_BYTES, math.ceil(KV_CACHE_MARGIN * total * num_tokens))


def _check_memory(chosen: Sequence[Entry]) -> None:
    """Refuse what would make the machine swap, or end engines in the middle of a run."""
    spec = chosen[0].spec
    if spec.visible_devices is not None:
        return
    weights = sum(file.stat().st_size for file in Path(spec.model).glob("*.safetensors"))
    # Weights may be stored in 16 bits and loaded in 32.
    needed = len(chosen) * (ENGINE_BYTES + spec.kv_cache_bytes + 2 * weights)
    free = psutil.virtual_memory().available
    if needed > free:
        missing = f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free"
        raise ConfigError(len(chosen), f"fewer engines: {missing} (see --rows, --gammas)", "number of engines")


def prepare(
    args: argparse.Namespace, sets: Sequence[PromptSet], wanted: Sequence[Condition], engine: Engine
) -> list[Measured]:
    """Turn texts into the work of each condition."""
    token_ids = {one.name: engine.encode([prompt.text for prompt in one.prompts]) for one in sets}
    names = {one.name: [prompt.name for prompt in one.prompts] for one in sets}
    found = []
    for condition in wanted:
        cut = cut_prompts(token_ids[condition.prompt_set], args.prompt_tokens)
        work = work_of(cut, max(min(args.num_prompts, len(cut)), condition.batch_size))
        known = names[condition.prompt_set]
        again = [f"{known[place % len(known)]}, again" for place in range(len(known), len(work))]
        found.append(Measured(condition, (known + again)[: len(work)], work, seed=args.seed))
    return found


def run_all(
    args: argparse.Namespace,
    measured: Sequence[Measured],
    chosen: Sequence[Entry],
    engines: Sequence[Engine],
    write: Write,
) -> None:
    """Warm up, then repeat. Mutates: measured."""
    by_name = {engine.spec.name: engine for engine in engines}
    for entry in chosen:
        entry.facts = by_name[entry.name].facts
    for one in measured:
        # An emulated forward lasts the same on one core and on two: it says nothing of twice the devices.
        found = [entry for entry in chosen if not (entry.is_wide and one.condition.emulation)]
        one.rows = [Row(entry, one.condition.batch_size) for entry in found]
        for row in one.rows:
            _warm_up(by_name[row.name], one, WARM_UP_TOKENS)
    started_s = time.monotonic()
    for repetition in repetitions(args, measured, by_name):
        now_s, started_s = time.monotonic() - started_s, time.monotonic()
        write(f"Repetition {repetition} of {args.repetitions} done in {now_s:.0f} s.\n")


def repetitions(args: argparse.Namespace, measured: Sequence[Measured], by_name: Mapping[str, Engine]) -> Iterator[int]:
    """Measure every row under every condition, again and again; yields the number of each finished repetition.

    Rows of one condition follow each other, so that those that are compared meet the same state of the machine.
    Mutates: measured.
    """
    shuffler = random.Random(args.seed)
    for repetition in range(1, args.repetitions + 1):
        for one in shuffler.sample(measured, len(measured)):
            for row in shuffler.sample(one.rows, len(one.rows)):
                engine = by_name[row.name]
                if len(measured) > 1:
                    _warm_up(engine, one, SETTLING_TOKENS)
                condition = one.condition
                row.runs.append(
                    engine.run(one.token_ids, args.max_tokens, condition.batch_size, emulation=condition.emulation)
                )
        yield repetition


def _warm_up(engine: Engine, one: Measured, num_tokens: int) -> None:
    batch_size = one.condition.batch_size
    prompts = one.token_ids[: max(NUM_WARM_UP_PROMPTS, batch_size)]
    engine.run(prompts, num_tokens, batch_size, emulation=one.condition.emulation)


def compare(one: Measured, gap_of: GapOf) -> None:
    """Compare every repetition of every row with the first one of the baseline. Mutates: one.rows."""
    expected = [request.token_ids for request in one.rows[0].runs[0].requests]
    for row in one.rows:
        outputs = [[request.token_ids for request in run.requests] for run in row.runs]
        found = dict.fromkeys(
            difference for got in outputs for difference in first_differences(row.name, expected, got)
        )
        row.differences = with_gaps(list(found), one.token_ids, expected, gap_of)


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


if __name__ == "__main__":
    sys.exit(main())
