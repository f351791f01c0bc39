"""What a draft server knows of one engine: its open reply, and how fast it has been. Pure Python."""

import math
import time
from dataclasses import dataclass, field

from vllm_specbranch.benefit_gate import BenefitGate
from vllm_specbranch.costs import LinearCost
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.load_gate import LoadGate
from vllm_specbranch.messages import CommitBatch
from vllm_specbranch.metrics import DraftServerCounters
from vllm_specbranch.planner import Planner

# Weight of the newest value in the running means; short, because batch sizes change within tens of rounds.
MEAN_WEIGHT = 0.1
# Two commits further apart than this have idle time between them, which says nothing about the target's speed.
LONGEST_ROUND_S = 2.0
# The counters that are counted per engine as well; what is no single engine's, want of blocks say, is counted for all.
OF_REQUESTS = frozenset(
    {"num_rounds", "num_hits", "num_misses", "num_drafted_tokens", "num_kept_tokens", "num_rollback_tokens"}
    | {"num_branch_tokens_dropped", "num_forks", "num_steps", "num_rows", "num_prefill_tokens", "num_wait_steps"}
    | {"num_unknown_requests", "num_paused_rounds"}
)
_OF_ALL = tuple(name for name in DraftServerCounters().as_dict() if name not in OF_REQUESTS)


@dataclass(slots=True)
class PendingReply:
    """A commit batch that has not been answered yet.

    Attributes:
        round: its number.
        hits: per request whether it was a hit.
        unknown: requests that it named and the server does not know.
        deadline_s: when it must be answered, whatever there is.
        free_until_s: until then the engine is busy with itself, and a wait costs nothing.
        sent: per sampled request how many tokens have been sent ahead of the answer.
        growing: (request, end of its chunk) that the answer waits for, as decided when it was last looked at.
    """

    round: int
    hits: dict[str, bool]
    unknown: list[str]
    deadline_s: float
    free_until_s: float = 0.0
    sent: dict[str, int] = field(default_factory=dict)
    growing: list[tuple[DraftRequest, int]] = field(default_factory=list)


@dataclass(slots=True)
class Tally:
    """What is counted for one engine, for as long as it speaks through one connection.

    Attributes:
        counters: of its own requests.
        others: the server's counters when it came; what is no single request's counts from then on.
        life: names this tally.
    """

    counters: DraftServerCounters = field(default_factory=DraftServerCounters)
    others: dict[str, int] = field(default_factory=dict)
    life: int = field(default_factory=time.time_ns)

    def as_dict(self, server: DraftServerCounters) -> dict[str, int]:
        """Name to value, `server` being all engines' counters."""
        own = self.counters.as_dict()
        for name in _OF_ALL:
            own[name] = getattr(server, name) - self.others.get(name, 0)
        return own


@dataclass(slots=True)
class Peer:
    """One engine: its open reply, and how fast it has been.

    Attributes:
        planner: the policy, with what has been learned of this engine's target.
        wants_top_probs: as its `Hello` said.
        gate: whether a length head that is learned while serving pays here.
        load: whether speculation pays under the present load.
        tally: what its metrics are made from; outlasts a `Hello`.
        is_full: it has open as much as it may; some that it opened were turned away, and none has been closed since.
    """

    planner: Planner
    wants_top_probs: bool = False
    tally: Tally = field(default_factory=Tally)
    is_full: bool = False
    pending: PendingReply | None = None
    last_commit_s: float | None = None
    token_s: float = 0.0
    round_s: float = 0.0
    num_requests: int = 1
    num_rounds: int = 0
    verification: LinearCost = field(default_factory=LinearCost)
    gate: BenefitGate = field(default_factory=BenefitGate)
    load: LoadGate = field(default_factory=LoadGate)

    def observe_round(
        self, now_s: float, batch: CommitBatch, *, is_head_ready: bool = False, is_catching_up: bool = False
    ) -> None:
        """Take in a commit batch that has just arrived.

        Args:
            is_head_ready: whether there is a length head that can be tried.
            is_catching_up: as in `LoadGate.observe_round`.
        """
        num_requests, num_tokens = len(batch.commits), sum(len(one.tokens) for one in batch.commits)
        self.num_requests = max(1, num_requests)
        self.num_rounds += 1
        # A round without any draft tokens is another kind of round: it does without the rejection sampler.
        if batch.pace is not None and batch.pace.num_tokens > num_requests:
            self.verification.observe(batch.pace.num_tokens, batch.pace.step_us / 1e6)
        # A round with a prefill, which may follow idle time, says nothing of how fast tokens come.
        is_prefill = batch.pace is None and self.token_s > 0.0
        gap_s = math.inf if self.last_commit_s is None else now_s - self.last_commit_s
        if num_tokens and not is_prefill and gap_s < LONGEST_ROUND_S:
            round_s = gap_s
            self.round_s = round_s if not self.round_s else self.round_s + MEAN_WEIGHT * (round_s - self.round_s)
            token_s = round_s * num_requests / num_tokens
            self.token_s = token_s if not self.token_s else self.token_s + MEAN_WEIGHT * (token_s - self.token_s)
        if num_tokens and gap_s < LONGEST_ROUND_S and batch.pace is not None:
            if is_head_ready and self.load.is_on:
                self.gate.observe_round(gap_s, num_tokens / num_requests)
            self.load.observe_round(num_requests, gap_s, num_tokens, is_catching_up=is_catching_up)
        self.last_commit_s = now_s

    @property
    def verification_s(self) -> float:
        """How long the target is busy in one round, without waits for drafts; 0 before it was measured."""
        return self.verification.mean_s or self.round_s

    @property
    def price(self) -> float:
        """The least chance of acceptance that pays for the verification of one more token of one request.

        A token more in the batch makes the round longer by the slope of the measured times; at its present rate the whole batch
        commits so many tokens in that time. Near 0 while the target's rounds do not depend on how many tokens they verify.
        """
        if not self.token_s:
            return 0.0
        return self.verification.slope_s * self.num_requests / self.token_s
