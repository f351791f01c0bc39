"""A draft server that somebody else started: when to connect to it, and when to try again.

Owns the back-off between connections, as `placement.ServerProcess` owns it between starts; `DraftLink` uses the two alike. Starts
and ends nothing but connections. Runs in the target's worker (output rank).
"""

import logging
import time
from collections.abc import Callable

from vllm_specbranch.back_off import LONGEST_BACK_OFF_S, BackOff

logger = logging.getLogger("vllm.specbranch.remote_server")

# A server that is there answers a handshake in milliseconds; a socket that found nobody keeps trying by itself meanwhile.
LONGEST_HANDSHAKE_S = 5.0


class RemoteServer:
    """A draft server at a fixed address.

    Args:
        address: where it listens, `tcp://host:port`.
        clock: seconds, monotonic.
    """

    longest_start_s = LONGEST_HANDSHAKE_S
    pid: int | None = None

    def __init__(self, address: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.address = address
        self._back_off = BackOff(clock)
        self._is_open = False
        self._is_stopped = False
        self.num_starts = 0

    def is_running(self) -> bool:
        """Whether there is a connection to keep; whether anybody answers on it is for `DraftLink` to find out."""
        return self._is_open

    def ensure_running(self) -> bool:
        """Allow a connection if there is none and the back-off is over.

        Returns:
            Whether a new one is to be made.
        """
        if self._is_open or self._is_stopped or not self._back_off.is_over:
            return False
        self._is_open = True
        self.num_starts += 1
        self._back_off.started()
        return True

    def kill(self) -> None:
        """Give the connection up; `ensure_running` allows the next one after the back-off."""
        if self._is_open:
            self._is_open = False
            self._back_off.failed()

    def refused(self, is_final: bool) -> None:
        """The server does not draft for this engine. If it never will, another may take its place: ask again, but seldom."""
        self._is_open = False
        wait_s = self._back_off.postpone(LONGEST_BACK_OFF_S if is_final else 0.0)
        logger.info("The draft server at %s is asked again in %.1f s.", self.address, wait_s)

    def stop(self) -> None:
        """No more connections. Safe to call again."""
        self._is_open = False
        self._is_stopped = True
