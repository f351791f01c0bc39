"""How likely the target goes on as the draft model says: the draft's own probabilities, recalibrated while serving.

Owns the estimate and what it has seen. What the draft model calls 60% may be right 40% or 90% of the time, depending on the pair,
the text and the temperature; for each range of confidence and each rank of a candidate the ratio of observed to predicted counts
says which. A few numbers, no training, old rounds fade (in the spirit of vLLM's online acceptance estimator, and of the acceptance
rates that SSD, arXiv:2603.03251, allocates by). Pure Python, draft server process.

Estimates steer what is drafted ahead and how long chunks are; they are functions of distributions and of tokens already committed,
never of a token that was drawn and is not verified yet (rule 2 of the design, section 3).
"""

from bisect import bisect_right
from collections.abc import Sequence

from vllm_specbranch.token_tree import Candidates

# Ranges of the draft's top probability, by their upper ends.
CONFIDENCE_RANGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
# Ranks beyond share one ratio.
MAX_RANKS = 16
# How many predicted events an untested ratio of 1 is worth, and how fast old ones fade.
PRIOR_EVENTS = 1.0
FADING = 0.998


class _Calibration:
    """Observed and predicted events by range of confidence and by slot."""

    def __init__(self, num_slots: int) -> None:
        num_ranges = len(CONFIDENCE_RANGES) + 1
        self._observed = [[0.0] * num_slots for _ in range(num_ranges)]
        self._predicted = [[0.0] * num_slots for _ in range(num_ranges)]
        self._last = num_slots - 1

    def estimate(self, confidence: float, predicted: Sequence[float]) -> list[float]:
        """Each event's probability, given what is predicted for it; their sum is at most 1."""
        place = bisect_right(CONFIDENCE_RANGES, confidence)
        observed, expected, last = self._observed[place], self._predicted[place], self._last
        found = [
            prob * (observed[slot] + PRIOR_EVENTS) / (expected[slot] + PRIOR_EVENTS)
            for slot, prob in zip((*range(last), *[last] * max(0, len(predicted) - last)), predicted, strict=False)
        ]
        total = sum(found)
        return found if total <= 1.0 else [prob / total for prob in found]

    def observe(self, confidence: float, predicted: Sequence[float], happened: int | None) -> None:
        """Take in which event happened, by its index in `predicted`; None for another one."""
        place = bisect_right(CONFIDENCE_RANGES, confidence)
        observed, expected, last = self._observed[place], self._predicted[place], self._last
        for slot in range(last + 1):
            observed[slot] *= FADING
            expected[slot] *= FADING
        for index, prob in enumerate(predicted):
            expected[min(index, last)] += prob
        if happened is not None:
            observed[min(happened, last)] += 1.0


class AcceptanceModel:
    """Estimates for greedy requests, and for sampled ones inside a chunk and after it.

    A sampled token is accepted or replaced: what replaces it follows the residual (p - q)+, not q, so these ranks are counted by
    themselves; the bonus token after a chunk follows the target's own distribution.

    Args:
        learns: False where drafts must not depend on what was served before: then the draft is believed.
    """

    def __init__(self, *, learns: bool = True) -> None:
        self._learns = learns
        self._greedy = _Calibration(MAX_RANKS)
        self._bonus = _Calibration(MAX_RANKS)
        self._replaced = _Calibration(MAX_RANKS + 1)
        self._num_accepted, self._num_tried = PRIOR_EVENTS, 2 * PRIOR_EVENTS

    @property
    def mean(self) -> float:
        """The share of draft tokens that were accepted of those that were reached, lately; 0.5 before anything was seen."""
        return self._num_accepted / self._num_tried

    def accepted(self, candidates: Candidates, *, is_sampled: bool) -> float:
        """The chance that the draft's choice after these candidates is accepted, 0..1."""
        top = candidates.probs[:1]
        return (self._replaced if is_sampled else self._greedy).estimate(top[0], top)[0]

    def outcomes(
        self, candidates: Candidates, *, is_sampled: bool, is_inside: bool, most: int = MAX_RANKS
    ) -> list[float]:
        """The chance of each candidate to be the target's token, where the chunk ends there.

        Args:
            most: look at so many candidates.
            is_inside: a draft token follows and is verified: then these are the chances that this candidate replaces it.

        Returns:
            One value for each of the first candidates.
        """
        probs = candidates.probs[:most]
        if not is_sampled:
            found = self._greedy.estimate(probs[0], probs)
            return [0.0, *found[1:]] if is_inside else found
        if not is_inside:
            return self._bonus.estimate(probs[0], probs)
        return self._replaced.estimate(probs[0], _replacement(probs))[1:]

    def observe(
        self, candidates: Candidates, token: int, *, is_sampled: bool, is_inside: bool, is_accepted: bool
    ) -> None:
        """Take in the token that the target committed after these candidates."""
        if not self._learns:
            return
        probs = candidates.probs[:MAX_RANKS]
        if is_inside:
            self._num_accepted = FADING * self._num_accepted + is_accepted
            self._num_tried = FADING * self._num_tried + 1.0
        try:
            rank = candidates.token_ids.index(token, 0, MAX_RANKS)
        except ValueError:
            rank = None
        if not is_sampled:
            self._greedy.observe(probs[0], probs, rank)
        elif not is_inside:
            self._bonus.observe(probs[0], probs, rank)
        else:
            happened = 0 if is_accepted else None if rank is None else rank + 1
            self._replaced.observe(probs[0], _replacement(probs), happened)


def _replacement(probs: Sequence[float]) -> list[float]:
    """What is predicted inside a sampled chunk before anything was seen.

    Acceptance as often as the draft is sure of itself, else each candidate by its own probability.
    """
    return [probs[0], *((1.0 - probs[0]) * prob for prob in probs)]
