"""How fast each peer of a draft server may send. Pure; draft server process.

A peer is who it has proved to be (its key), or where it comes from, never what it calls itself: a name costs nothing to change.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

# Two messages a step: this is 2,500 steps a second, together for all engines that share a key (or, without keys, a host).
MAX_MESSAGES_PER_S = 5_000.0
# After a restart of the server an engine sends the whole history of all its requests at once: a token takes up to five bytes.
MAX_BYTES_PER_S = 64.0 * 2**20
# How many seconds' worth may come at once.
BURST_S = 2.0
# Whoever was too fast is not listened to for so long.
PENALTY_S = 1.0
# Of so many peers the rates are known; beyond that the one that has been silent longest is forgotten.
MAX_SOURCES = 1024


@dataclass(slots=True)
class _Source:
    """One peer: what it may still send at once, when that was reckoned, and until when it is not listened to."""

    messages: float
    num_bytes: float
    seen_s: float
    deaf_until_s: float = 0.0


class Rates:
    """Says of each message whether its sender was slow enough.

    Args:
        messages_per_s, bytes_per_s: what a peer may send in the long run.
        clock: seconds, monotonic.

    Attributes:
        num_dropped: messages of peers that were too fast.
        source: the peer that was asked about last; empty before the first.
    """

    def __init__(
        self,
        messages_per_s: float = MAX_MESSAGES_PER_S,
        bytes_per_s: float = MAX_BYTES_PER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._messages_per_s = messages_per_s
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self.num_dropped = 0
        self.source = ""

    @property
    def num_sources(self) -> int:
        """Of how many peers the rates are known."""
        return len(self._sources)

    def admits(self, source: str, num_bytes: int) -> bool:
        """Take a message into account. False: it is to be dropped, because its sender is or was too fast."""
        self.source = source
        now_s = self._clock()
        known = self._sources.pop(source, None)
        if known is None:
            known = _Source(BURST_S * self._messages_per_s, BURST_S * self._bytes_per_s, now_s)
            if len(self._sources) >= MAX_SOURCES:
                self._sources.popitem(last=False)
        self._sources[source] = known
        passed_s = now_s - known.seen_s
        known.seen_s = now_s
        known.messages = min(BURST_S * self._messages_per_s, known.messages + passed_s * self._messages_per_s) - 1.0
        known.num_bytes = min(BURST_S * self._bytes_per_s, known.num_bytes + passed_s * self._bytes_per_s) - num_bytes
        if known.messages < 0.0 or known.num_bytes < 0.0:
            # What is dropped costs nothing more: a debt would grow as long as the flood lasts, and outlive it.
            known.messages, known.num_bytes = max(0.0, known.messages), max(0.0, known.num_bytes)
            known.deaf_until_s = now_s + PENALTY_S
        if now_s < known.deaf_until_s:
            self.num_dropped += 1
            return False
        return True
