"""Whose message a draft server takes in next: of those that wait, the oldest one of the engine that has used the least of its time.

Owns the messages that have arrived and are not handled yet, and how much time handling has cost per engine (start-time fair
queueing). So an engine whose messages cost much, or that sends many, delays another's by one of them at most; what opens much is
handled in parts. What waits has a limit for each connection, a small one for those without a session, and one for all together.
Pure; draft server process.
"""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

from vllm_specbranch.messages import CommitBatch, EngineMessage, Hello, StepBegin

# As many as an engine sends in thirty steps: who is further behind has been answered too late for as long.
MOST_WAITING = 64
# Tokens in them; twice what an engine may hold on a shared server, some 300 MiB of memory.
MOST_WAITING_TOKENS = 8_000_000
# Of all connections together, which cost nothing.
MOST_WAITING_TOKENS_IN_ALL = 4 * MOST_WAITING_TOKENS
# A message, or what it names, takes the memory of so many tokens at least.
LEAST_TOKENS = 8
# Without a session: who means well says hello and waits for the answer.
MOST_WAITING_OF_STRANGERS = 16
MOST_WAITING_TOKENS_OF_STRANGERS = 100_000
# Tokens of requests that are opened in one go: about 10 ms.
MOST_TOKENS = 20_000
# Of so many engines is known what they have used.
MAX_KNOWN = 1024


class Turn(NamedTuple):
    """Whose turn it is.

    Attributes:
        peer: the sender.
        message: it, or a part of it.
        came_s: the earliest time at which it may have come.
        key: the sender's.
    """

    peer: bytes
    message: EngineMessage
    came_s: float
    key: str


class MessageTurns:
    """The messages that wait.

    Args:
        clock: seconds, monotonic; the server's.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        # Those of one engine in the order of their arrival, with the earliest time at which they may have come.
        self._queues: dict[bytes, deque[tuple[float, EngineMessage]]] = {}
        self._num_tokens = Counter[bytes]()
        self._num_tokens_in_all = 0
        self._keys: dict[bytes, str] = {}
        self._used_s: OrderedDict[bytes, float] = OrderedDict()
        # What who is served has used: newcomers begin there, and who was away has saved nothing up.
        self._level_s = 0.0
        self._caught_up_s = clock()

    @property
    def is_waiting(self) -> bool:
        """Whether there are any."""
        return bool(self._queues)

    def caught_up(self) -> None:
        """All that has arrived is here. What comes while the server is busy may have waited since now."""
        self._caught_up_s = self._clock()

    def put(self, peer: bytes, message: EngineMessage, key: str = "", *, has_session: bool = True) -> list[bytes]:
        """Let a message wait; returns of whom too much waited, of which nothing is left.

        Args:
            key: the sender's. Beyond what may wait of all together, the key that has most loses, not a connection: these are many.
            has_session: whether the sender has been admitted.
        """
        if isinstance(message, Hello) and not has_session:
            # What it said before was not for this server, and its hello must not get lost for that.
            self.forget(peer)
        queue = self._queues.get(peer, ())
        num_tokens = _num_tokens(message)
        most = MOST_WAITING if has_session else MOST_WAITING_OF_STRANGERS
        most_tokens = MOST_WAITING_TOKENS if has_session else MOST_WAITING_TOKENS_OF_STRANGERS
        if len(queue) >= most or num_tokens + self._num_tokens[peer] > most_tokens:
            self.forget(peer)
            return [peer]
        if not queue:
            self._use(peer, max(self._used_s.get(peer, 0.0), self._level_s))
        self._queues.setdefault(peer, deque()).append((self._caught_up_s, message))
        self._keys[peer] = key
        self._num_tokens[peer] += num_tokens
        self._num_tokens_in_all += num_tokens
        return self._shed() if self._num_tokens_in_all > MOST_WAITING_TOKENS_IN_ALL else []

    def _shed(self) -> list[bytes]:
        """Drop what is too much: of the key of which most waits, first of its connection of which most waits."""
        of_keys = Counter[str]()
        for peer in self._queues:
            of_keys[self._keys[peer]] += self._num_tokens[peer]
        heaviest_last = sorted(self._queues, key=lambda peer: (of_keys[self._keys[peer]], self._num_tokens[peer]))
        shed = []
        while self._num_tokens_in_all > MOST_WAITING_TOKENS_IN_ALL:
            shed.append(heaviest_last.pop())
            self.forget(shed[-1])
        return shed

    def take(self) -> Turn | None:
        """The next one; None if none waits."""
        if not self._queues:
            return None
        peer = min(self._queues, key=lambda one: self._used_s[one])
        self._level_s = self._used_s[peer]
        queue = self._queues[peer]
        came_s, message = queue.popleft()
        message, rest = _cut(message)
        turn = Turn(peer, message, came_s, self._keys[peer])
        num_tokens = _num_tokens(message)
        self._num_tokens[peer] -= num_tokens
        self._num_tokens_in_all -= num_tokens
        if rest is not None:
            queue.appendleft((came_s, rest))
        elif not queue:
            self.forget(peer)
        return turn

    def charge(self, peer: bytes, duration_s: float) -> None:
        """An engine's message has cost so much time."""
        self._use(peer, self._used_s.get(peer, self._level_s) + duration_s)

    def forget(self, peer: bytes) -> None:
        """Drop what waits of an engine. What it has used stays used."""
        self._queues.pop(peer, None)
        self._keys.pop(peer, None)
        self._num_tokens_in_all -= self._num_tokens.pop(peer, 0)

    def _use(self, peer: bytes, used_s: float) -> None:
        self._used_s[peer] = used_s
        self._used_s.move_to_end(peer)
        if len(self._used_s) > MAX_KNOWN:
            oldest = next((one for one in self._used_s if one not in self._queues), None)
            if oldest is not None:
                del self._used_s[oldest]


def _num_tokens(message: EngineMessage) -> int:
    """How much memory a message takes; of the parts of one together it is the same."""
    num_tokens = 0
    match message:
        case StepBegin():
            num_tokens = LEAST_TOKENS * len(message.closes)
            num_tokens += sum(max(LEAST_TOKENS, len(one.tokens)) for one in message.opens)
        case CommitBatch():
            # These come at every step, so their tokens, a chunk of them at most, are not counted one by one.
            num_tokens = 2 * LEAST_TOKENS * len(message.commits)
    return max(LEAST_TOKENS, num_tokens)


def _cut(message: EngineMessage) -> tuple[EngineMessage, EngineMessage | None]:
    """(what is handled in one go, the rest if any); what is closed is closed first."""
    if not isinstance(message, StepBegin):
        return message, None
    num_tokens = 0
    for index, one in enumerate(message.opens):
        num_tokens += len(one.tokens)
        if index and num_tokens > MOST_TOKENS:
            return StepBegin(message.opens[:index], message.closes), StepBegin(message.opens[index:], [])
    return message, None
