"""What to say of a round before it is verified, its class and how much to submit: by confidence, by a head, by both.

Owns the rules that a head is held against, their thresholds, and the round model by which rules are compared. Pure arithmetic on
recorded rounds. Runs in the process of `vllm-specbranch train-head` or a benchmark.

The round model: a round of the target costs c draft steps. Of n submitted tokens min(a, n) are accepted, and the target adds
one. When all n are accepted, the next chunk is there (branches grow below the end of the chunk); when one is rejected, drafting
starts anew and the round waits for `WAIT_STEPS` draft steps. Speed is tokens per time. That flatters short chunks a little:
that the target's own token is among the branches is taken for granted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_specbranch.head_data import Rounds, labels_of
from vllm_specbranch.length_head import NUM_CLASSES

# Draft tokens that are waited for after a miss.
WAIT_STEPS = 2.0
# Thresholds that are tried.
EPSILONS = tuple(round(0.05 * step, 2) for step in range(20))
_QUANTILES = 40
# Logits are finite and small; a head that loses this much of one never says the class.
_NEVER = 1e4
_SHIFTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, _NEVER)


def lengths_by_confidence(top_probs: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`[n] int64`, how many tokens come before the first one whose top probability is below `epsilon` (the paper's soft signal).

    Args:
        top_probs: `[n, gamma]`.
        epsilon: 0..1; 0 cuts nothing.
    """
    return (top_probs >= epsilon).long().cumprod(dim=1).sum(dim=1)


def classes_by_length(lengths: torch.Tensor, gamma: int) -> torch.Tensor:
    """`[n] int64`: the class that a chunk of so many tokens says, as if all of it and no more were to be accepted."""
    return labels_of(lengths, gamma)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Class by two thresholds: 0 with a confidence below `low` at the first token, 2 with a survival of at least `high`, else 1.

    At temperature > 0 the first token's confidence is all that may be looked at (rule 2 of the design, section 3).
    """

    low: float
    high: float

    def classes(self, rounds: Rounds) -> torch.Tensor:
        """`[n] int64`."""
        first = rounds.top_probs[:, 0]
        found = torch.ones(len(rounds), dtype=torch.int64)
        found[survival(rounds) >= self.high] = 2
        found[first < self.low] = 0
        return found


def survival(rounds: Rounds) -> torch.Tensor:
    """`[n] float32`, product of the chunk's confidences; at temperature > 0 the first one alone."""
    whole = rounds.top_probs.prod(dim=1)
    return torch.where(rounds.temperatures > 0, rounds.top_probs[:, 0], whole)


def best_epsilon_for_classes(rounds: Rounds) -> float:
    """The threshold whose chunks name most classes right."""
    labels = rounds.labels

    def correct(epsilon: float) -> int:
        lengths = lengths_by_confidence(rounds.top_probs, epsilon)
        return int((classes_by_length(lengths, rounds.gamma) == labels).sum())

    return max(EPSILONS, key=correct)


def best_bounds(rounds: Rounds) -> Bounds:
    """The two thresholds that name most classes right, among the quantiles of what they are compared with."""
    labels, first, whole = rounds.labels, rounds.top_probs[:, 0], survival(rounds)
    grid = torch.linspace(0, 1, _QUANTILES)
    # Thresholds beyond both ends leave a class out.
    lows = [0.0, *torch.quantile(_some(first), grid).tolist()]
    highs = [*torch.quantile(_some(whole), grid).tolist(), 2.0]
    best, most = Bounds(lows[0], highs[-1]), -1
    for low in lows:
        is_low = first < low
        right_low = int((labels[is_low] == 0).sum())
        rest, rest_labels = whole[~is_low], labels[~is_low]
        for high in highs:
            is_high = rest >= high
            right = right_low + int((rest_labels[is_high] == 2).sum()) + int((rest_labels[~is_high] == 1).sum())
            if right > most:
                best, most = Bounds(low, high), right
    return best


def _some(values: torch.Tensor, most: int = 1_000_000) -> torch.Tensor:
    """Quantiles are limited in their number of values."""
    return values[:: max(1, -(-len(values) // most))]


def submitted(rounds: Rounds, epsilon: float, classes: torch.Tensor | None = None) -> torch.Tensor:
    """`[n] int64`, tokens submitted: class 0 none, class 2 all, class 1 (and all without a head) up to the threshold.

    Args:
        epsilon: 0 for no cut.
        classes: `[n] int64` of a head; None for none.
    """
    lengths = lengths_by_confidence(rounds.top_probs, epsilon)
    if classes is None:
        return lengths
    lengths = torch.where(classes == 2, rounds.gamma, lengths)
    return torch.where(classes == 0, 0, lengths)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rule makes of some rounds, in the round model.

    Attributes:
        tokens, costs: `[num_prompts] float64`, summed over the rounds of each prompt; costs in draft steps.
        num_accepted, num_wasted: tokens of all rounds that were accepted, and rejected.
    """

    tokens: torch.Tensor
    costs: torch.Tensor
    num_accepted: int
    num_wasted: int

    @property
    def speed(self) -> float:
        """Tokens per draft step."""
        return float(self.tokens.sum() / self.costs.sum())


def outcome(rounds: Rounds, lengths: torch.Tensor, c: float, miss_cost: float = WAIT_STEPS) -> Outcome:
    """See the round model at the top of this file.

    Args:
        lengths: `[n]`, tokens submitted.
        c: draft steps that a round of the target takes.
        miss_cost: draft steps that a round with a rejected token takes longer.
    """
    accepted = torch.minimum(rounds.accepted, lengths)
    missed = rounds.accepted < lengths
    _, groups = torch.unique(rounds.prompts, return_inverse=True)
    num_groups = int(groups.max()) + 1

    def by_prompt(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, values.double())

    return Outcome(
        tokens=by_prompt(accepted + 1),
        costs=by_prompt(c + miss_cost * missed),
        num_accepted=int(accepted.sum()),
        num_wasted=int((lengths - accepted).sum()),
    )


def best_epsilon(rounds: Rounds, c: float, classes: torch.Tensor | None = None, miss_cost: float = WAIT_STEPS) -> float:
    """The threshold that is quickest in the round model, without a head or with one."""
    return max(EPSILONS, key=lambda epsilon: outcome(rounds, submitted(rounds, epsilon, classes), c, miss_cost).speed)


def best_shifts(logits: torch.Tensor, rounds: Rounds, c: float, miss_cost: float = WAIT_STEPS) -> tuple[float, float]:
    """What to take from the logits of classes 0 and 2, so that what is said is worth most in the round model.

    A wrong 0 gives away tokens that would have been accepted, which a right one seldom makes up for: naming most rounds right
    is another aim. The greatest shift means that a class is never worth saying. Of shifts that are worth the same, the smallest
    are taken.

    Args:
        logits: `[n, 3]` of a head.
        rounds: `[n]`, which it was not trained on.
        c, miss_cost: as for `outcome`.
    """

    def speed(zero: float, two: float) -> float:
        classes = shifted(logits, (zero, two)).argmax(dim=1)
        return max(outcome(rounds, submitted(rounds, one, classes), c, miss_cost).speed for one in EPSILONS)

    speeds = {(zero, two): speed(zero, two) for zero in _SHIFTS for two in _SHIFTS}
    best = max(speeds.values())
    return min((pair for pair, its in speeds.items() if its >= best - 1e-9), key=sum)


def shifted(logits: torch.Tensor, shifts: tuple[float, float]) -> torch.Tensor:
    """`[n, 3]`: logits less what `best_shifts` says."""
    zero, two = shifts
    return logits - torch.tensor([zero, 0.0, two])


def ratio_interval(ours: Outcome, theirs: Outcome, num_samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the ratio of two speeds over the same prompts, which are drawn anew with replacement."""
    picks = torch.randint(
        len(ours.tokens), (num_samples, len(ours.tokens)), generator=torch.Generator().manual_seed(seed)
    )

    def speeds(one: Outcome) -> torch.Tensor:
        return one.tokens[picks].sum(dim=1) / one.costs[picks].sum(dim=1)

    low, high = torch.quantile(
        speeds(ours) / speeds(theirs), torch.tensor([0.025, 0.975], dtype=torch.float64)
    ).tolist()
    return low, high


def confusion(labels: torch.Tensor, predicted: torch.Tensor) -> list[list[int]]:
    """`[3][3]`: rounds by their class (rows) and what was said of them (columns)."""
    flat = torch.bincount(labels * NUM_CLASSES + predicted, minlength=NUM_CLASSES**2)
    found: Sequence[Sequence[int]] = flat.view(NUM_CLASSES, NUM_CLASSES).tolist()
    return [list(row) for row in found]
