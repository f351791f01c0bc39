"""What the search found, run on engines: vLLM's `draft_model` and specbranch, each beside plain vLLM.

Owns the order of the runs and their ratios. Replays know neither contention nor chance; a recommendation is made by these runs.
Two engines live at a time, and only one of them decodes. Runs in the process of `tune`; the engines in their own.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from vllm_specbranch.config import METHOD
from vllm_specbranch.lineup import Lineup
from vllm_specbranch.measure import Engine, MeasureError, running
from vllm_specbranch.measure_messages import EngineSpec, RunResult

NUM_REPETITIONS = 5

# Of each alternative by its name: tokens/s over plain vLLM's in the same repetition, `[repetition]`.
Ratios = Mapping[str, Sequence[float]]


def sequential_name(gamma: int) -> str:
    """Of `draft_model` with so many draft tokens."""
    return f"vLLM draft_model, {gamma} draft tokens"


def check(
    lineup: Lineup,
    texts: Sequence[str],
    gammas: Iterable[int],
    candidates: Mapping[str, Mapping[str, object]],
    max_tokens: int,
    batch_size: int,
    write: Callable[[str], object],
) -> Ratios:
    """Run each alternative beside plain vLLM; one that fails is told and left out.

    Args:
        lineup: of the pair; the engines are not observed, which costs time.
        gammas: draft tokens of `draft_model`, one alternative each.
        candidates: by name, settings of specbranch.
        max_tokens: new tokens of each prompt.
    """
    quiet = dataclasses.replace(lineup, num_engines=2, observe=False)
    specs = [quiet.draft_model(gamma, sequential_name(gamma)) for gamma in gammas]
    for name, settings in candidates.items():
        keys = {key: value for key, value in settings.items() if key != "num_speculative_tokens"}
        specs.append(quiet.specbranch(int(str(settings["num_speculative_tokens"])), name, **keys))
    write(f"\nChecking on engines, each beside plain vLLM, {NUM_REPETITIONS} times in turn:\n")
    ratios: dict[str, list[float]] = {}
    for spec in specs:
        try:
            pairs = _beside_plain(quiet.plain(), spec, texts, max_tokens, batch_size)
        except MeasureError as error:
            write(f"   -    {spec.name}: {error}\n")
            continue
        found = ratios[spec.name] = [_speed(ours) / _speed(plain) for plain, ours in pairs]
        write(
            f"  {statistics.median(found):5.2f}  {spec.name} ({min(found):.2f} to {max(found):.2f}), {_sameness(pairs)}\n"
        )
    return ratios


def _beside_plain(
    plain: EngineSpec, spec: EngineSpec, texts: Sequence[str], max_tokens: int, batch_size: int
) -> list[tuple[RunResult, RunResult]]:
    """`[repetition]` of (plain vLLM's run, the other's); each of them begins every second time.

    Raises:
        MeasureError: one of them failed, or the draft server was never there.
    """
    with running([plain, spec]) as engines:
        prompts = engines[0].encode(texts)
        for engine in engines:
            # A whole batch: its shapes, and what decides by measured times, are seen before it counts.
            engine.run(prompts[:batch_size], max_tokens, batch_size)
        pairs = []
        for index in range(NUM_REPETITIONS):
            order: Sequence[Engine] = engines if index % 2 == 0 else engines[::-1]
            runs = {engine.spec.name: engine.run(prompts, max_tokens, batch_size) for engine in order}
            pairs.append((runs[plain.name], runs[spec.name]))
    is_ours = (spec.speculative or {}).get("method") == METHOD
    if is_ours and not any(ours.server_counters.get("num_rounds") for _, ours in pairs):
        raise MeasureError("its draft server was never there, so it decoded without drafts")
    return pairs


def _speed(run: RunResult) -> float:
    return run.num_tokens / run.wall_s


def _sameness(pairs: Sequence[tuple[RunResult, RunResult]]) -> str:
    """What became of the token ids."""
    answers = [
        (one.token_ids, other.token_ids)
        for plain, ours in pairs
        for one, other in zip(plain.requests, ours.requests, strict=True)
    ]
    different = sum(one != other for one, other in answers)
    return f"{different} of {len(answers)} answers differ" if different else "token ids identical"
