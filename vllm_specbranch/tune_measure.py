"""From measured runs of a pair to the times that a replay needs. Pure arithmetic; runs in the process of `tune`.

Owns how a line is laid through forward times, and what counts as overhead. Forwards are observed where that is possible (CPU);
elsewhere a round is what plain vLLM takes from output to output, and a draft step what the draft server says.

Forwards of plain vLLM and of specbranch are kept apart: beside a draft server that computes on the same machine the target's
forwards take longer, and in one line that would look like a price of further tokens, which only specbranch has many of.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from vllm_specbranch.measure_messages import Forward, RunResult
from vllm_specbranch.replay import Times

# A count of tokens that came up less often says nothing.
MIN_SAMPLES = 3
# Rows of a draft step; forwards of the draft with more tokens are prefills.
MAX_DRAFT_TOKENS = 64
# With several requests forwards of just the same size are rare: sizes are put together that differ by less than this share of a
# batch.
BIN_SHARE = 1 / 2


@dataclass(frozen=True, slots=True)
class Line:
    """Time of a forward over its tokens: `base_ms` for one token, `token_cost` of that more for each further one."""

    base_ms: float
    token_cost: float


@dataclass(frozen=True, slots=True)
class Measured:
    """A pair on its machine.

    Attributes:
        plain: times of plain vLLM and its `draft_model`: the target's without a draft server beside it. What further tokens cost
            it, and a draft step, are known of `ours` only.
        ours: of specbranch; it runs without asynchronous scheduling, so its overhead is another one.
        plain_target_ms, target_ms, draft_ms: median time of a forward by its number of tokens: of the target in plain vLLM, of the
            target in specbranch, of the draft model.
        is_observed: whether forwards were seen; if not, what further tokens cost the target is taken as nothing.
    """

    plain: Times
    ours: Times
    plain_target_ms: dict[int, float]
    target_ms: dict[int, float]
    draft_ms: dict[int, float]
    is_observed: bool


def medians_ms(forwards: Iterable[Forward], most_tokens: int, bin_size: int = 1) -> dict[int, float]:
    """Median duration by number of query tokens, of decoding forwards, where there are enough of them.

    Args:
        most_tokens: forwards with more are prefills.
        bin_size: so many sizes that follow each other count as one, their median.
    """
    bins: dict[int, list[tuple[int, float]]] = {}
    for one in forwards:
        if one.num_tokens <= most_tokens:
            found = bins.setdefault((one.num_tokens - 1) // bin_size, [])
            found.append((one.num_tokens, 1e3 * (one.end_s - one.start_s)))
    return {
        round(statistics.median(count for count, _ in found)): statistics.median(time_ms for _, time_ms in found)
        for _, found in sorted(bins.items())
        if len(found) >= MIN_SAMPLES
    }


def fit(times_ms: Mapping[int, float]) -> Line:
    """A line through times by number of tokens (least squares); it never falls, and one token takes some time.

    Args:
        times_ms: at least one.
    """
    counts, times = list(times_ms), list(times_ms.values())
    mean_count, mean_ms = statistics.fmean(counts), statistics.fmean(times)
    spread = sum((count - mean_count) ** 2 for count in counts)
    slope_ms = 0.0
    if spread:
        slope_ms = sum((count - mean_count) * (time - mean_ms) for count, time in times_ms.items()) / spread
    slope_ms = max(0.0, slope_ms)
    base_ms = max(mean_ms + slope_ms * (1 - mean_count), 0.1 * min(times))
    return Line(base_ms, slope_ms / base_ms)


def measure(plain: RunResult, ours: RunResult, batch_size: int, num_draft_tokens: int) -> Measured:
    """Times of a pair, from a run of plain vLLM and one of specbranch over the same prompts.

    Args:
        batch_size: requests at the same time, in both runs.
        num_draft_tokens: most of a chunk in the run of specbranch.
    """
    gap_ms = 1e3 * statistics.median(
        later - earlier for one in plain.requests for earlier, later in pairwise(one.output_times_s)
    )
    most_tokens, bin_size = batch_size * (1 + num_draft_tokens), max(1, int(BIN_SHARE * batch_size))
    alone_ms = medians_ms(plain.target_forwards, most_tokens, bin_size)
    target_ms = medians_ms(ours.target_forwards, most_tokens, bin_size)
    draft_ms = medians_ms(ours.draft_forwards, MAX_DRAFT_TOKENS)
    is_observed = bool(alone_ms and target_ms and draft_ms)
    if not is_observed:
        alone_ms = target_ms = {batch_size: gap_ms}
        draft_ms = _served_ms(ours.server_timings_us)
    target, draft = fit(target_ms), fit(draft_ms)
    times = Times(target.base_ms, draft.base_ms, target.token_cost, draft.token_cost)
    alone = replace(times, target_forward_ms=_base_ms(alone_ms, target.token_cost))
    return Measured(
        plain=replace(alone, overhead_ms=max(0.0, gap_ms - alone.forward_ms(batch_size))),
        ours=replace(times, overhead_ms=_overhead_ms(ours) if is_observed else _propose_ms(ours)),
        plain_target_ms=alone_ms,
        target_ms=target_ms,
        draft_ms=draft_ms,
        is_observed=is_observed,
    )


def _base_ms(times_ms: Mapping[int, float], token_cost: float) -> float:
    """Time of a forward with one token, where what further ones cost is known: plain decoding has one size only, the batch."""
    return statistics.median(time / (1 + token_cost * (count - 1)) for count, time in times_ms.items())


def _served_ms(timings_us: Mapping[str, float]) -> dict[int, float]:
    """The draft server's own times by rows (`step_3_rows`)."""
    found = {}
    for name, value in timings_us.items():
        if name.startswith("step_") and name.endswith("_rows"):
            found[int(name.removeprefix("step_").removesuffix("_rows"))] = value / 1e3
    return found


def _overhead_ms(run: RunResult) -> float:
    """What a round of specbranch takes beside the forward and the wait for drafts, over rounds that follow each other."""
    gaps = _round_gaps_ms(run.target_forwards)
    waited_ms = 1e3 * run.engine_counters.get("wait_s", 0.0) / max(1, len(run.target_forwards))
    return max(0.0, statistics.fmean(gaps) - waited_ms) if gaps else 0.0


def _round_gaps_ms(forwards: Sequence[Forward]) -> list[float]:
    """Time from the end of a forward to the start of the next, without the longest tenth (a request ends, a prefill begins)."""
    gaps = sorted(1e3 * (later.start_s - earlier.end_s) for earlier, later in pairwise(forwards))
    return gaps[: max(1, len(gaps) * 9 // 10)]


def _propose_ms(run: RunResult) -> float:
    return 1e3 * run.engine_counters.get("propose_s", 0.0) / max(1, run.num_steps)
