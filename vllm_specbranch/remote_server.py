"""Draft servers that somebody else started: which one to connect to, when, and when to try again.

Owns the choice among several addresses and the back-off of each, as `placement.ServerProcess` owns it between starts; `DraftLink`
uses the two alike. Starts and ends nothing but connections. Runs in the target's worker (output rank).

    a --dead, silent or refused--> b --...--> c --...--> a, unless its back-off is not over yet
"""

import logging
import time
from collections.abc import Callable, Sequence

from vllm_specbranch.back_off import HUNG_S, LONGEST_BACK_OFF_S, BackOff

logger = logging.getLogger("vllm.specbranch.remote_server")

# A server that is there answers a handshake in milliseconds; a socket that found nobody keeps trying by itself meanwhile. Where
# there is another server to go to, less patience is needed.
LONGEST_HANDSHAKE_S = 5.0
LONGEST_HANDSHAKE_BESIDE_OTHERS_S = 1.0
# More than it takes to answer a `Hello` anew.
LONGEST_SILENCE_BESIDE_OTHERS_S = 0.25


class RemoteServer:
    """Draft servers at fixed addresses, one of which is used at a time: the same one for as long as it answers.

    Args:
        addresses: where they listen, `tcp://host:port`; the first one is tried first.
        clock: seconds, monotonic.
    """

    pid: int | None = None
    is_shared = True

    def __init__(self, addresses: Sequence[str], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._addresses = tuple(addresses)
        self._back_offs = [BackOff(clock) for _ in self._addresses]
        self._present = 0
        self._is_open = False
        self._is_stopped = False
        self.num_starts = 0
        has_others = len(self._addresses) > 1
        self.longest_start_s = LONGEST_HANDSHAKE_BESIDE_OTHERS_S if has_others else LONGEST_HANDSHAKE_S
        self.longest_silence_s = LONGEST_SILENCE_BESIDE_OTHERS_S if has_others else HUNG_S

    @property
    def address(self) -> str:
        """Of the server that is used, or was last."""
        return self._addresses[self._present]

    def is_running(self) -> bool:
        """Whether there is a connection to keep; whether anybody answers on it is for `DraftLink` to find out."""
        return self._is_open

    def ensure_running(self) -> bool:
        """Allow a connection if there is none: to the next server in the circle whose back-off is over.

        Returns:
            Whether a new one is to be made.
        """
        if self._is_open or self._is_stopped:
            return False
        count = len(self._addresses)
        first = self._present + 1 if self.num_starts else 0
        for index in (number % count for number in range(first, first + count)):
            if self._back_offs[index].is_over:
                if self.num_starts and index != self._present:
                    logger.info("Trying the draft server at %s.", self._addresses[index])
                self._present = index
                self._is_open = True
                self.num_starts += 1
                self._back_offs[index].started()
                return True
        return False

    def kill(self) -> None:
        """Give the connection up; `ensure_running` goes to the next server at once, and to this one after its back-off."""
        if self._is_open:
            self._is_open = False
            self._back_offs[self._present].failed()

    def refused(self, is_final: bool) -> None:
        """The server does not draft for this engine. If it never will, another may take its place: ask again, but seldom."""
        self._is_open = False
        wait_s = self._back_offs[self._present].postpone(LONGEST_BACK_OFF_S if is_final else 0.0)
        logger.info("The draft server at %s is asked again in %.1f s.", self.address, wait_s)

    def stop(self) -> None:
        """No more connections. Safe to call again."""
        self._is_open = False
        self._is_stopped = True
