"""What `bench_decode` writes: its rows, the table, the notes under it, and the JSON.

Owns arithmetic over repetitions and layout; starts nothing. Runs in the process of the benchmark.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from vllm_specbranch.compare import Difference, as_json
from vllm_specbranch.measure_messages import EngineSpec, RunResult
from vllm_specbranch.report import breakdown, number, percent, percentile, summarize, table

SEQUENTIAL = "draft_model"


@dataclass(slots=True)
class Row:
    """One line of the table: an engine, where it runs, and what it did, one run per repetition.

    Attributes:
        is_wide: whether it has the cores of target and draft together.
        facts: what vLLM made of the settings.
        differences: from the first repetition of the baseline, in any repetition.
    """

    spec: EngineSpec
    runs_on: str
    is_wide: bool = False
    runs: list[RunResult] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the engine."""
        return self.spec.name

    @property
    def tokens_per_s(self) -> list[float]:
        """One value per repetition."""
        return [run.num_tokens / run.wall_s for run in self.runs]

    @property
    def sameness(self) -> str:
        """`identical`, `ties`, or `DIFFERENT`."""
        if not self.differences:
            return "identical"
        return "ties" if all(one.is_tie for one in self.differences) else "DIFFERENT"

    def ratios(self, to: "Row") -> list[float]:
        """Speed relative to another row, repetition by repetition."""
        return [ours / theirs for ours, theirs in zip(self.tokens_per_s, to.tokens_per_s, strict=True)]


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """Times of the bare models in this run.

    Attributes:
        target_round_ms: median time between two outputs of the baseline: a decode step of the target with vLLM around it.
        draft_step_ms: the draft server's running mean of steps with one row per request, median over repetitions, from
            `pearl` where that is run (it has no other rows); None if there was no such step.
        c: their ratio.
    """

    target_round_ms: float
    draft_step_ms: float | None
    c: float | None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def model_times(rows: Sequence[Row], batch_size: int) -> ModelTimes:
    """Measure what a round and a draft step cost; the baseline is the first row."""
    times = [request.output_times_s for run in rows[0].runs for request in run.requests]
    target_ms = 1e3 * percentile([later - earlier for one in times for earlier, later in pairwise(one)], 0.5)
    servers = sorted((row for row in rows if row.runs[-1].server_timings_us), key=lambda row: row.name != "pearl")
    steps_us = [run.server_timings_us.get(f"step_{batch_size}_rows") for row in servers[:1] for run in row.runs]
    known_ms = [step / 1e3 for step in steps_us if step is not None]
    if not known_ms:
        return ModelTimes(target_ms, None, None)
    draft_ms = statistics.median(known_ms)
    return ModelTimes(target_ms, draft_ms, target_ms / draft_ms)


def row_as_json(row: Row, baseline: Row) -> dict[str, Any]:
    """All that is known of a row, with one sample per repetition."""
    return {
        "name": row.name,
        "speculative_config": row.spec.speculative,
        "runs_on": row.runs_on,
        "facts": row.facts,
        "tokens_per_s": spread(row.tokens_per_s),
        "ratio_to_baseline": spread(row.ratios(baseline)),
        "over_all_repetitions": dataclasses.asdict(summarize(row.runs)),
        "identical": not row.differences,
        "differences": as_json(row.differences),
        "samples": [_sample(run) for run in row.runs],
    }


def _sample(run: RunResult) -> dict[str, Any]:
    return {
        **dataclasses.asdict(summarize([run])),
        "first_token_s": [request.output_times_s[0] - request.start_s for request in run.requests],
        "request_s": [request.output_times_s[-1] - request.start_s for request in run.requests],
        "num_outputs": [len(request.output_times_s) for request in run.requests],
        "engine_counters": run.engine_counters,
        "server_counters": run.server_counters,
        "server_timings_us": run.server_timings_us,
        "vllm_counters": {
            "num_drafts": run.num_drafts,
            "num_draft_tokens": run.num_draft_tokens,
            "num_accepted_tokens": run.num_accepted_tokens,
        },
    }


def rows_as_table(rows: Sequence[Row]) -> str:
    """The table for people; medians over repetitions, and how far they spread."""
    headers = ["", "tokens/s", "(least..most)", "ratio", "(least..most)", "inter-token p50", "p99"]
    headers += ["acceptance length", "hits", "rollback", "runs on", "token ids"]
    lines = []
    for row in rows:
        speed, ratio, summary = spread(row.tokens_per_s), spread(row.ratios(rows[0])), summarize(row.runs)
        lines.append(
            [
                row.name,
                number(speed["median"], 1),
                f"({speed['least']:.1f}..{speed['most']:.1f})",
                number(ratio["median"], 2, "x"),
                f"({ratio['least']:.2f}..{ratio['most']:.2f})",
                number(summary.inter_token_ms[0], 2, " ms"),
                number(summary.inter_token_ms[1], 2, " ms"),
                number(summary.mean_acceptance_length),
                percent(summary.hit_rate),
                percent(summary.rollback_rate),
                row.runs_on,
                row.sameness,
            ]
        )
    return table(headers, lines)


def notes(rows: Sequence[Row], times: ModelTimes) -> str:
    """Bare model times, where the time of our rows went, and the comparisons that count."""
    lines = [
        f"A target round takes {number(times.target_round_ms)} ms, a draft step {number(times.draft_step_ms)} ms: "
        f"c = {number(times.c, 1)} (medians of this run)."
    ]
    lines += [breakdown(row.name, row.runs) for row in rows if row.runs[0].server_counters]
    ours = next((row for row in rows if row.name == "specbranch"), None)
    for rival in rivals(rows) if ours is not None else []:
        assert ours is not None
        ratio = spread(ours.ratios(rival))
        best = ", its best number of draft tokens" if rival.name.startswith(SEQUENTIAL) else ""
        lines.append(
            f"specbranch / {rival.name} ({rival.runs_on}{best}): "
            f"{ratio['median']:.2f} ({ratio['least']:.2f}..{ratio['most']:.2f})"
        )
    return "\n".join(lines)


def rivals(rows: Sequence[Row]) -> list[Row]:
    """What specbranch is held against: pearl, and draft_model at its best on the target's cores and on all cores."""
    found = [row for row in rows if row.name == "pearl"]
    for is_wide in (False, True):
        group = [row for row in rows if row.name.startswith(SEQUENTIAL) and row.is_wide == is_wide]
        found += sorted(group, key=lambda row: -statistics.median(row.tokens_per_s))[:1]
    return found
