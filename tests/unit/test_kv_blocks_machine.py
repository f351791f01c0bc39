"""Random operations on a pool of KV blocks, beside a memory that is really written and copied."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.strategies import block_shapes, pick, picks
from vllm_specbranch.errors import KVError, OutOfBlocksError
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks

MAX_TABLES = 7
MIN_STEPS = 50_000
UNKNOWN_SEQ = 10**9
FREED = -1

num_steps = 0


class BlocksMachine(RuleBasedStateMachine):
    """Runs a pool beside a memory of its blocks, with what each sequence wrote as the model.

    Every token written is a new number. A block that no table holds is wiped. So a missed copy, a block given to two
    sequences, or one freed too early shows as a sequence that reads what it did not write.
    """

    @initialize(shape=block_shapes())
    def start(self, shape: tuple[int, int]) -> None:
        global num_steps
        num_steps -= 1  # the invariant counts this too, and it is not a rule
        num_blocks, self.block_size = shape
        self.blocks = KVBlocks(num_blocks, self.block_size)
        self.memory = [FREED] * (num_blocks * self.block_size)
        self.written: dict[int, list[int]] = {}
        self.family: dict[int, int] = {}
        self.next_seq = 0
        self.next_token = 0

    # Hypothesis switches rules off at random, run by run, so that many runs are without one that adds something, and
    # drops a run in which no rule is allowed. So no rule has a precondition, and those that take away first see to it
    # that there is something to take.

    def seq(self, number: int) -> int:
        """One of the sequences. Makes some first, with shared blocks, if there are fewer than two."""
        if len(self.written) < 2:
            self.allocate()
            first = self.next_seq - 1
            self.extend(first, 1 + number % 7)
            self.fork_from(first, number % 3)
            self.extend(pick(number, [first, first + 1]), number % 2)
        return pick(number, list(self.written))

    def new_seq(self, family: int | None, written: list[int]) -> int:
        """Note a new sequence in the model; returns its name."""
        seq = self.next_seq
        self.next_seq += 1
        self.written[seq] = written
        self.family[seq] = seq if family is None else family
        return seq

    def make_room(self) -> None:
        """Free the oldest sequence if there are many."""
        if len(self.written) >= MAX_TABLES:
            self.free(0)

    def forget(self, seq: int) -> None:
        """Drop a sequence from the model."""
        del self.written[seq], self.family[seq]

    def snapshot(self) -> tuple[int, int, dict[int, list[int]]]:
        """All that can be seen from outside."""
        return self.blocks.num_free, self.blocks.num_tables, {seq: self.blocks.block_ids(seq) for seq in self.written}

    def reserve(self, seq: int, num_tokens: int) -> list[BlockCopy] | None:
        """Append to the pool, checked against counts made from all block tables; None if it ran dry."""
        blocks, size = self.blocks, self.block_size
        before = self.snapshot()
        num_free, _, tables = before
        length = blocks.num_tokens(seq)
        holders = Counter(block_id for table in tables.values() for block_id in table)
        copies_tail = num_tokens > 0 and length % size != 0 and holders[tables[seq][-1]] > 1
        num_needed = -(-(length + num_tokens) // size) - len(tables[seq]) + copies_tail
        assert blocks.num_new_blocks(seq, num_tokens) == num_needed
        if num_needed > num_free:
            with pytest.raises(OutOfBlocksError):
                blocks.append(seq, num_tokens)
            assert self.snapshot() == before
            return None
        copies = blocks.append(seq, num_tokens)
        assert blocks.num_free == num_free - num_needed
        assert [copy.source for copy in copies] == tables[seq][-1:] * copies_tail
        assert not any(copy.destination in holders for copy in copies)
        return copies

    def write(self, copies: list[BlockCopy], appended: dict[int, int]) -> None:
        """What a forward pass does: all block copies in order, then the new tokens of each sequence."""
        size = self.block_size
        for copy in copies:
            kept = self.memory[copy.source * size : (copy.source + 1) * size]
            self.memory[copy.destination * size : (copy.destination + 1) * size] = kept
        for seq, num_tokens in appended.items():
            start = len(self.written[seq])
            for slot in self.blocks.slots(seq, start, start + num_tokens):
                self.memory[slot] = self.next_token
                self.written[seq].append(self.next_token)
                self.next_token += 1

    @rule()
    def allocate(self) -> None:
        self.make_room()
        self.blocks.allocate(self.new_seq(None, []))

    @rule(which=picks(), back=st.integers(0, 4))
    def fork(self, which: int, back: int) -> None:
        self.make_room()
        self.fork_from(self.seq(which), back)

    def fork_from(self, seq: int, back: int) -> None:
        """Fork in the pool and in the model, `back` tokens before the end."""
        num_tokens = max(0, len(self.written[seq]) - back)
        num_free, table = self.blocks.num_free, self.blocks.block_ids(seq)
        new_seq = self.new_seq(self.family[seq], self.written[seq][:num_tokens])
        self.blocks.fork(seq, new_seq, num_tokens)
        assert self.blocks.num_free == num_free
        assert self.blocks.block_ids(new_seq) == table[: -(-num_tokens // self.block_size)]

    @rule(which=picks(), num_branches=st.integers(1, 3))
    def branch(self, which: int, num_branches: int) -> None:
        """Fork at the very end, then write a token to each branch and to the first one."""
        for _ in range(num_branches):
            self.fork(which, 0)
        self.append_to_all(1)

    @rule(which=picks(), num_tokens=st.integers(0, 6))
    def append(self, which: int, num_tokens: int) -> None:
        self.extend(self.seq(which), num_tokens)

    def extend(self, seq: int, num_tokens: int) -> None:
        """Append in the pool and in the model, if there are blocks."""
        copies = self.reserve(seq, num_tokens)
        if copies is not None:
            self.write(copies, {seq: num_tokens})

    @rule(num_tokens=st.integers(1, 3))
    def append_to_all(self, num_tokens: int) -> None:
        """One batched draft step: slots for every branch first, then all copies, then all writes."""
        all_copies: list[BlockCopy] = []
        appended: dict[int, int] = {}
        for seq in self.written:
            copies = self.reserve(seq, num_tokens)
            if copies is not None:
                all_copies += copies
                appended[seq] = num_tokens
        self.write(all_copies, appended)

    @rule(which=picks(), back=st.integers(0, 4))
    def rollback(self, which: int, back: int) -> None:
        seq = self.seq(which)
        num_tokens = max(0, len(self.written[seq]) - back)
        table = self.blocks.block_ids(seq)
        self.blocks.rollback(seq, num_tokens)
        del self.written[seq][num_tokens:]
        assert self.blocks.block_ids(seq) == table[: -(-num_tokens // self.block_size)]

    @rule(which=picks(), spared=picks())
    def commit(self, which: int, spared: int) -> None:
        winner = self.seq(which)
        family = [seq for seq in self.written if self.family[seq] == self.family[winner] and seq != winner]
        losers = [seq for index, seq in enumerate(family) if not spared >> index & 1]
        table = self.blocks.block_ids(winner)
        self.blocks.commit(winner, iter(losers))
        assert self.blocks.block_ids(winner) == table
        for loser in losers:
            self.forget(loser)

    @rule(which=picks())
    def free(self, which: int) -> None:
        seq = self.seq(which)
        self.blocks.free(seq)
        self.forget(seq)

    @rule(which=picks())
    def evict(self, which: int) -> None:
        """A whole request goes, with all its branches."""
        family = self.family[self.seq(which)]
        for seq in [seq for seq in self.written if self.family[seq] == family]:
            self.blocks.free(seq)
            self.forget(seq)

    @rule(which=picks(), what=st.integers(0, 8))
    def misuse(self, which: int, what: int) -> None:
        blocks, seq, before = self.blocks, self.seq(which), self.snapshot()
        gone = pick(which, [seq for seq in range(self.next_seq) if seq not in self.written] or [UNKNOWN_SEQ])
        length = len(self.written[seq])
        calls: list[Callable[[], object]] = [
            lambda: blocks.allocate(seq),
            lambda: blocks.fork(seq, UNKNOWN_SEQ, length + 1),
            lambda: blocks.fork(gone, UNKNOWN_SEQ, 0),
            lambda: blocks.append(gone, 1),
            lambda: blocks.append(seq, -1),
            lambda: blocks.rollback(seq, length + 1),
            lambda: blocks.commit(seq, [*(other for other in self.written if other != seq), gone]),
            lambda: blocks.commit(gone, [seq]),
            lambda: blocks.free(gone),
        ]
        with pytest.raises(KVError):
            calls[what]()
        assert self.snapshot() == before

    @invariant()
    def pool_equals_model(self) -> None:
        global num_steps
        num_steps += 1
        blocks, size = self.blocks, self.block_size
        blocks.check_integrity()
        held: set[int] = set()
        for seq, written in self.written.items():
            table = blocks.block_ids(seq)
            held.update(table)
            assert (blocks.num_tokens(seq), len(table)) == (len(written), -(-len(written) // size))
            slots = [table[position // size] * size + position % size for position in range(len(written))]
            assert blocks.slots(seq, 0, len(written)) == slots
            assert [self.memory[slot] for slot in slots] == written
        assert (blocks.num_held, blocks.num_tables) == (len(held), len(self.written))
        assert blocks.num_free + blocks.num_held == blocks.num_blocks
        for block_id in set(range(blocks.num_blocks)) - held:
            self.memory[block_id * size : (block_id + 1) * size] = [FREED] * size


@pytest.mark.timeout(300)
@pytest.mark.steps
def test_random_operations_never_leak_share_or_lose_a_block() -> None:
    steps_before = num_steps
    limits = settings(max_examples=580, stateful_step_count=100, deadline=None, derandomize=False)
    run_state_machine_as_test(BlocksMachine, settings=limits)
    assert num_steps - steps_before >= MIN_STEPS
