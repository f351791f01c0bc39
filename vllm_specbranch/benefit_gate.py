"""Whether something that should help does: blocks of rounds with it and without it, side by side, and what they gave per second.

Owns the trial of one engine: when it is on, what was measured, the verdict, and when to look again. No clock, no model. Pure
Python, draft server process.

    trial    on off | off on | on off | ...      a pair of blocks gives one log ratio; enough pairs give a verdict
    rest     on on on on ... or off off off ...  longer each time that the verdict is the same
"""

import math

# Rounds of a block, and how many at its start are not counted: their drafts were made before the change.
BLOCK_ROUNDS = 8
SETTLING_ROUNDS = 1
# Fewest and most pairs of a trial, and how many standard errors of the mean a gain, or a loss, must be away from nothing.
MIN_PAIRS, MAX_PAIRS = 8, 64
ERRORS_OF_A_GAIN, ERRORS_OF_A_LOSS = 2.0, 1.0
# Blocks until the next trial: at first, and at most.
FIRST_REST, MAX_REST = 64, 4096


class BenefitGate:
    """The trial of one engine. Off until it has been shown to pay, so what it guards costs at most its trials.

    Attributes:
        is_on: whether the coming chunks are to be made with what is tried.
        num_blocks: that were measured so far.
        num_trials: verdicts so far.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.num_blocks = 0
        self.num_trials = 0
        self._verdict = False
        self._rest = FIRST_REST
        self._left = 0
        self._tokens = self._time_s = 0.0
        self._num_rounds = 0
        self._first_rate = 0.0
        self._ratios: list[float] = []

    def observe_round(self, duration_s: float, tokens_per_request: float) -> None:
        """Take in a round without a prefill, and decide on the next one."""
        if not self.num_blocks and not self._num_rounds:
            # The first of all: before it, there was nothing to try.
            self.is_on = True
        self._num_rounds += 1
        if self._num_rounds > SETTLING_ROUNDS:
            self._tokens += tokens_per_request
            self._time_s += duration_s
        if self._num_rounds == BLOCK_ROUNDS + SETTLING_ROUNDS:
            rate = self._tokens / max(self._time_s, 1e-9)
            self._tokens = self._time_s = 0.0
            self._num_rounds = 0
            self.num_blocks += 1
            self._end_block(rate)

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
        if count < MIN_PAIRS:
            return None
        mean = sum(self._ratios) / count
        error = math.sqrt(sum((one - mean) ** 2 for one in self._ratios) / (count - 1) / count)
        if mean > ERRORS_OF_A_GAIN * error and mean > 0.0:
            return True
        return False if mean < -ERRORS_OF_A_LOSS * error or count >= MAX_PAIRS else None

    def _settle(self, verdict: bool) -> None:
        self._rest = min(MAX_REST, 2 * self._rest) if self.num_trials and verdict == self._verdict else FIRST_REST
        self._left = self._rest
        self._verdict = self.is_on = verdict
        self._ratios.clear()
        self.num_trials += 1
