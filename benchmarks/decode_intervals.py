"""How sure a ratio is: medians, spread, and the percentile bootstrap.

Owns arithmetic over repetitions. Runs in the process of the benchmark.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one value per repetition."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of two speeds, taken repetition by repetition.

    Attributes:
        to: name of the row compared with.
        low, high: 95% percentile-bootstrap interval of the median. With n repetitions it has no more than n values to
            draw from: five show how far this run's repetitions agree, not what another machine will say.
    """

    to: str
    median: float
    least: float
    most: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most."""
    return Spread(statistics.median(values), min(values), max(values))


def bootstrap(values: Sequence[float], seed: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile-bootstrap interval of the median.

    Args:
        values: one per repetition.
        seed: of the resampling; the same seed gives the same interval.
        confidence: share of the resampled medians within the interval.

    Returns:
        (low, high), widened to the median of the values itself where resampling missed it.
    """
    samples = np.asarray(values, dtype=float)
    chosen = np.random.default_rng(seed).integers(len(samples), size=(NUM_RESAMPLES, len(samples)))
    medians = np.median(samples[chosen], axis=1)
    tail = (1 - confidence) / 2
    # Resampled medians are values of the sample or means of two: no interpolation between them.
    low, high = (float(one) for one in np.quantile(medians, [tail, 1 - tail], method="nearest"))
    middle = statistics.median(values)
    return min(low, middle), max(high, middle)


def ratio(to: str, values: Sequence[float], seed: int) -> Ratio:
    """Summarise ratios to the row `to`, one per repetition."""
    found = spread(values)
    low, high = bootstrap(values, seed)
    return Ratio(to, found.median, found.least, found.most, low, high)
