"""Made-up results of the decode benchmark, for tests of its report and its pictures. No engine is started."""

from benchmarks.decode_conditions import Condition
from benchmarks.decode_report import Measured
from benchmarks.decode_rows import Entry, Row
from vllm_specbranch.measure_messages import Emulation, EngineSpec, Forward, RequestTrace, RunResult

GROUPS = {"plain, async off": "async_off", "specbranch, no cut": "ablations"}


def made_run(
    wall_s: float,
    batch_size: int = 1,
    is_ours: bool = False,
    num_rounds: int = 20,
    tokens_per_round: int = 1,
    draft_steps: int = 0,
) -> RunResult:
    """A run in which each request has `num_rounds` outputs, evenly spaced, after the first.

    The target's forwards take half of each round; the draft's steps fill the other half, or with `is_ours` all of it.
    """
    round_s = wall_s / (num_rounds + 1)
    times = [round_s * (index + 1) for index in range(num_rounds + 1)]
    sizes = [1] + [tokens_per_round] * num_rounds
    requests = [RequestTrace(0.0, times, sizes, list(range(sum(sizes))), "") for _ in range(batch_size)]
    target = [Forward(time - round_s / 2, time, batch_size) for time in times]
    step_s = (round_s if is_ours else round_s / 2) / max(1, draft_steps)
    draft = [
        Forward(time + step_s * step, time + step_s * (step + 1), batch_size)
        for time in times
        for step in range(draft_steps)
    ]
    counters = {"wait_s": wall_s / 10, "messages_s": wall_s / 50, "propose_s": wall_s / 20}
    counters |= {"num_commit_batches": 4.0, "num_reply_timeouts": 1.0}
    accepted = tokens_per_round - 1
    return RunResult(
        wall_s,
        num_rounds + 1,
        requests,
        engine_counters=counters if is_ours else {},
        server_counters={"num_rounds": 10.0, "num_steps": 40.0, "num_rows": 80.0, "num_hits": 7.0, "num_misses": 3.0}
        if is_ours
        else {},
        # A step of the server is longer than its forward.
        server_timings_us={f"step_{batch_size}_rows": 1.25e6 * step_s} if is_ours else {},
        target_forwards=target,
        draft_forwards=draft,
        accepted_by_position=[num_rounds] * accepted,
        drafted_by_position=[num_rounds] * accepted + [num_rounds // 2] * bool(accepted),
    )


def made_row(name: str, walls: list[float], batch_size: int = 1, tokens: int = 1, steps: int = 0) -> Row:
    """A row of one run per wall time."""
    is_wide = "2 cores" in name
    group = GROUPS.get(name, name.split()[0])
    is_ours = group not in ("plain", "async_off", "draft_model", "ngram")
    entry = Entry(
        EngineSpec(name, "m"), group, "core 0 + core 1" if is_ours else "core 0", 1 + (is_wide or is_ours), is_wide
    )
    runs = [
        made_run(wall, batch_size, is_ours, 60 // (tokens * (2 if batch_size > 1 else 1)), tokens, steps)
        for wall in walls
    ]
    return Row(entry, batch_size, runs)


def made_measured(batch_size: int = 1, emulation: Emulation | None = None) -> Measured:
    """A condition with the usual rows."""
    slower = 1 + 0.1 * (batch_size - 1)
    rows = [
        made_row("plain", [4.0, 4.2, 4.1], batch_size),
        made_row("draft_model 2", [2.6, 2.7, 2.8], batch_size, 2, 2),
        made_row("draft_model 4", [2.8, 2.8, 2.9], batch_size, 2, 4),
        made_row("plain on 2 cores", [3.0, 3.1, 3.0], batch_size),
        made_row("draft_model 2 on 2 cores", [2.2, 2.3, 2.2], batch_size, 2, 2),
        made_row("pearl", [2.0 * slower, 2.1 * slower, 2.2 * slower], batch_size, 3, 5),
        made_row("specbranch", [1.8 * slower, 1.9 * slower, 2.0 * slower], batch_size, 3, 5),
        made_row("specbranch, no cut", [1.9 * slower, 2.0 * slower, 2.1 * slower], batch_size, 3, 5),
    ]
    condition = Condition("python_holdout", batch_size, emulation)
    return Measured(condition, ["a"] * batch_size, [[1, 2, 3]] * batch_size, rows)
