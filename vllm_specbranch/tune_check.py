"""What the search found, run on engines: plain vLLM, its `draft_model` and specbranch in turn, several times.

Owns the order of the runs and their ratios. Replays know neither contention nor chance; a recommendation is made by these runs.
Runs in the process of `tune`; the engines in their own.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from vllm_specbranch.lineup import Lineup
from vllm_specbranch.measure import Engine, running

NUM_REPETITIONS = 5
PLAIN, SEQUENTIAL = "plain", "draft_model"

# Of each engine by its name: tokens/s over plain vLLM's of the same repetition, `[repetition]`.
Ratios = Mapping[str, Sequence[float]]


def check(
    lineup: Lineup,
    texts: Sequence[str],
    gamma: int,
    candidates: Mapping[str, Mapping[str, object]],
    max_tokens: int,
    batch_size: int,
    write: Callable[[str], object],
) -> Ratios:
    """Run them, interleaved, after one prompt each to warm up.

    Args:
        lineup: of the pair; the engines are not observed, which costs time.
        gamma: draft tokens of `draft_model`.
        candidates: by name, settings of specbranch.
        max_tokens: new tokens of each prompt.

    Raises:
        MeasureError: an engine failed.
    """
    quiet = dataclasses.replace(lineup, num_engines=2 + len(candidates), observe=False)
    specs = [quiet.plain(PLAIN), quiet.draft_model(gamma, SEQUENTIAL)]
    for name, settings in candidates.items():
        keys = {key: value for key, value in settings.items() if key != "num_speculative_tokens"}
        specs.append(quiet.specbranch(int(str(settings["num_speculative_tokens"])), name, **keys))
    write(f"\nChecking on {len(specs)} engines, {NUM_REPETITIONS} times in turn:\n")
    with running(specs, at_once=2) as engines:
        prompts = engines[0].encode(texts)
        for engine in engines:
            engine.run(prompts[:1], max_tokens, batch_size)
        speeds = [_speeds(engines, prompts, max_tokens, batch_size) for _ in range(NUM_REPETITIONS)]
    ratios = {spec.name: [one[spec.name] / one[PLAIN] for one in speeds] for spec in specs}
    for name, values in ratios.items():
        write(f"  {statistics.median(values):5.2f}  {name} ({min(values):.2f} to {max(values):.2f})\n")
    return ratios


def _speeds(
    engines: Sequence[Engine], prompts: Sequence[Sequence[int]], max_tokens: int, batch_size: int
) -> dict[str, float]:
    """Tokens/s of each engine, one after the other."""
    runs = {engine.spec.name: engine.run(prompts, max_tokens, batch_size) for engine in engines}
    return {name: run.num_tokens / run.wall_s for name, run in runs.items()}
