"""From measured runs to numbers and text: percentiles, summaries, tables.

Owns arithmetic and layout; measures nothing and prints nothing. Runs in the process of the demo or a benchmark.

Inter-token latency: the time between one output of a request and the one before it, divided by the tokens in it, and counted
once for each of them. Tokens that arrive together share their wait evenly, so that the mean is the time per token that a
reader of the stream sees. The first output has no gap: it is the time to first token.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_specbranch.measure_messages import RequestTrace, RunResult
from vllm_specbranch.metrics import rates


@dataclass(frozen=True, slots=True)
class Summary:
    """What some runs of one engine amount to.

    Attributes:
        wall_s: of all runs together.
        inter_token_ms: (p50, p99), see the module.
        output_gap_ms: (p50, p99) of the plain time between two outputs of a request, however many tokens they bring.
        first_token_ms: median time to first token.
        mean_acceptance_length: tokens per output after the first: 1 + accepted draft tokens per round.
        hit_rate, rollback_rate: of the draft server; None for other methods.
        step_ms: wall time per engine step.
        wait_ms, propose_ms: of that, time spent waiting for drafts, and the proposer's own work; None for other methods.
    """

    wall_s: float
    num_tokens: int
    num_steps: int
    tokens_per_s: float
    inter_token_ms: tuple[float, float]
    output_gap_ms: tuple[float, float]
    first_token_ms: float
    mean_acceptance_length: float
    hit_rate: float | None
    rollback_rate: float | None
    step_ms: float
    wait_ms: float | None
    propose_ms: float | None


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, interpolated linearly; nan for no values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def output_gaps_s(trace: RequestTrace) -> list[float]:
    """Seconds between each output and the one before it."""
    times = trace.output_times_s
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def inter_token_s(trace: RequestTrace) -> list[float]:
    """One inter-token latency for each token after the first output, in seconds; see the module."""
    pairs = zip(output_gaps_s(trace), trace.output_sizes[1:], strict=True)
    return [gap / size for gap, size in pairs for _ in range(size)]


def summarize(runs: Sequence[RunResult]) -> Summary:
    """Put runs of one engine together; their requests count alike."""
    traces = [trace for run in runs for trace in run.requests]
    wall_s, num_steps = sum(run.wall_s for run in runs), sum(run.num_steps for run in runs)
    num_tokens = sum(run.num_tokens for run in runs)
    latencies = [1e3 * value for trace in traces for value in inter_token_s(trace)]
    gaps = [1e3 * value for trace in traces for value in output_gaps_s(trace)]
    later_tokens = sum(sum(trace.output_sizes[1:]) for trace in traces)
    engine, server = _total(run.engine_counters for run in runs), _total(run.server_counters for run in runs)
    shares = rates(engine, server) if engine else {}
    per_step = 1e3 / num_steps if num_steps else math.nan
    return Summary(
        wall_s=wall_s,
        num_tokens=num_tokens,
        num_steps=num_steps,
        tokens_per_s=num_tokens / wall_s if wall_s else math.nan,
        inter_token_ms=(percentile(latencies, 0.5), percentile(latencies, 0.99)),
        output_gap_ms=(percentile(gaps, 0.5), percentile(gaps, 0.99)),
        first_token_ms=percentile((1e3 * (one.output_times_s[0] - one.start_s) for one in traces), 0.5),
        mean_acceptance_length=later_tokens / len(gaps) if gaps else math.nan,
        hit_rate=shares.get("hit_rate"),
        rollback_rate=shares.get("rollback_rate"),
        step_ms=per_step * wall_s,
        wait_ms=per_step * engine["wait_s"] if engine else None,
        propose_ms=per_step * engine["propose_s"] if engine else None,
    )


def _total(counters: Iterable[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for one in counters:
        for name, value in one.items():
            total[name] = total.get(name, 0) + value
    return total


def breakdown(name: str, runs: Sequence[RunResult]) -> str:
    """One line on where the time of a specbranch engine step went, and one on what the draft server did meanwhile."""
    summary = summarize(runs)
    server, engine = _total(run.server_counters for run in runs), _total(run.engine_counters for run in runs)
    wait_ms, propose_ms = summary.wait_ms or 0.0, summary.propose_ms or 0.0
    rest_ms = summary.step_ms - wait_ms - propose_ms
    steps = server.get("num_steps", 0) / max(1.0, server.get("num_rounds", 0))
    rows = server.get("num_rows", 0) / max(1.0, server.get("num_steps", 0))
    step_ms = runs[-1].server_timings_us.get("step_1_rows", math.nan) / 1e3
    return (
        f"{name}, one round of {summary.step_ms:.2f} ms: {wait_ms:.2f} ms waiting for drafts, {propose_ms:.2f} ms proposer, "
        f"{rest_ms:.2f} ms target model and the rest of vLLM.\n"
        f"  Draft server meanwhile: {steps:.1f} draft steps per round, {rows:.1f} rows each (a step with one row takes "
        f"{step_ms:.2f} ms); {engine.get('num_reply_timeouts', 0):.0f} of {engine.get('num_commit_batches', 0):.0f} replies late."
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table: the first column left, all others right.

    Args:
        headers: one per column.
        rows: as many cells each.
    """
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]

    def laid_out(cells: Sequence[str]) -> str:
        words = [
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(words).rstrip()

    return "\n".join([laid_out(headers), "  ".join("-" * width for width in widths), *(laid_out(row) for row in rows)])


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """Format a number for a table; `-` for one that does not exist."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}{unit}"


def percent(value: float | None) -> str:
    """Format a share for a table."""
    return number(None if value is None else 100 * value, 0, "%")


def shorten(text: str, most_lines: int = 4, width: int = 100) -> str:
    """The beginning of a text: its first lines that are not empty, each cut to `width` columns."""
    lines = [line for line in text.splitlines() if line.strip()]
    cut = [line if len(line) <= width else line[: width - 3] + "..." for line in lines[:most_lines]]
    return "\n".join(cut + ["..."] * (len(lines) > most_lines))
