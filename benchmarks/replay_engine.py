"""The real engine beside the replay: does it take the rounds that the replay says, and where does the rest of its time go?

Owns the two comparisons. In the first the engine is `deterministic`, so its counts do not depend on time and must be those of the
replay. In the second its forwards are stretched to given times (`Emulation`), and the replay is given the same ones: what a round
takes longer is waiting for drafts, the proposer, or vLLM itself. Runs in the process of the benchmark.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_specbranch.lineup import Lineup
from vllm_specbranch.measure import Engine
from vllm_specbranch.measure_messages import Emulation, EngineSpec, RunResult
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


def check_engine(lineup: Lineup, study: Study, prompts: Sequence[Sequence[int]], max_tokens: int) -> dict[str, Any]:
    """Both comparisons for every case.

    Returns:
        For JSON: `deterministic`, `observed`, and whether all `agrees`.
    """
    deterministic, observed = [], []
    plain = dataclasses.replace(lineup, observe=True).plain("plain observed")
    around_ms = around_forwards_ms(_run(plain, prompts, max_tokens, study.batch_size, EMULATION))
    bare = times_of(EMULATION)
    in_vllm = dataclasses.replace(bare, overhead_ms=around_ms)
    for name, settings in CASES.items():
        ours: dict[str, Any] = {**settings, "num_speculative_tokens": NUM_SPECULATIVE_TOKENS}
        more = dict(settings)
        spec = lineup.specbranch(NUM_SPECULATIVE_TOKENS, f"{name} deterministic", deterministic=True, **more)
        run = _run(spec, prompts, max_tokens, study.batch_size)
        replayed = study.run({**ours, "deterministic": True}, Times(10.0, 1.0))
        deterministic.append(compare_counts(name, run, replayed))
        watched = dataclasses.replace(lineup, observe=True).specbranch(
            NUM_SPECULATIVE_TOKENS, f"{name} observed", **more
        )
        run = _run(watched, prompts, max_tokens, study.batch_size, EMULATION)
        observed.append(split_time(name, run, study.run(ours, bare), study.run(ours, in_vllm)))
    agrees = all(one["agrees"] for one in deterministic)
    return {
        "deterministic": deterministic,
        "observed": observed,
        "around_plain_forwards_ms": around_ms,
        "agrees": agrees,
    }


def around_forwards_ms(run: RunResult) -> float:
    """What vLLM adds to each forward of plain decoding: scheduling, sampling, outputs."""
    forwards_s = sum(one.end_s - one.start_s for one in run.target_forwards)
    return 1e3 * (run.wall_s - forwards_s) / len(run.target_forwards)


def _run(
    spec: EngineSpec,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    batch_size: int,
    emulation: Emulation | None = None,
) -> RunResult:
    with Engine(spec) as engine:
        engine.wait_until_ready()
        engine.run(prompts[:2], max_tokens, batch_size)
        return engine.run(prompts, max_tokens, batch_size, emulation=emulation)


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


def split_time(name: str, run: RunResult, replayed: Replayed, in_vllm: Replayed) -> dict[str, Any]:
    """Where a round of an observed engine goes, beside the replay with the same times.

    Args:
        in_vllm: another replay, whose target rounds also hold what plain vLLM adds to a forward: the distance to it is this
            project's own.
    """
    num_rounds = len(run.target_forwards)
    forward_ms = 1e3 * sum(one.end_s - one.start_s for one in run.target_forwards) / num_rounds
    round_ms = 1e3 * run.wall_s / num_rounds
    wait_ms = 1e3 * run.engine_counters["wait_s"] / num_rounds
    propose_ms = 1e3 * run.engine_counters["propose_s"] / num_rounds
    return {
        "name": name,
        "num_rounds": num_rounds,
        "replay_rounds": replayed.num_forwards,
        "round_ms": round_ms,
        "replay_round_ms": 1e3 * replayed.time_s / replayed.num_forwards,
        "target_forward_ms": forward_ms,
        "wait_ms": wait_ms,
        "replay_wait_ms": 1e3 * replayed.wait_s / replayed.num_forwards,
        "propose_ms": propose_ms,
        "rest_ms": round_ms - forward_ms - wait_ms - propose_ms,
        "hit_rate": run.server_counters["num_hits"] / max(1, run.server_counters["num_rounds"]),
        "replay_hit_rate": replayed.server["num_hits"] / max(1, replayed.server["num_rounds"]),
        "num_overruns": run.num_overruns,
        "share_of_oracle": replayed.time_s / run.wall_s,
        "share_of_oracle_in_vllm": in_vllm.time_s / run.wall_s,
    }
