"""The real engine beside the replay: does it take the rounds that the replay says, and where does the rest of its time go?

Owns the two comparisons. In the first the engine is `deterministic`, so its counts do not depend on time and must be those of the
replay. In the second its forwards are stretched to given times (`Emulation`), in its warm-up too, and the replay is given the same
ones: what a round takes longer is waiting for drafts, the proposer, or vLLM itself. Both speeds are those of steady decoding: the
replay knows no prefill, which on a CPU costs many rounds. Runs in the process of the benchmark.
"""

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.decode_intervals import bootstrap
from benchmarks.decode_rows import steady_tokens_per_s
from vllm_specbranch.lineup import Lineup
from vllm_specbranch.measure import Engine
from vllm_specbranch.measure_messages import Emulation, EngineSpec, Forward, RunResult
from vllm_specbranch.replay import Replayed, Times
from vllm_specbranch.replay_study import Study

TOLERANCE = 0.02
CASES: Mapping[str, Mapping[str, object]] = {
    "pearl": {"policy": "pearl"},
    "specbranch": {"policy": "specbranch"},
    "best_first": {"policy": "best_first"},
}
NUM_SPECULATIVE_TOKENS = 8
EMULATION = Emulation(target_forward_ms=20.0, draft_step_ms=2.0, draft_token_cost=0.02)
COMPARED = ("num_rounds", "num_hits")
# Of every engine under emulation, after its warm-up.
REPETITIONS = 3
NUM_WARM_UP_PROMPTS = 2


def check_engine(
    lineup: Lineup,
    study: Study,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> dict[str, Any]:
    """Both comparisons for every case.

    Args:
        repetitions: of every engine under emulation.
        seed: of the intervals.

    Returns:
        For JSON: `deterministic`, `observed`, and whether all `agrees`.
    """
    deterministic, observed, batch_size = [], [], study.batch_size
    watched = dataclasses.replace(lineup, observe=True)
    plain = _run(watched.plain("plain observed"), prompts, max_tokens, batch_size, EMULATION, repetitions)
    around_ms = around_forwards_ms(plain, batch_size)
    bare = times_of(EMULATION)
    in_vllm = dataclasses.replace(bare, overhead_ms=around_ms)
    for name, settings in CASES.items():
        ours: dict[str, Any] = {**settings, "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
        more = dict(settings)
        spec = lineup.specbranch(NUM_SPECULATIVE_TOKENS, f"{name} deterministic", deterministic=True, **more)
        (run,) = _run(spec, prompts, max_tokens, batch_size)
        replayed = study.run({**ours, "deterministic": True}, Times(10.0, 1.0))
        deterministic.append(compare_counts(name, run, replayed))
        spec = watched.specbranch(NUM_SPECULATIVE_TOKENS, f"{name} observed", **more)
        runs = _run(spec, prompts, max_tokens, batch_size, EMULATION, repetitions)
        observed.append(split_time(name, runs, study.run(ours, bare), study.run(ours, in_vllm), batch_size, seed))
    agrees = all(one["agrees"] for one in deterministic)
    return {
        "emulation": EMULATION,
        "deterministic": deterministic,
        "observed": observed,
        "around_plain_forwards_ms": around_ms,
        "agrees": agrees,
    }


def around_forwards_ms(runs: Sequence[RunResult], batch_size: int) -> float:
    """What vLLM adds to each forward of plain decoding: scheduling, sampling, outputs."""
    round_ms, forward_ms = _round_and_forward_ms(runs, batch_size)
    return round_ms - forward_ms


def _round_and_forward_ms(runs: Sequence[RunResult], most_tokens: int) -> tuple[float, float]:
    """Means over the rounds of steady decoding, or of all where there are none, from the start of a forward to that of the next."""
    rounds = [pair for run in runs for pair in _rounds(run.target_forwards, most_tokens)]
    rounds = rounds or [pair for run in runs for pair in pairwise(run.target_forwards)]
    round_s = statistics.fmean(later.start_s - one.start_s for one, later in rounds)
    return 1e3 * round_s, 1e3 * statistics.fmean(one.end_s - one.start_s for one, _ in rounds)


def _rounds(forwards: Sequence[Forward], most_tokens: int) -> Iterator[tuple[Forward, Forward]]:
    """Forwards that follow each other, neither of which is a prefill."""
    for one, later in pairwise(forwards):
        if max(one.num_tokens, later.num_tokens) <= most_tokens:
            yield one, later


def _run(
    spec: EngineSpec,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    batch_size: int,
    emulation: Emulation | None = None,
    repetitions: int = 1,
) -> list[RunResult]:
    """Run one engine again and again. It is warmed up under the same emulation: by its running means a draft server decides."""
    with Engine(spec) as engine:
        engine.wait_until_ready()
        engine.run(prompts[: max(NUM_WARM_UP_PROMPTS, batch_size)], max_tokens, batch_size, emulation=emulation)
        return [engine.run(prompts, max_tokens, batch_size, emulation=emulation) for _ in range(repetitions)]


def times_of(emulation: Emulation) -> Times:
    """The same durations for the replay."""
    return Times(
        emulation.target_forward_ms,
        emulation.draft_step_ms,
        emulation.target_token_cost,
        emulation.draft_token_cost,
    )


def compare_counts(name: str, run: RunResult, replayed: Replayed) -> dict[str, Any]:
    """Counts of a deterministic engine beside those of its replay; they agree within `TOLERANCE`."""
    engine = {key: int(run.server_counters[key]) for key in COMPARED}
    replay = {key: replayed.server[key] for key in COMPARED}
    distances = {key: abs(engine[key] - replay[key]) / max(1, replay[key]) for key in COMPARED}
    return {
        "name": name,
        "engine": engine,
        "replay": replay,
        "distances": distances,
        "agrees": max(distances.values()) <= TOLERANCE,
    }


def split_time(
    name: str,
    runs: Sequence[RunResult],
    replayed: Replayed,
    in_vllm: Replayed,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Where a round of an observed engine goes, beside the replay with the same times.

    Times are means over the rounds of steady decoding in all repetitions; those of waits and of the proposer over all rounds, as
    their counters know no prefill. Waits are for the draft server at work, of which `server_handling_ms` at most are not draft
    steps; what messages were on their way is apart. Shares are medians over repetitions.

    Args:
        runs: one per repetition.
        in_vllm: another replay, whose target rounds also hold what plain vLLM adds to a forward: the distance to it is this
            project's own.
        seed: of the intervals.
    """
    num_forwards = sum(len(run.target_forwards) for run in runs)
    round_ms, forward_ms = _round_and_forward_ms(runs, batch_size * (1 + NUM_SPECULATIVE_TOKENS))
    wait_ms, messages_ms, propose_ms = (
        1e3 * sum(run.engine_counters[counter] for run in runs) / num_forwards
        for counter in ("wait_s", "messages_s", "propose_s")
    )
    handling_ms = 1e-3 * sum(run.server_counters["handling_us"] for run in runs) / num_forwards
    hits, rounds = (sum(run.server_counters[counter] for run in runs) for counter in ("num_hits", "num_rounds"))
    speeds = [steady_tokens_per_s(run, batch_size) for run in runs]
    num_observed = sum(len(run.target_forwards) + len(run.draft_forwards) for run in runs)
    return {
        "name": name,
        "num_rounds": num_forwards / len(runs),
        "replay_rounds": replayed.num_forwards,
        "round_ms": round_ms,
        "replay_round_ms": 1e3 * replayed.time_s / replayed.num_forwards,
        "target_forward_ms": forward_ms,
        "wait_ms": wait_ms - messages_ms,
        "messages_ms": messages_ms,
        "server_handling_ms": handling_ms,
        "replay_wait_ms": 1e3 * replayed.wait_s / replayed.num_forwards,
        "propose_ms": propose_ms,
        "rest_ms": round_ms - forward_ms - wait_ms - propose_ms,
        "hit_rate": hits / max(1, rounds),
        "replay_hit_rate": replayed.server["num_hits"] / max(1, replayed.server["num_rounds"]),
        "num_overruns": sum(run.num_overruns for run in runs),
        "overrun_share": sum(run.num_overruns for run in runs) / max(1, num_observed),
        "tokens_per_s": speeds,
        "replay_tokens_per_s": replayed.steady_tokens_per_s,
        "share_of_oracle": _share(speeds, replayed, seed),
        "share_of_oracle_in_vllm": _share(speeds, in_vllm, seed),
    }


def _share(speeds: Sequence[float], replayed: Replayed, seed: int) -> dict[str, Any]:
    """Of the replay's speed."""
    shares = [one / replayed.steady_tokens_per_s for one in speeds]
    return {"median": statistics.median(shares), "interval": bootstrap(shares, seed), "samples": shares}
