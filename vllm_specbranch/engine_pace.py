"""How fast the engine goes: its rounds, its steps, and how long it is busy with itself before it looks for a reply.

Owns what the proposer measures of its own engine, and what follows from that: the reply timeout, and the `Pace` that the draft
server weighs costs by. Pure arithmetic. Runs in the target's worker (output rank).

    begin_step ---- forward, sampling ---- propose (commits go out) ---- outputs are queued ---- take_draft_token_ids .. reply
    |<------------- step_us ------------->|                       |<-------- slack_us -------->|<------- waited ------->|
"""

from vllm_specbranch.config import MAX_AUTO_REPLY_TIMEOUT_MS
from vllm_specbranch.messages import Pace

# A reply is late when it takes as long as this many rounds; below the floor a timer tick or one prefill chunk would count as late.
TIMEOUT_ROUNDS = 4.0
MIN_AUTO_REPLY_TIMEOUT_MS = 10.0
MEAN_WEIGHT = 0.1


class EnginePace:
    """Running means over the steps of one engine. All times are seconds of one monotonic clock.

    Args:
        reply_timeout_ms: the user's; None derives it from the rounds.
    """

    def __init__(self, reply_timeout_ms: float | None) -> None:
        self._fixed_timeout_ms = reply_timeout_ms
        self._began_s = 0.0
        self._num_tokens = 0
        self._step_s = 0.0
        self._last_sampled_s: float | None = None
        self._sent_s: float | None = None
        self._went_s = 0.0
        self._answer_us = 0
        self._slack_s: float | None = None
        self.round_s = 0.0

    def begin(self, now_s: float, num_tokens: int) -> None:
        """A step begins; `num_tokens` is 0 when it holds a prefill."""
        self._began_s, self._num_tokens = now_s, num_tokens

    def sampled(self, now_s: float) -> None:
        """Its tokens are sampled. Rounds that follow each other directly count; a longer gap is idle time or a prefill."""
        self._step_s = now_s - self._began_s
        if self._last_sampled_s is not None:
            round_s = now_s - self._last_sampled_s
            if round_s < 10 * MAX_AUTO_REPLY_TIMEOUT_MS / 1e3:
                self.round_s += (MEAN_WEIGHT if self.round_s else 1.0) * (round_s - self.round_s)
        self._last_sampled_s = now_s

    def sent(self, now_s: float) -> None:
        """Its commits have gone out."""
        self._sent_s = self._went_s = now_s

    def looked(self, now_s: float) -> None:
        """It looks for the reply."""
        if self._sent_s is None:
            return
        slack_s, self._sent_s = now_s - self._sent_s, None
        self._slack_s = slack_s if self._slack_s is None else self._slack_s + MEAN_WEIGHT * (slack_s - self._slack_s)

    def answered(self, now_s: float, waited_s: float, answer_us: int) -> float:
        """The reply has come. Returns how much of the wait for it was messages on their way, not the server at work, in seconds.

        Args:
            waited_s: from the look for it until now; before that, messages kept nobody waiting.
            answer_us: how long the server took from each commit batch to its reply, summed over its life. With those of other
                engines among them, or of replies that came too late, too little is returned.
        """
        took_us = answer_us - self._answer_us
        self._answer_us = answer_us
        # A server that was started anew counts from 0.
        took_s = (took_us if took_us >= 0 else answer_us) / 1e6
        return max(0.0, min(waited_s, now_s - self._went_s - took_s))

    @property
    def message(self) -> Pace | None:
        """What the draft server gets to know; None for a step with a prefill."""
        if not self._num_tokens:
            return None
        return Pace(self._num_tokens, 1e6 * max(0.0, self._step_s), 1e6 * (self._slack_s or 0.0))

    @property
    def reply_timeout_ms(self) -> float:
        """Longest wait for drafts in one step."""
        if self._fixed_timeout_ms is not None:
            return self._fixed_timeout_ms
        if not self.round_s:
            return MAX_AUTO_REPLY_TIMEOUT_MS
        return min(MAX_AUTO_REPLY_TIMEOUT_MS, max(MIN_AUTO_REPLY_TIMEOUT_MS, 1e3 * TIMEOUT_ROUNDS * self.round_s))
