"""Whether something that should help does: blocks of rounds with it and without it, side by side, and what they gave per second.

Owns the trial of one engine: when it is on, what was measured, the verdict, and when to look again. No clock, no model. Pure
Python, draft server process.

    trial    on off | off on | on off | ...      a pair of blocks gives one log ratio; enough pairs give a verdict
    rest     on on on on ... or off off off ...  longer each time that the verdict is the same
"""

import math
from dataclasses import dataclass

# By so many rounds at most the beginning of a block is put off.
LONGEST_SETTLING = 64


@dataclass(frozen=True, slots=True)
class Trials:
    """How trials are made.

    Attributes:
        block_rounds, settling_rounds: rounds of a block that count, and before them those that do not: their drafts were made
            before the change.
        min_pairs, max_pairs: fewest and most pairs of a trial.
        errors_of_a_gain, errors_of_a_loss: by so many standard errors of the mean a gain, or a loss, must be away from nothing.
        first_rest, max_rest: blocks until the next trial: after a new verdict, and at most.
        is_trusted: whether what is tried is on until it was shown to cost; otherwise it is off until it was shown to pay.
    """

    block_rounds: int
    settling_rounds: int
    min_pairs: int
    max_pairs: int
    errors_of_a_gain: float
    errors_of_a_loss: float
    first_rest: int = 64
    max_rest: int = 4096
    is_trusted: bool = False


# A length head that is learned while serving: small gains, long trials, nothing on trust.
OF_A_HEAD = Trials(8, 1, 8, 64, 2.0, 1.0)


class BenefitGate:
    """The trials of one thing in one engine; what it guards costs at most its trials.

    Args:
        trials: how they are made.
        rest: blocks before the first one.

    Attributes:
        is_on: whether the coming chunks are to be made with what is tried.
        num_blocks: that were measured so far.
        num_trials: verdicts so far.
    """

    def __init__(self, trials: Trials = OF_A_HEAD, rest: int = 0) -> None:
        self._trials = trials
        self.is_on = trials.is_trusted
        self.num_blocks = 0
        self.num_trials = 0
        self._verdict = trials.is_trusted
        self._rest = trials.first_rest
        self._left = rest
        self._tokens = self._time_s = 0.0
        self._num_rounds = self._num_put_off = 0
        self._first_rate = 0.0
        self._ratios: list[float] = []

    def observe_round(self, duration_s: float, tokens_per_request: float, *, is_settled: bool = True) -> None:
        """Take in a round without a prefill, and decide on the next one.

        Args:
            is_settled: whether what is on has got under way; a block begins no sooner, but is not put off for ever.
        """
        if not self.num_blocks and not self._num_rounds:
            # The first of all: before it, there was nothing to try.
            self.is_on = True
        if not is_settled and not self._num_rounds and self._num_put_off < LONGEST_SETTLING:
            self._num_put_off += 1
            return
        self._num_rounds += 1
        if self._num_rounds > self._trials.settling_rounds:
            self._tokens += tokens_per_request
            self._time_s += duration_s
        if self._num_rounds == self._trials.block_rounds + self._trials.settling_rounds:
            rate = self._tokens / max(self._time_s, 1e-9)
            self.begin_block_anew()
            self.num_blocks += 1
            self._end_block(rate)

    def begin_block_anew(self) -> None:
        """Forget the rounds of the present block: something else has changed meanwhile."""
        self._tokens = self._time_s = 0.0
        self._num_rounds = self._num_put_off = 0

    def _end_block(self, rate: float) -> None:
        """Go on to the next block. The second of a pair is as the first of the next: on off, off on."""
        if self._left:
            self._left -= 1
        elif not self._first_rate:
            self._first_rate = rate
            self.is_on = not self.is_on
        else:
            with_it, without = (rate, self._first_rate) if self.is_on else (self._first_rate, rate)
            self._first_rate = 0.0
            self._ratios.append(math.log(with_it / without))
            verdict = self._found()
            if verdict is not None:
                self._settle(verdict)

    def _found(self) -> bool | None:
        """Whether it pays; None while that is open."""
        count = len(self._ratios)
        if count < self._trials.min_pairs:
            return None
        mean = sum(self._ratios) / count
        error = math.sqrt(sum((one - mean) ** 2 for one in self._ratios) / (count - 1) / count)
        if mean > self._trials.errors_of_a_gain * error and mean > 0.0:
            return True
        return False if mean < -self._trials.errors_of_a_loss * error or count >= self._trials.max_pairs else None

    def _settle(self, verdict: bool) -> None:
        first, most = self._trials.first_rest, self._trials.max_rest
        self._rest = min(most, 2 * self._rest) if self.num_trials and verdict == self._verdict else first
        self._left = self._rest
        self._verdict = self.is_on = verdict
        self._ratios.clear()
        self.num_trials += 1
