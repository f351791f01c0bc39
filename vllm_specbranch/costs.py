"""What one more of something costs: a line through measured (amount, time) pairs, old ones fading.

Pure arithmetic. Draft server process.
"""

import math
from dataclasses import dataclass

FADING = 0.99
# With less spread of the amounts than this, measured times say nothing about the slope.
MIN_VARIANCE = 0.05
LONGEST_STEP = 4.0
MIN_WEIGHT = 8.0
# By so many standard errors a slope must be above 0 to count; what is above them is the slope.
DOUBT = 2.0


@dataclass(slots=True)
class LinearCost:
    """time = base + slope x amount, by least squares over fading pairs; the slope is never below 0.

    The slope is a lower bound: noise alone must not make something look dear, because what looks dear is not tried any more, and so
    never looks cheap again.

    Attributes:
        slope_s: seconds per unit, at least; 0 before enough was seen. Kept when all recent amounts are alike.
        mean_s, mean_amount: fading means.
    """

    slope_s: float = 0.0
    mean_s: float = 0.0
    mean_amount: float = 0.0
    _weight: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0
    _variance_s: float = 0.0

    def observe(self, amount: float, duration_s: float) -> None:
        """Take in one measured pair."""
        if self._weight > MIN_WEIGHT:
            # More is not the device: something else had the processor. Should it last, the mean follows in steps.
            duration_s = min(duration_s, LONGEST_STEP * self.mean_s)
        self._weight = FADING * self._weight + 1.0
        rate = 1.0 / self._weight
        away, late = amount - self.mean_amount, duration_s - self.mean_s
        self.mean_amount += rate * away
        self.mean_s += rate * late
        # Moments about the moving means.
        self._variance = (1.0 - rate) * (self._variance + rate * away * away)
        self._covariance = (1.0 - rate) * (self._covariance + rate * away * late)
        self._variance_s = (1.0 - rate) * (self._variance_s + rate * late * late)
        if self._weight >= MIN_WEIGHT and self._variance > MIN_VARIANCE:
            slope_s = self._covariance / self._variance
            unexplained = max(0.0, self._variance_s - slope_s * self._covariance)
            error_s = math.sqrt(unexplained / (self._weight * self._variance))
            self.slope_s = max(0.0, slope_s - DOUBT * error_s)

    def estimate_s(self, amount: float) -> float:
        """Seconds for an amount, at least those that it adds to nothing."""
        return max(0.0, self.mean_s + self.slope_s * (amount - self.mean_amount))

    @property
    def relative_slope(self) -> float:
        """What one unit more adds, relative to the time of one unit; 0 before enough was seen."""
        one_s = self.estimate_s(1.0)
        return self.slope_s / one_s if one_s > 0.0 else 0.0
