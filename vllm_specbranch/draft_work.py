"""One draft step as a list of work: which rows, how many fit, how long they take. Pure Python, draft server process."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_specbranch.costs import LinearCost
from vllm_specbranch.draft_peers import MEAN_WEIGHT
from vllm_specbranch.draft_request import DraftRequest

# A leaf that lacks at most this many tokens of KV is a decode row; those that lack more are prefilled, one chunk a step together.
MAX_DECODE_TOKENS = 16
PREFILL_CHUNK_TOKENS = 256
# How long one prefill chunk may hold up the decode rows, and its size before anything was measured.
PREFILL_STEP_S = 0.02
FIRST_PREFILL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Work:
    """One row of a draft step: feed the next `num_tokens` on the way to `leaf`."""

    request: DraftRequest
    leaf: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of one draft step: most rows, most query tokens over all rows, and most tokens of a prefill chunk among them."""

    num_rows: int = 64
    num_tokens: int = 512
    prefill_tokens: int = PREFILL_CHUNK_TOKENS

    def cut(self, work: list["Work"], prefills: Sequence["Work"] = ()) -> list["Work"]:
        """The leading part of `work` that fits into one step beside the prefills, which come first where rows are few."""
        prefills = prefills[: self.num_rows]
        left = self.num_tokens - sum(one.num_tokens for one in prefills)
        kept = []
        for one in work[: self.num_rows - len(prefills)]:
            left -= one.num_tokens
            if left < 0:
                break
            kept.append(one)
        return [*kept, *prefills]


@dataclass(slots=True)
class StepTimings:
    """How long draft steps take: by number of rows as running means and as a line, and per token of a prefill chunk."""

    step_s_by_rows: dict[int, float] = field(default_factory=dict)
    prefill_token_s: float = 0.0
    rows: LinearCost = field(default_factory=LinearCost)

    @property
    def row_cost(self) -> float:
        """What one more row adds to a step, relative to a step with one row."""
        return self.rows.relative_slope

    def observe(self, num_rows: int, duration_s: float) -> None:
        """Take in one step."""
        self.rows.observe(num_rows, duration_s)
        known = self.step_s_by_rows.get(num_rows)
        mean = duration_s if known is None else known + MEAN_WEIGHT * (duration_s - known)
        self.step_s_by_rows[num_rows] = mean

    def observe_prefill(self, num_tokens: int, duration_s: float) -> None:
        """Take in one step that held a prefill chunk; decode rows beside it make the estimate careful."""
        token_s = duration_s / num_tokens
        self.prefill_token_s += (MEAN_WEIGHT if self.prefill_token_s else 1.0) * (token_s - self.prefill_token_s)

    def prefill_chunk(self, most: int) -> int:
        """Tokens of the next prefill chunk, so that it delays other requests by about `PREFILL_STEP_S` at most."""
        if not self.prefill_token_s:
            return min(most, FIRST_PREFILL_TOKENS)
        return max(MAX_DECODE_TOKENS + 1, min(most, int(PREFILL_STEP_S / self.prefill_token_s)))

    def estimate_prefill_s(self, num_tokens: int) -> float:
        """Seconds that a step with a prefill chunk of `num_tokens` takes; 0 for none."""
        return num_tokens * self.prefill_token_s

    def estimate_s(self, num_rows: int) -> float:
        """Seconds that a step of `num_rows` takes, by the line through all measured steps; 0 before there was one."""
        return self.rows.estimate_s(num_rows)
