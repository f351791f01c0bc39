"""What a draft server knows of one engine: its open reply, and how fast and how lucky it has been. Pure Python."""

from dataclasses import dataclass, field

# Weight of the newest value in the running means; short, because batch sizes change within tens of rounds.
MEAN_WEIGHT = 0.1
# Two commits further apart than this have idle time between them, which says nothing about the target's speed.
LONGEST_ROUND_S = 2.0


@dataclass(slots=True)
class PendingReply:
    """A commit batch that has not been answered yet.

    Attributes:
        round: its number.
        hits: per request whether it was a hit.
        unknown: requests that it named and the server does not know.
        deadline_s: when it must be answered, whatever there is.
        sent: per sampled request how many tokens have been sent ahead of the answer.
    """

    round: int
    hits: dict[str, bool]
    unknown: list[str]
    deadline_s: float
    sent: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Peer:
    """One engine: its open reply, and how fast it has been."""

    pending: PendingReply | None = None
    last_commit_s: float | None = None
    token_s: float = 0.0
    accepted: float = 1.0
    tried: float = 2.0

    def observe_round(self, now_s: float, num_requests: int, num_tokens: int) -> None:
        """Take in that a commit batch of `num_tokens` for `num_requests` has arrived."""
        if self.last_commit_s is not None and num_tokens and now_s - self.last_commit_s < LONGEST_ROUND_S:
            token_s = (now_s - self.last_commit_s) * num_requests / num_tokens
            self.token_s = token_s if not self.token_s else self.token_s + MEAN_WEIGHT * (token_s - self.token_s)
        self.last_commit_s = now_s

    def observe_outcome(self, num_draft_tokens: int, num_accepted: int) -> None:
        """Take in how many draft tokens of a chunk were accepted; old rounds fade."""
        keep = 1.0 - MEAN_WEIGHT / 4
        self.accepted = keep * self.accepted + num_accepted
        self.tried = keep * self.tried + num_accepted + (num_accepted < num_draft_tokens)

    @property
    def acceptance(self) -> float:
        """Estimated chance that one drafted token is accepted, 0..1."""
        return self.accepted / self.tried
