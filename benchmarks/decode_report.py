"""What `bench_decode` writes: a table per condition, the notes under it, and the JSON.

Owns layout and the shape of the result (schema version 2); arithmetic is in `decode_intervals` and `decode_times`. Starts nothing.
Runs in the process of the benchmark.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import msgspec

from benchmarks.decode_conditions import Condition, describe_emulation
from benchmarks.decode_intervals import Ratio, ratio, spread
from benchmarks.decode_rows import SEQUENTIAL, Row, rivals
from benchmarks.decode_times import ModelTimes, medians_ms, model_times, overrun_share, step_parts
from vllm_specbranch.compare import as_json
from vllm_specbranch.measure_messages import Forward, RunResult
from vllm_specbranch.report import Summary, number, percent, summarize, table

# Below this a lower bound of the ratio to plain counts as "slower".
NOT_SLOWER = 0.98
# Of one request, for the picture of who waits for whom.
NUM_TIMELINE_ROUNDS = 15
# Engine steps of a repetition that its speed should be made of at least.
LEAST_STEADY_STEPS = 30
# Of emulated forwards that took too long; beyond that the emulation is not to be believed.
MOST_OVERRUNS = 0.05


@dataclass(slots=True)
class Measured:
    """All rows under one condition, the baseline first.

    Attributes:
        names: of the prompts.
        token_ids: the prompts.
        seed: of the bootstrap.
    """

    condition: Condition
    names: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    rows: list[Row] = field(default_factory=list)
    seed: int = 0

    def ratio(self, row: Row, to: Row) -> Ratio:
        """The speed of a row relative to another one."""
        return ratio(to.name, row.ratios(to), self.seed)

    def times(self) -> ModelTimes:
        """Of the bare models."""
        return model_times(self.rows, self.condition.batch_size)

    def controls(self) -> list[Row]:
        """Rows that do what the baseline does, so that their ratio shows the noise of the run."""
        return [
            row
            for row in self.rows
            if row.entry.group == "no_plugin"
            or (row.entry.group == "async_off" and not self.rows[0].entry.facts.get("async_scheduling"))
        ]

    def not_slower(self) -> list[tuple[str, Ratio]]:
        """Each row of ours, and how it stands to the baseline."""
        return [(row.name, self.ratio(row, self.rows[0])) for row in self.rows if row.entry.is_ours]


# --- text ------------------------------------------------------------------------------------------------------------


def as_text(measured: Measured) -> str:
    """The whole report of one condition."""
    parts = [f"=== {measured.condition.label} ===", speed_table(measured), times_note(measured.times())]
    parts += scheduling_text(measured.rows)
    parts += ["Where an engine step went (ms, whole runs with their prefills):\n" + parts_table(measured)]
    if any(row.entry.is_ours for row in measured.rows):
        parts += [rivals_text(measured), not_slower_text(measured)]
    parts += [f"Doubt: {one}." for one in doubts(measured)]
    parts += steadiness_text(measured.rows)
    if measured.condition.emulation is not None:
        parts.append(overruns_text(measured))
    return "\n\n".join(parts)


def speed_table(measured: Measured) -> str:
    """Medians over repetitions, how far they spread, and how sure the ratio is."""
    headers = ["", "tokens/s", "(least..most)", "over plain", "[95% interval]", "whole run", "inter-token p50", "p99"]
    headers += ["acceptance length", "hits", "rollback", "runs on", "token ids"]
    lines = []
    for row in measured.rows:
        speed, over, summary = spread(row.tokens_per_s), measured.ratio(row, measured.rows[0]), summarize(row.runs)
        whole = spread(row.whole_run_ratios(measured.rows[0]))
        lines.append(
            [
                row.name,
                number(speed.median, 1),
                f"({speed.least:.1f}..{speed.most:.1f})",
                number(over.median, 2, "x"),
                _interval(over),
                number(whole.median, 2, "x"),
                number(summary.inter_token_ms[0], 2, " ms"),
                number(summary.inter_token_ms[1], 2, " ms"),
                number(summary.mean_acceptance_length),
                percent(summary.hit_rate),
                percent(summary.rollback_rate),
                row.entry.runs_on,
                row.sameness,
            ]
        )
    return table(headers, lines)


def parts_table(measured: Measured) -> str:
    """Where the time of an engine step went, and what the draft server did meanwhile."""
    headers = [
        "",
        "step",
        "target forward",
        "waiting for drafts",
        "messages",
        "proposer",
        "rest of vLLM",
        "draft model busy",
    ]
    headers += ["draft steps per round", "rows per step", "late replies", "server lost"]
    lines = []
    for row in measured.rows:
        one = step_parts(row)
        steps_per_round, rows_per_step = server_work(row.runs)
        lines.append(
            [
                row.name,
                number(one.step_ms),
                number(one.target_ms),
                number(one.draft_wait_ms),
                number(one.messages_ms),
                number(one.propose_ms),
                number(one.rest_ms),
                percent(one.draft_busy),
                number(steps_per_round, 1),
                number(rows_per_step, 1),
                _late_replies(row.runs) if row.entry.is_ours else "-",
                _times_lost(row.runs) if row.entry.is_ours else "-",
            ]
        )
    return table(headers, lines)


def times_note(times: ModelTimes) -> str:
    """The times of the bare models, in words."""
    lines = [
        f"A round of the target with vLLM around it takes {number(times.target_round_ms)} ms, its forward "
        f"{number(times.target_forward_ms)} ms, a draft step {number(times.draft_step_ms)} ms, its forward "
        f"{number(times.draft_forward_ms)} ms: c = {number(times.c, 1)} (of forwards alone {number(times.c_of_forwards, 1)})."
    ]
    for what, found in (
        ("Target forward by tokens", times.target_ms_by_tokens),
        ("Target forward by tokens, beside a draft server", times.target_ms_by_tokens_beside_draft),
        ("Draft step by rows", times.draft_ms_by_rows),
    ):
        if found:
            lines.append(f"{what}: " + ", ".join(f"{tokens}: {number(ms)} ms" for tokens, ms in found.items()))
    return "\n".join(lines)


def scheduling_text(rows: Sequence[Row]) -> list[str]:
    """Which rows schedule asynchronously, as our method cannot; nothing without the row that shows its price."""
    control = next((row for row in rows if row.entry.group == "async_off"), None)
    if control is None:
        return []
    asynchronous = [row.name for row in rows if row.entry.facts.get("async_scheduling")]
    if asynchronous:
        return [f"Asynchronous scheduling is on in {', '.join(asynchronous)}, and off in all others."]
    return [
        f"vLLM does not schedule asynchronously on this device, in no row: {control.name!r} is a second plain engine, and its "
        "ratio shows the noise of this run."
    ]


def rivals_text(measured: Measured) -> str:
    """Each row of ours against the strongest rows of the others."""
    others = rivals(measured.rows)
    headers = ["Speed relative to", *(_rival_name(one) for one in others)]
    lines = []
    for row in measured.rows:
        if row.entry.is_ours:
            found = [measured.ratio(row, one) for one in others]
            lines.append([row.name, *(f"{one.median:.2f}x {_interval(one)}" for one in found)])
    return table(headers, lines)


def not_slower_text(measured: Measured) -> str:
    """Whether speculation costs anything where it does not pay."""
    words = [
        f"{name} {'yes' if one.low >= NOT_SLOWER else 'NO'} ({one.low:.2f})" for name, one in measured.not_slower()
    ]
    text = f"Not slower than plain (lower bound at least {NOT_SLOWER}): " + ", ".join(words)
    for control in measured.controls():
        same = measured.ratio(control, measured.rows[0])
        text += f"\n{control.name!r} is a plain engine too: {same.median:.2f}x {_interval(same)}"
        text += ". So this run cannot tell." if same.low < NOT_SLOWER else "."
    return text


def steadiness_text(rows: Sequence[Row]) -> list[str]:
    """Which speeds are made of few engine steps."""
    few = {row.name: min(row.num_steady_steps) for row in rows if min(row.num_steady_steps) < LEAST_STEADY_STEPS}
    if not few:
        return []
    words = ", ".join(f"{name} {count or 'none, so whole runs count'}" for name, count in few.items())
    return [f"Full batches without a prefill lasted few engine steps (more --max-tokens would help): {words}"]


def edge_doubt(best: int | None, tried: Sequence[int]) -> list[str]:
    """What to doubt if draft_model was best at the edge of what was tried; nothing otherwise. Below 1 there is nothing to try.

    Args:
        best: its best number of draft tokens; None where there is no such row.
        tried: all numbers that ran.
    """
    if best is None or not tried or not (best == max(tried) or (best == min(tried) and best > 1)):
        return []
    return [f"draft_model was best at the edge of the draft tokens tried, {best}: its real best may be beyond"]


def doubts(measured: Measured) -> list[str]:
    """What a reader should know before believing the comparison with draft_model, on the target's cores and on all."""
    found = []
    for is_wide in (False, True):
        group = [row for row in measured.rows if row.entry.group == SEQUENTIAL and row.entry.is_wide == is_wide]
        tried = {row.name: (row.entry.spec.speculative or {}).get("num_speculative_tokens") for row in group}
        best = next((tried[row.name] for row in rivals(group)), None)
        told = edge_doubt(best, [one for one in tried.values() if one is not None])
        found += [f"{one} ({group[0].entry.runs_on}; see --gammas)" for one in told]
    return found


def overruns_text(measured: Measured) -> str:
    """Whether the cores kept up with the emulated durations."""
    shares = {row.name: overrun_share(row, measured.condition.emulation) for row in measured.rows}
    worst = max(shares, key=lambda name: shares[name])
    text = f"Emulated forwards that took more than 1.1 times as long as they should: at most {shares[worst]:.1%} ({worst})."
    if shares[worst] > MOST_OVERRUNS:
        text += " That is too many: these cores are too slow for these durations."
    return text


def _rival_name(row: Row) -> str:
    return row.name + (" (its best)" if row.entry.group == SEQUENTIAL else "")


def _interval(found: Ratio) -> str:
    return f"[{found.low:.2f}..{found.high:.2f}]"


def _late_replies(runs: Sequence[RunResult]) -> str:
    late, batches = (
        sum(run.engine_counters.get(name, 0) for run in runs) for name in ("num_reply_timeouts", "num_commit_batches")
    )
    return f"{late:.0f} of {batches:.0f}"


def _times_lost(runs: Sequence[RunResult]) -> str:
    """How often the engine went on without drafts because the draft server was silent, and runs at whose end it still was."""
    openings = sum(run.engine_counters.get("num_breaker_openings", 0) for run in runs)
    without = sum(not run.server_counters for run in runs)
    return f"{openings:.0f}" + (f", {without} runs without" if without else "")


def server_work(runs: Sequence[RunResult]) -> tuple[float | None, float | None]:
    """Return (draft steps per round, rows per step) of the draft server; None for other methods."""
    rounds, steps, rows = (
        sum(run.server_counters.get(name, 0) for run in runs) for name in ("num_rounds", "num_steps", "num_rows")
    )
    return (steps / rounds if rounds else None), (rows / steps if steps else None)


# --- JSON ------------------------------------------------------------------------------------------------------------


def measured_as_json(measured: Measured) -> dict[str, Any]:
    """All that is known under one condition."""
    condition = measured.condition
    return {
        "label": condition.label,
        "prompt_set": condition.prompt_set,
        "batch_size": condition.batch_size,
        "emulation": None if condition.emulation is None else msgspec.to_builtins(condition.emulation),
        "times_are": describe_emulation(condition.emulation),
        "prompts": list(measured.names),
        "prompt_tokens": [len(one) for one in measured.token_ids],
        "baseline": measured.rows[0].name,
        "doubts": doubts(measured),
        "model_times": dataclasses.asdict(measured.times()),
        "rows": [_row_as_json(measured, row) for row in measured.rows],
    }


def _row_as_json(measured: Measured, row: Row) -> dict[str, Any]:
    entry, baseline = row.entry, measured.rows[0]
    return {
        "name": row.name,
        "group": entry.group,
        "is_ours": entry.is_ours,
        "speculative_config": entry.spec.speculative,
        "runs_on": entry.runs_on,
        "num_devices": entry.num_devices,
        "is_wide": entry.is_wide,
        "facts": entry.facts,
        "tokens_per_s": dataclasses.asdict(spread(row.tokens_per_s)),
        "ratio_to_baseline": dataclasses.asdict(measured.ratio(row, baseline)),
        "whole_run_tokens_per_s": dataclasses.asdict(spread(row.whole_run_tokens_per_s)),
        "whole_run_ratio_to_baseline": dataclasses.asdict(
            ratio(baseline.name, row.whole_run_ratios(baseline), measured.seed)
        ),
        "ratios_to_rivals": [dataclasses.asdict(measured.ratio(row, one)) for one in rivals(measured.rows)],
        "over_all_repetitions": _summary(row.runs),
        "step_parts": dataclasses.asdict(step_parts(row)),
        "target_ms_by_tokens": medians_ms(run.target_forwards for run in row.runs),
        "draft_ms_by_tokens": medians_ms(run.draft_forwards for run in row.runs),
        "overrun_share": overrun_share(row, measured.condition.emulation),
        "accepted_by_position": _sums([run.accepted_by_position for run in row.runs]),
        "drafted_by_position": _sums([run.drafted_by_position for run in row.runs]),
        "identical": not row.differences,
        "differences": as_json(row.differences),
        "timeline": timeline(row.runs[0]),
        "samples": [
            {"steady_tokens_per_s": speed, "num_steady_steps": steps, **_sample(run)}
            for speed, steps, run in zip(row.tokens_per_s, row.num_steady_steps, row.runs, strict=True)
        ],
    }


def timeline(run: RunResult) -> dict[str, Any]:
    """The first rounds of the first request, in seconds since its first output.

    Returns:
        `outputs` as [time, tokens], `target_forwards` and `draft_forwards` as [start, end, query tokens].
    """
    request = run.requests[0]
    times = request.output_times_s[: NUM_TIMELINE_ROUNDS + 1]
    start_s, end_s = times[0], times[-1]

    def within(forwards: Sequence[Forward]) -> list[list[float]]:
        begun = takewhile(lambda one: one.start_s < end_s, forwards)
        return [
            [round(one.start_s - start_s, 6), round(one.end_s - start_s, 6), one.num_tokens]
            for one in begun
            if one.end_s > start_s
        ]

    return {
        "outputs": [[round(one - start_s, 6), size] for one, size in zip(times, request.output_sizes, strict=False)],
        "target_forwards": within(run.target_forwards),
        "draft_forwards": within(run.draft_forwards),
    }


def _sample(run: RunResult) -> dict[str, Any]:
    return {
        **_summary([run]),
        "first_token_s": [request.output_times_s[0] - request.start_s for request in run.requests],
        "request_s": [request.output_times_s[-1] - request.start_s for request in run.requests],
        "num_outputs": [len(request.output_times_s) for request in run.requests],
        "engine_counters": run.engine_counters,
        "server_counters": run.server_counters,
        "server_timings_us": run.server_timings_us,
        "num_overruns": run.num_overruns,
        "vllm_counters": {
            "num_drafts": run.num_drafts,
            "num_draft_tokens": run.num_draft_tokens,
            "num_accepted_tokens": run.num_accepted_tokens,
        },
    }


def _summary(runs: Sequence[RunResult]) -> dict[str, Any]:
    found: Summary = summarize(runs)
    return dataclasses.asdict(found)


def _sums(rows: Sequence[Sequence[int]]) -> list[int]:
    length = max(map(len, rows), default=0)
    return [sum(row[place] for row in rows if place < len(row)) for place in range(length)]
