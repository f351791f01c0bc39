"""Counters of both sides, their names, and the rates made from them.

Owns names and arithmetic only; nothing is exported from here. Names follow section 9 of the design: counts start with `num_`,
"draft tokens" are those sent to verification, "drafted tokens" all that the draft model made. Runs in every process.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class DraftServerCounters:
    """What a draft server counts."""

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
    num_narrowings: int = 0
    num_evictions: int = 0
    num_unknown_requests: int = 0
    num_refused_messages: int = 0
    num_turned_away: int = 0
    num_expired_requests: int = 0

    def as_dict(self) -> dict[str, int]:
        """Name to value, in the order above."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class EngineCounters:
    """What the proposer and the scorer count, in the target's worker.

    `num_sampled_draft_tokens` are draft tokens verified against the distribution they were drawn from, `num_sampled_outcomes` the
    committed tokens that such a verification decided, `num_head_classes_0` to `_2` what the length head said after a round.
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
        return {name: getattr(self, name) for name in self.__slots__ if not name.endswith("_by_position")}


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
        return {name: getattr(self, name) for name in self.__slots__}


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
