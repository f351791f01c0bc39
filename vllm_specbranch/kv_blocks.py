"""KV block accounting of the draft server: which block table holds which blocks, shared with reference counts.

Owns block ids, reference counts and block tables. Owns neither the KV memory (`draft_model` copies and writes it) nor
any decision on what to evict (`draft_server`). Runs in the draft server process, on the hot path: a call costs time in
proportion to the blocks it takes, shares or gives back.

Two branches of one sequence, block size 4, `x` a token only the first has, `y` one only the second has:

    table of seq 0:  [ b0: 0 1 2 3 ] [ b1: 4 5 x . ]       ref_cnt: b0 2, b1 1, b2 1
    table of seq 1:  [ b0: 0 1 2 3 ] [ b2: 4 5 y . ]       b2 began as a copy of b1 (copy-on-write)

After every call: the reference count of each block equals the number of tables that hold it, free + held = all blocks,
and a table holds exactly the blocks that cover `[0, num_tokens)`. A call that raises leaves everything as it was.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_specbranch.errors import KVError, OutOfBlocksError


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The caller must copy the whole KV block `source` to `destination` before it writes to any block.

    Attributes:
        source: block id.
        destination: block id.
    """

    source: int
    destination: int


@dataclass(slots=True)
class _Table:
    """One block table: `block_ids[i]` holds the tokens at positions `[i * block_size, (i + 1) * block_size)`."""

    block_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0


class KVBlocks:
    """A pool of KV blocks and the block tables of all sequences, which share blocks with copy-on-write.

    A sequence is named by an integer of the caller's choice.
    """

    __slots__ = ("_block_size", "_free", "_ref_cnts", "_tables")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """Start with all blocks free.

        Args:
            num_blocks: blocks in the pool, at least 1.
            block_size: tokens per block, at least 1.

        Raises:
            KVError: either is less than 1.
        """
        if num_blocks < 1 or block_size < 1:
            raise KVError(f"num_blocks={num_blocks} and block_size={block_size} must both be at least 1")
        self._block_size = block_size
        self._ref_cnts = [0] * num_blocks
        # A stack: the block freed last is taken first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._tables: dict[int, _Table] = {}

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self._block_size

    @property
    def num_blocks(self) -> int:
        """All blocks, free and held."""
        return len(self._ref_cnts)

    @property
    def num_free(self) -> int:
        """Blocks that no table holds."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks that at least one table holds; a shared block counts once."""
        return len(self._ref_cnts) - len(self._free)

    @property
    def num_tables(self) -> int:
        """Sequences known."""
        return len(self._tables)

    def allocate(self, seq: int) -> None:
        """Start a sequence with an empty block table.

        Raises:
            KVError: the sequence is already known.
        """
        self._check_new(seq)
        self._tables[seq] = _Table()

    def fork(self, seq: int, new_seq: int, num_tokens: int) -> None:
        """Start a sequence that shares the first `num_tokens` tokens of another; takes no block.

        Every block covering `[0, num_tokens)` is shared, a partly filled last one too; `append` copies it when one of
        its holders writes to it.

        Raises:
            KVError: `seq` is unknown, `new_seq` is already known, or `num_tokens` is not in [0, num_tokens(seq)].
        """
        table = self._table(seq)
        self._check_new(new_seq)
        self._check_num_tokens(seq, table, num_tokens)
        shared = table.block_ids[: self._num_blocks_for(num_tokens)]
        ref_cnts = self._ref_cnts
        for block_id in shared:
            ref_cnts[block_id] += 1
        self._tables[new_seq] = _Table(shared, num_tokens)

    def append(self, seq: int, num_tokens: int) -> list[BlockCopy]:
        """Reserve slots for `num_tokens` more tokens.

        If the next slot lies in a block that another table holds too, this table gets a copy of its own instead.

        Args:
            seq: the sequence.
            num_tokens: how many tokens more, at least 0.

        Returns:
            Copies to be done before any KV is written; at most one. With several appends before one forward pass, do
            all their copies first, in the order they were returned.

        Raises:
            OutOfBlocksError: fewer blocks are free than `num_new_blocks` says; nothing was changed.
            KVError: `seq` is unknown, or `num_tokens` is negative.
        """
        table = self._table(seq)
        tail = self._shared_tail(table, num_tokens)
        num_new = self._num_missing(seq, table, num_tokens)
        num_needed = num_new + (tail is not None)
        if num_needed > len(self._free):
            raise OutOfBlocksError(
                f"sequence {seq}: {num_tokens} tokens after {table.num_tokens} need {num_needed} blocks, "
                f"{len(self._free)} of {self.num_blocks} are free"
            )
        copies: list[BlockCopy] = []
        if tail is not None:
            source = table.block_ids[tail]
            destination = self._take()
            table.block_ids[tail] = destination
            self._ref_cnts[source] -= 1
            copies.append(BlockCopy(source, destination))
        for _ in range(num_new):
            table.block_ids.append(self._take())
        table.num_tokens += num_tokens
        return copies

    def num_new_blocks(self, seq: int, num_tokens: int) -> int:
        """How many free blocks `append(seq, num_tokens)` would take, with the one for copy-on-write.

        Raises:
            KVError: `seq` is unknown, or `num_tokens` is negative.
        """
        table = self._table(seq)
        return self._num_missing(seq, table, num_tokens) + (self._shared_tail(table, num_tokens) is not None)

    def rollback(self, seq: int, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens of a sequence; gives back the blocks behind them.

        Raises:
            KVError: `seq` is unknown, or `num_tokens` is not in [0, num_tokens(seq)].
        """
        table = self._table(seq)
        self._check_num_tokens(seq, table, num_tokens)
        num_kept = self._num_blocks_for(num_tokens)
        if num_kept < len(table.block_ids):
            self._release(table.block_ids[num_kept:])
            del table.block_ids[num_kept:]
        table.num_tokens = num_tokens

    def commit(self, winner: int, losers: Iterable[int]) -> None:
        """Keep the winner's table and free those of the losers, in one call.

        Raises:
            KVError: a sequence is unknown, is named twice among the losers, or is both winner and loser.
        """
        self._table(winner)
        freed: dict[int, _Table] = {}
        for loser in losers:
            if loser == winner or loser in freed:
                raise KVError(f"sequence {loser} cannot be freed: it is named twice (the winner is {winner})")
            freed[loser] = self._table(loser)
        for loser, table in freed.items():
            del self._tables[loser]
            self._release(table.block_ids)

    def free(self, seq: int) -> None:
        """Forget a sequence and give back its blocks.

        Raises:
            KVError: the sequence is unknown.
        """
        table = self._table(seq)
        del self._tables[seq]
        self._release(table.block_ids)

    def num_tokens(self, seq: int) -> int:
        """Tokens that a sequence has slots for.

        Raises:
            KVError: the sequence is unknown.
        """
        return self._table(seq).num_tokens

    def block_ids(self, seq: int) -> list[int]:
        """A copy of a sequence's block table: `[ceil(num_tokens / block_size)]` block ids.

        Raises:
            KVError: the sequence is unknown.
        """
        return self._table(seq).block_ids.copy()

    def slots(self, seq: int, start: int, end: int) -> list[int]:
        """`[end - start]` slots (`block_id * block_size + offset`) of the token positions `[start, end)`.

        Raises:
            KVError: the sequence is unknown, or not 0 <= start <= end <= num_tokens(seq).
        """
        table = self._table(seq)
        if not 0 <= start <= end <= table.num_tokens:
            raise KVError(f"sequence {seq}: no slots [{start}, {end}), it has {table.num_tokens} tokens")
        block_size = self._block_size
        slots: list[int] = []
        position = start
        while position < end:
            index, offset = divmod(position, block_size)
            first = table.block_ids[index] * block_size + offset
            num_here = min(block_size - offset, end - position)
            slots.extend(range(first, first + num_here))
            position += num_here
        return slots

    def check_integrity(self) -> None:
        """Check every rule of the accounting. For tests and idle moments: walks all tables.

        Raises:
            KVError: a rule is broken; the message gives the numbers.
        """
        membership = [0] * self.num_blocks
        for seq, table in self._tables.items():
            num_expected = self._num_blocks_for(table.num_tokens)
            if len(table.block_ids) != num_expected:
                raise KVError(f"sequence {seq}: {len(table.block_ids)} blocks held != {num_expected} blocks covered")
            if len(set(table.block_ids)) != len(table.block_ids):
                raise KVError(f"sequence {seq} holds a block twice: {table.block_ids}")
            for block_id in table.block_ids:
                membership[block_id] += 1
        for block_id, (ref_cnt, num_holders) in enumerate(zip(self._ref_cnts, membership, strict=True)):
            if ref_cnt != num_holders:
                raise KVError(f"block {block_id}: ref_cnt {ref_cnt} != {num_holders} tables that hold it")
        free = set(self._free)
        if len(free) != len(self._free):
            raise KVError(f"the free list has {len(self._free)} entries but only {len(free)} different blocks")
        held = {block_id for block_id, num_holders in enumerate(membership) if num_holders}
        if free & held:
            raise KVError(f"blocks both free and held: {sorted(free & held)}")
        if len(free) + len(held) != self.num_blocks:
            raise KVError(f"{len(free)} free + {len(held)} held != {self.num_blocks} blocks")

    def _table(self, seq: int) -> _Table:
        try:
            return self._tables[seq]
        except KeyError:
            raise KVError(f"sequence {seq} is unknown ({len(self._tables)} are known)") from None

    def _check_new(self, seq: int) -> None:
        if seq in self._tables:
            raise KVError(f"sequence {seq} is already known, with {self._tables[seq].num_tokens} tokens")

    def _check_num_tokens(self, seq: int, table: _Table, num_tokens: int) -> None:
        if not 0 <= num_tokens <= table.num_tokens:
            raise KVError(f"sequence {seq}: {num_tokens} tokens asked for, it has {table.num_tokens}")

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _num_missing(self, seq: int, table: _Table, num_tokens: int) -> int:
        """Blocks to add behind the table for `num_tokens` more tokens, without copy-on-write."""
        if num_tokens < 0:
            raise KVError(f"sequence {seq}: cannot append {num_tokens} tokens")
        return self._num_blocks_for(table.num_tokens + num_tokens) - len(table.block_ids)

    def _shared_tail(self, table: _Table, num_tokens: int) -> int | None:
        """Index in the table of the block to copy before `num_tokens` more are written, None if there is none."""
        index, offset = divmod(table.num_tokens, self._block_size)
        if num_tokens > 0 and offset and self._ref_cnts[table.block_ids[index]] > 1:
            return index
        return None

    def _take(self) -> int:
        block_id = self._free.pop()
        self._ref_cnts[block_id] = 1
        return block_id

    def _release(self, block_ids: list[int]) -> None:
        """Drop one reference to each block. Last block first, so that they are taken again in their old order."""
        ref_cnts = self._ref_cnts
        for block_id in reversed(block_ids):
            ref_cnts[block_id] -= 1
            if not ref_cnts[block_id]:
                self._free.append(block_id)
