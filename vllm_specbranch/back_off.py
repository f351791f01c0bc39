"""How long to wait before the next try at something that keeps failing. Pure; any process."""

import time
from collections.abc import Callable

# The first retry is quick, because most failures are single events; what keeps failing must not eat a core.
FIRST_BACK_OFF_S = 0.5
LONGEST_BACK_OFF_S = 30.0
# What lived this long was healthy: its next failure starts a new series.
HEALTHY_AFTER_S = 60.0
# Silent for this long: a server that hangs will not come back, begin anew.
HUNG_S = 10.0


class BackOff:
    """Waits that double from one failure to the next, up to a limit.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._after_s = 0.0
        self._started_s = 0.0
        self.next_s = FIRST_BACK_OFF_S

    @property
    def is_over(self) -> bool:
        """Whether the next try may be made."""
        return self._clock() >= self._after_s

    def started(self) -> None:
        """A try begins; how long it lives decides about the series."""
        self._started_s = self._clock()

    def failed(self) -> float:
        """What was started has ended. Returns how long the next try has to wait, in seconds."""
        if self._clock() - self._started_s > HEALTHY_AFTER_S:
            self.next_s = FIRST_BACK_OFF_S
        return self.postpone()

    def postpone(self, wait_s: float = 0.0) -> float:
        """The next try has to wait for its turn in the series, or for `wait_s` if that is longer. Returns the wait in seconds."""
        wait_s = max(wait_s, self.next_s)
        self._after_s = self._clock() + wait_s
        self.next_s = min(2 * self.next_s, LONGEST_BACK_OFF_S)
        return wait_s
