"""Counters of both sides, their names, and the rates made from them.

Owns names and arithmetic only; how the numbers travel to `/metrics` is in `snapshots` and `stat_logger`. Names follow section 9
of the design: counts start with `num_`, "draft tokens" are those sent to verification, "drafted tokens" all that the draft model
made. Runs in every process.
"""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any


@functools.cache
def _scalars(kind: type) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """The names of a counter class's scalars, and what reads them all at once."""
    names = tuple(one.name for one in fields(kind) if not one.name.endswith("_by_position"))
    return names, operator.attrgetter(*names)


def _as_dict(counters: Any) -> dict[str, Any]:
    # At every step, so without a loop in Python.
    names, read = _scalars(counters.__class__)
    return dict(zip(names, read(counters), strict=True))


@dataclass(slots=True)
class DraftServerCounters:
    """What a draft server counts.

    `answer_us` is the time from a commit batch taken in until its reply went out, of `num_answers` such; `handling_us` that in
    which batches were handled; the rest is draft steps that the replies waited for. All three are of all engines together.
    """

    num_rounds: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_drafted_tokens: int = 0
    num_kept_tokens: int = 0
    num_rollback_tokens: int = 0
    num_branch_tokens_dropped: int = 0
    num_forks: int = 0
    num_steps: int = 0
    num_rows: int = 0
    num_prefill_tokens: int = 0
    num_wait_steps: int = 0
    num_paused_rounds: int = 0
    num_narrowings: int = 0
    num_shortenings: int = 0
    num_evictions: int = 0
    num_unknown_requests: int = 0
    num_refused_messages: int = 0
    num_turned_away: int = 0
    num_expired_requests: int = 0
    num_malformed_messages: int = 0
    num_flood_messages: int = 0
    num_answers: int = 0
    answer_us: int = 0
    handling_us: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name to value, in the order above."""
        return _as_dict(self)


@dataclass(slots=True)
class EngineCounters:
    """What the proposer and the scorer count, in the target's worker.

    `num_sampled_draft_tokens` are draft tokens verified against the distribution they were drawn from, `num_sampled_outcomes` the
    committed tokens that such a verification decided, `num_head_classes_0` to `_2` what the length head said after a round. Of
    `wait_s`, `messages_s` is what messages were on their way, and not what the draft server took to answer.
    """

    num_rounds: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_foreign_drafts: int = 0
    num_sampled_draft_tokens: int = 0
    num_sampled_outcomes: int = 0
    num_unsound_distributions: int = 0
    num_commit_batches: int = 0
    num_replies: int = 0
    num_reply_timeouts: int = 0
    num_late_replies: int = 0
    num_send_failures: int = 0
    num_server_starts: int = 0
    num_server_deaths: int = 0
    num_breaker_openings: int = 0
    wait_s: float = 0.0
    longest_wait_s: float = 0.0
    messages_s: float = 0.0
    propose_s: float = 0.0
    num_head_classes_0: int = 0
    num_head_classes_1: int = 0
    num_head_classes_2: int = 0
    head_s: float = 0.0
    accepted_by_position: Counter[int] = field(default_factory=Counter)
    drafted_by_position: Counter[int] = field(default_factory=Counter)

    def observe_round(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Count the verification of one chunk; `num_accepted_tokens` is without the bonus or recovered token."""
        self.num_rounds += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        for position in range(num_draft_tokens):
            self.drafted_by_position[position] += 1
        for position in range(num_accepted_tokens):
            self.accepted_by_position[position] += 1

    def observe_classes(self, classes: Sequence[int]) -> None:
        """Count what the length head said of some requests."""
        self.num_head_classes_0 += classes.count(0)
        self.num_head_classes_1 += classes.count(1)
        self.num_head_classes_2 += classes.count(2)

    def as_dict(self) -> dict[str, float]:
        """Name to value for the scalar counters."""
        return _as_dict(self)


@dataclass(slots=True)
class SchedulerCounters:
    """What the target's scheduler counts, in the engine core.

    `num_reclaims` counts requests that gave up blocks, `num_reclaimed_blocks` these blocks; `num_short_steps` the steps in which
    the pool could not hold a full chunk of every request, `num_cut_draft_tokens` the draft tokens that were not verified
    therefore. `num_preemptions` counts vLLM's own, whatever the reason.
    """

    num_reclaimed_blocks: int = 0
    num_reclaims: int = 0
    num_short_steps: int = 0
    num_cut_draft_tokens: int = 0
    num_preemptions: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name to value, in the order above."""
        return _as_dict(self)


PREFIX = "vllm:specbranch_"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of `/metrics`.

    Attributes:
        key: of the value in a snapshot, a whole number: `engine.`, `server.`, `scheduler.` and the name of a counter, or `state.`
            and that of a gauge.
        suffix: of the name, after `PREFIX`. Counters end in `_total`, all else is a gauge.
        documentation: one line.
        unit: what 1 in a snapshot is on `/metrics`: 1e-6 where microseconds become seconds.
        is_of_requests: a gauge that is 0 when the engine has no request.
    """

    key: str
    suffix: str
    documentation: str
    unit: float = 1.0
    is_of_requests: bool = False

    @property
    def name(self) -> str:
        """As it stands on `/metrics`."""
        return PREFIX + self.suffix

    @property
    def is_counter(self) -> bool:
        """Whether it only grows."""
        return self.suffix.endswith("_total")


# What vLLM publishes itself, as `vllm:spec_decode_num_draft_tokens_total`, `vllm:num_preemptions_total` and so on; and the parts of
# a wait, which benchmarks read.
UNPUBLISHED = frozenset(
    {"engine.num_draft_tokens", "engine.num_accepted_tokens", "scheduler.num_preemptions"}
    | {"engine.messages_s", "server.num_answers", "server.answer_us", "server.handling_us"}
)

_DESCRIBED = (
    Metric("server.num_rounds", "rounds_total", "Outcomes of verification that the draft server took in."),
    Metric("server.num_hits", "hits_total", "Rounds whose outcome the draft server had drafted ahead for."),
    Metric("server.num_misses", "misses_total", "Rounds whose outcome it had not drafted for."),
    Metric("server.num_drafted_tokens", "drafted_tokens_total", "Tokens that the draft model made, branches included."),
    Metric("server.num_kept_tokens", "kept_tokens_total", "Drafted tokens that became committed tokens."),
    Metric(
        "server.num_rollback_tokens", "rollback_tokens_total", "Drafted tokens of the main line that a miss threw away."
    ),
    Metric(
        "server.num_branch_tokens_dropped",
        "branch_tokens_dropped_total",
        "Drafted tokens of branches that did not survive.",
    ),
    Metric("server.num_forks", "forks_total", "Branches opened beside the main line."),
    Metric("server.num_steps", "draft_steps_total", "Forwards of the draft model."),
    Metric("server.num_rows", "draft_rows_total", "Rows of these forwards: (request, branch) pairs."),
    Metric("server.num_prefill_tokens", "draft_prefill_tokens_total", "Prompt tokens that the draft model prefilled."),
    Metric("server.num_wait_steps", "draft_wait_steps_total", "Draft steps that an open reply waited for."),
    Metric(
        "server.num_paused_rounds", "paused_rounds_total", "Engine steps without drafts because they are faster so."
    ),
    Metric(
        "server.num_narrowings",
        "narrowings_total",
        "Requests that lost branches for want of KV blocks of the draft model.",
    ),
    Metric(
        "server.num_shortenings",
        "shortenings_total",
        "Requests that lost the KV blocks of what was drafted for them, but not those of what is committed.",
    ),
    Metric("server.num_evictions", "evictions_total", "Requests that lost all their KV blocks of the draft model."),
    Metric(
        "server.num_unknown_requests",
        "unknown_requests_total",
        "Commits for requests that the draft server did not know.",
    ),
    Metric(
        "server.num_refused_messages", "refused_messages_total", "Messages that the draft server could not take in."
    ),
    Metric("server.num_turned_away", "turned_away_total", "Requests over the limits of a shared draft server."),
    Metric("server.num_expired_requests", "expired_requests_total", "Requests of engines whose lease was over."),
    Metric(
        "server.num_malformed_messages",
        "malformed_messages_total",
        "Bytes that came to the draft server and were no message.",
    ),
    Metric(
        "server.num_flood_messages",
        "flood_messages_total",
        "Messages dropped unread because their sender was too fast.",
    ),
    Metric("engine.num_rounds", "verifications_total", "Chunks of draft tokens that the target verified."),
    Metric(
        "engine.num_foreign_drafts",
        "foreign_drafts_total",
        "Verified chunks that were not as the proposer handed them over.",
    ),
    Metric(
        "engine.num_sampled_draft_tokens",
        "sampled_draft_tokens_total",
        "Draft tokens verified against their distribution.",
    ),
    Metric(
        "engine.num_sampled_outcomes", "sampled_outcomes_total", "Committed tokens that such a verification decided."
    ),
    Metric(
        "engine.num_unsound_distributions",
        "unsound_distributions_total",
        "Distributions that cannot be; verified as one-hot.",
    ),
    Metric("engine.num_commit_batches", "commit_batches_total", "Commit batches sent to the draft server."),
    Metric("engine.num_replies", "replies_total", "Replies to them that came in time."),
    Metric("engine.num_reply_timeouts", "reply_timeouts_total", "Replies that did not come within the reply timeout."),
    Metric("engine.num_late_replies", "late_replies_total", "Replies that came after it, and were dropped."),
    Metric("engine.num_send_failures", "send_failures_total", "Messages that the draft server's queue did not take."),
    Metric("engine.num_server_starts", "draft_server_starts_total", "Draft servers begun with, the first included."),
    Metric("engine.num_server_restarts", "draft_server_restarts_total", "Draft servers begun with after the first."),
    Metric("engine.num_server_deaths", "draft_server_deaths_total", "Draft servers that ended or were given up."),
    Metric(
        "engine.num_breaker_openings", "breaker_openings_total", "Times the breaker opened: the server had gone silent."
    ),
    Metric("engine.wait_s", "reply_wait_seconds_total", "Time that engine steps waited for replies.", 1e-6),
    Metric("engine.propose_s", "propose_seconds_total", "Time spent in the proposer beside these waits.", 1e-6),
    Metric(
        "engine.num_head_classes_0", "head_class_0_total", "Rounds after which the length head said: rejected at once."
    ),
    Metric("engine.num_head_classes_1", "head_class_1_total", "Rounds after which it said: in between."),
    Metric("engine.num_head_classes_2", "head_class_2_total", "Rounds after which it said: all accepted."),
    Metric("engine.head_s", "head_seconds_total", "Time spent in the length head.", 1e-6),
    Metric("engine.longest_wait_s", "longest_reply_wait_seconds", "The longest wait for one reply so far.", 1e-6),
    Metric("scheduler.num_reclaimed_blocks", "reclaimed_blocks_total", "KV blocks of the target given back early."),
    Metric("scheduler.num_reclaims", "reclaims_total", "Requests that gave up such blocks."),
    Metric("scheduler.num_short_steps", "short_steps_total", "Steps that could not hold every request's full chunk."),
    Metric("scheduler.num_cut_draft_tokens", "cut_draft_tokens_total", "Draft tokens cut for want of KV blocks."),
    Metric(
        "state.is_alive",
        "draft_server_alive",
        "1 while there is a draft server process, or an address to reach one at.",
    ),
    Metric(
        "state.is_ready", "draft_server_ready", "1 while the draft server answers, so that requests are drafted for."
    ),
    Metric("state.is_breaker_open", "breaker_open", "1 while nothing is sent to a draft server that has gone silent."),
    Metric("state.has_given_up", "given_up", "1 once drafting is over for the life of this engine."),
    Metric(
        "state.reply_timeout_s", "reply_timeout_seconds", "How long a step waits for a reply at most, as of now.", 1e-6
    ),
    Metric(
        "state.num_requests", "draft_requests", "Open requests of this engine at the draft server.", is_of_requests=True
    ),
    Metric(
        "state.num_queued_rows", "draft_queued_rows", "Rows that the draft server left for later.", is_of_requests=True
    ),
    Metric(
        "state.num_blocks_held",
        "draft_kv_blocks_held",
        "KV blocks of the draft model that it holds.",
        is_of_requests=True,
    ),
    Metric("state.num_blocks", "draft_kv_blocks", "KV blocks of the draft model in all."),
)


def _undescribed() -> Iterator[Metric]:
    """Rows for counters that the table above does not know: `num_x` of a side becomes `side_x_total`."""
    known = UNPUBLISHED | {one.key for one in _DESCRIBED}
    for side, counters in (
        ("server", DraftServerCounters()),
        ("engine", EngineCounters()),
        ("scheduler", SchedulerCounters()),
    ):
        for name in counters.as_dict():
            words = name.removeprefix("num_").removesuffix("_s")
            unit, ending = (1e-6, "_seconds_total") if name.endswith("_s") else (1.0, "_total")
            if f"{side}.{name}" not in known:
                documentation = f"{words.replace('_', ' ').capitalize()}, as counted by the {side}."
                yield Metric(f"{side}.{name}", f"{side}_{words}{ending}", documentation, unit)


METRICS = (*_DESCRIBED, *_undescribed())


def rates(engine: Mapping[str, float], server: Mapping[str, float]) -> dict[str, float]:
    """The rates a reader asks for, from the counters of both sides.

    Returns:
        `mean_acceptance_length` = 1 + accepted / rounds; `acceptance_rate` = accepted / draft tokens; `hit_rate` = hits /
        (hits + misses); `rollback_rate` = rollback tokens / (rollback + kept tokens): of what the draft model made on its main
        line, the share thrown away by misses. Losing branches are not in it (`num_branch_tokens_dropped` counts them). A rate
        without any event is 0.
    """

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    hits, misses = server.get("num_hits", 0), server.get("num_misses", 0)
    rollback, kept = server.get("num_rollback_tokens", 0), server.get("num_kept_tokens", 0)
    return {
        "mean_acceptance_length": 1.0 + share(engine.get("num_accepted_tokens", 0), engine.get("num_rounds", 0)),
        "acceptance_rate": share(engine.get("num_accepted_tokens", 0), engine.get("num_draft_tokens", 0)),
        "hit_rate": share(hits, hits + misses),
        "rollback_rate": share(rollback, rollback + kept),
    }
