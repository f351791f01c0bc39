"""Whether speculation pays at all under the present load: measured, by rounds with it and rounds without it.

The price of verification (`draft_peers.Peer.price`) narrows what is drafted, by a model of the costs. This is the floor below it,
and knows no model: where an engine is faster with nobody drafting for it, nobody does. Owns one `BenefitGate` per size class of
the batch. Pure Python, draft server process.
"""

from vllm_specbranch.benefit_gate import BenefitGate, Trials

# A gain shows in a few pairs, or is too small to matter; after a pause the drafts of the first rounds are short. What a block
# without drafts leaves unread is one row of the draft step after it (`draft_work.MAX_DECODE_TOKENS`).
OF_SPECULATION = Trials(8, 3, 4, 16, 3.0, 2.0, is_trusted=True)
# Rounds of one request before the first trial of a size class; a batch of n requests has seen them after a n-th.
FIRST_REST_ROUNDS = 1024


class LoadGate:
    """The trials of one engine: batches of 1, of 2 to 3, of 4 to 7 requests and so on each have their own.

    A request alone is drafted for 1,024 rounds before the first trial, a batch of 64 for one block; trials become rarer as long as
    their verdict is the same.
    """

    def __init__(self) -> None:
        self._gates: dict[int, BenefitGate] = {}
        self._size_class = 1
        self._gate = self._gates.setdefault(1, _new_gate(1))

    @property
    def is_on(self) -> bool:
        """Whether the coming chunks are drafted for."""
        return self._gate.is_on

    @property
    def num_trials(self) -> int:
        """Verdicts so far, over all sizes."""
        return sum(gate.num_trials for gate in self._gates.values())

    def observe_round(
        self, num_requests: int, duration_s: float, num_tokens: int, *, is_catching_up: bool = False
    ) -> None:
        """Take in a round without a prefill.

        Args:
            num_requests: that took part, at least one.
            duration_s: of the whole round, waits included.
            num_tokens: that it committed.
            is_catching_up: whether the draft model has yet to read what was committed during a pause.
        """
        size_class = num_requests.bit_length()
        if size_class == self._size_class:
            is_settled = not (is_catching_up and self._gate.is_on)
            self._gate.observe_round(duration_s, num_tokens / num_requests, is_settled=is_settled)
            return
        self._size_class = size_class
        if size_class not in self._gates:
            self._gates[size_class] = _new_gate(size_class)
        self._gate = self._gates[size_class]
        self._gate.begin_block_anew()


def _new_gate(size_class: int) -> BenefitGate:
    rounds_of_a_block = OF_SPECULATION.block_rounds + OF_SPECULATION.settling_rounds
    return BenefitGate(OF_SPECULATION, max(1, (FIRST_REST_ROUNDS >> (size_class - 1)) // rounds_of_a_block))
