"""Where the time of a decode benchmark went: times of the bare models, and the parts of an engine step.

Owns arithmetic over observed forwards and counters. Runs in the process of the benchmark.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.decode_rows import PEARL, SEQUENTIAL, Row
from vllm_specbranch.emulation import Pace
from vllm_specbranch.measure_messages import Emulation, Forward, RunResult
from vllm_specbranch.report import percentile

# Of a forward with a given number of tokens; a median of fewer says little.
LEAST_FORWARDS = 5


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """Times of the bare models under one condition.

    Attributes:
        target_round_ms: median time between two outputs of the baseline: a decode step of the target with vLLM around it.
        target_forward_ms: median forward of the baseline with one token per request; None if forwards were not observed.
        draft_step_ms: a step of the draft server with one row per request, all that it does around its forward included (its own
            running mean), from `pearl` where that is run (it has no other rows); None if there was no such step.
        draft_forward_ms: median forward of the draft model in such steps; None if forwards were not observed.
        c: `target_round_ms / draft_step_ms`.
        c_of_forwards: `target_forward_ms / draft_forward_ms`.
        target_ms_by_tokens: median forward of the target by its query tokens, over all rows with the target's cores and no draft
            server beside them.
        target_ms_by_tokens_beside_draft: the same over all rows with one, which on one machine slows the target down.
        draft_ms_by_rows: median step of the draft server by its rows, over all rows with one.
    """

    target_round_ms: float
    target_forward_ms: float | None
    draft_step_ms: float | None
    draft_forward_ms: float | None
    c: float | None
    c_of_forwards: float | None
    target_ms_by_tokens: dict[int, float]
    target_ms_by_tokens_beside_draft: dict[int, float]
    draft_ms_by_rows: dict[int, float]


@dataclass(frozen=True, slots=True)
class StepParts:
    """Where the time of an engine step went, in ms; the parts add up to the whole. None for what is not known: it is in the rest.

    Attributes:
        target_ms: forwards of the target, prefills included.
        draft_wait_ms: what the engine waits for drafts, less messages; for draft_model the draft's forwards themselves.
        messages_ms: of the engine's wait for drafts, what messages were on their way.
        propose_ms: the proposer's own work.
        rest_ms: scheduling, sampling, detokenisation, and whatever above is not known.
        draft_busy: share of the whole time in which the draft model computed, for whichever outcome.
    """

    step_ms: float
    target_ms: float | None
    draft_wait_ms: float | None
    messages_ms: float | None
    propose_ms: float | None
    rest_ms: float
    draft_busy: float | None


def model_times(rows: Sequence[Row], batch_size: int) -> ModelTimes:
    """Measure what a round and a draft step cost; the baseline is the first row."""
    baseline = rows[0]
    times = [request.output_times_s for run in baseline.runs for request in run.requests]
    round_ms = 1e3 * percentile((later - earlier for one in times for earlier, later in pairwise(one)), 0.5)
    alone = [row for row in rows if not row.entry.is_wide]
    # Apart: in one line what a draft server costs the target would look like a price of further tokens.
    target, beside = (
        medians_ms(run.target_forwards for row in alone if row.entry.is_ours == is_ours for run in row.runs)
        for is_ours in (False, True)
    )
    draft = medians_ms(run.draft_forwards for row in alone if row.entry.is_ours for run in row.runs)
    forward_ms = medians_ms(run.target_forwards for run in baseline.runs).get(batch_size)
    step_ms, draft_forward_ms = _draft_step_ms(rows, batch_size), _draft_forward_ms(rows, batch_size)
    return ModelTimes(
        target_round_ms=round_ms,
        target_forward_ms=forward_ms,
        draft_step_ms=step_ms,
        draft_forward_ms=draft_forward_ms,
        c=round_ms / step_ms if step_ms else None,
        c_of_forwards=forward_ms / draft_forward_ms if draft_forward_ms and forward_ms else None,
        target_ms_by_tokens=target,
        target_ms_by_tokens_beside_draft=beside,
        draft_ms_by_rows=draft,
    )


def step_parts(row: Row) -> StepParts:
    """Divide the wall time of the repetition whose engine steps were of median length: a disturbed one moves nothing."""
    run = sorted(row.runs, key=_step_s)[(len(row.runs) - 1) // 2]
    per_step = 1e3 / run.num_steps if run.num_steps else math.nan
    target_s, draft_s = _total_s(run.target_forwards), _total_s(run.draft_forwards)
    wait_s = draft_s if row.entry.group == SEQUENTIAL else run.engine_counters.get("wait_s")
    messages_s, propose_s = (run.engine_counters.get(name) for name in ("messages_s", "propose_s"))
    if wait_s is not None and messages_s is not None:
        wait_s -= messages_s
    known_s = sum(one for one in (target_s, wait_s, messages_s, propose_s) if one is not None)

    def each_ms(seconds: float | None) -> float | None:
        return None if seconds is None else per_step * seconds

    return StepParts(
        step_ms=per_step * run.wall_s,
        target_ms=each_ms(target_s),
        draft_wait_ms=each_ms(wait_s),
        messages_ms=each_ms(messages_s),
        propose_ms=each_ms(propose_s),
        rest_ms=per_step * (run.wall_s - known_s),
        draft_busy=None if draft_s is None else draft_s / run.wall_s,
    )


def _step_s(run: RunResult) -> float:
    return run.wall_s / max(1, run.num_steps)


def overrun_share(row: Row, emulation: Emulation | None) -> float:
    """Share of the emulated forwards that took longer than they should have, because the cores were too slow.

    Prefills are left out: they always do, and steady decoding has none.
    """
    if emulation is None:
        return 0.0
    most_tokens = row.batch_size * (1 + (row.entry.spec.speculative or {}).get("num_speculative_tokens", 0))
    target = [one for run in row.runs for one in run.target_forwards if one.num_tokens <= most_tokens]
    draft = [one for run in row.runs for one in run.draft_forwards]
    late = Pace(emulation.target_forward_ms, emulation.target_token_cost).num_overruns(target)
    late += Pace(emulation.draft_step_ms, emulation.draft_token_cost).num_overruns(draft)
    return late / max(1, len(target) + len(draft))


def _drafting(rows: Sequence[Row]) -> list[Row]:
    """The row of ours whose draft steps are looked at, if there is one."""
    return sorted((row for row in rows if row.entry.is_ours), key=lambda row: row.name != PEARL)[:1]


def _draft_step_ms(rows: Sequence[Row], batch_size: int) -> float | None:
    for row in _drafting(rows):
        steps_us = [run.server_timings_us.get(f"step_{batch_size}_rows") for run in row.runs]
        if known := [one for one in steps_us if one is not None]:
            return statistics.median(known) / 1e3
    return None


def _draft_forward_ms(rows: Sequence[Row], batch_size: int) -> float | None:
    for row in _drafting(rows):
        return medians_ms(run.draft_forwards for run in row.runs).get(batch_size)
    return None


def medians_ms(runs: Iterable[Sequence[Forward]]) -> dict[int, float]:
    """Median duration by number of tokens, where there are enough."""
    durations: dict[int, list[float]] = defaultdict(list)
    for forwards in runs:
        for one in forwards:
            durations[one.num_tokens].append(1e3 * (one.end_s - one.start_s))
    return {
        tokens: statistics.median(found) for tokens, found in sorted(durations.items()) if len(found) >= LEAST_FORWARDS
    }


def _total_s(forwards: Sequence[Forward]) -> float | None:
    """Seconds in forwards; None if there are none."""
    return sum(one.end_s - one.start_s for one in forwards) if forwards else None
