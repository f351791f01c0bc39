"""Tests of `kv_blocks`, one rule of the accounting at a time."""

from collections.abc import Callable

import pytest

from vllm_specbranch.errors import KVError, OutOfBlocksError
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks

UNKNOWN_SEQ = 10**9


def pool(num_blocks: int, block_size: int, **tables: int) -> KVBlocks:
    """A pool with sequences 0, 1, ... of as many tokens as the keyword arguments say."""
    blocks = KVBlocks(num_blocks, block_size)
    for seq, num_tokens in enumerate(tables.values()):
        blocks.allocate(seq)
        assert blocks.append(seq, num_tokens) == []
    return blocks


def counts(blocks: KVBlocks) -> tuple[int, int, int]:
    """`(num_free, num_held, num_tables)`, after a check of all rules."""
    blocks.check_integrity()
    return blocks.num_free, blocks.num_held, blocks.num_tables


def test_a_new_pool_is_all_free() -> None:
    blocks = KVBlocks(5, 4)
    assert (blocks.num_blocks, blocks.block_size) == (5, 4)
    assert counts(blocks) == (5, 0, 0)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_needs_blocks_with_room(num_blocks: int, block_size: int) -> None:
    with pytest.raises(KVError, match=f"num_blocks={num_blocks} and block_size={block_size}"):
        KVBlocks(num_blocks, block_size)


def test_append_takes_a_block_only_when_one_is_full() -> None:
    blocks = pool(4, 4, seq=0)
    assert (blocks.num_tokens(0), blocks.block_ids(0), counts(blocks)) == (0, [], (4, 0, 1))
    needed = []
    for _ in range(9):
        needed.append(blocks.num_new_blocks(0, 1))
        assert blocks.append(0, 1) == []
    assert needed == [1, 0, 0, 0, 1, 0, 0, 0, 1]
    assert blocks.append(0, 0) == [] and blocks.num_new_blocks(0, 0) == 0
    assert (blocks.num_tokens(0), len(blocks.block_ids(0)), counts(blocks)) == (9, 3, (1, 3, 1))


def test_slots_are_block_times_size_plus_offset() -> None:
    blocks = pool(4, 4, first=3, second=2)
    blocks.append(0, 6)
    table = blocks.block_ids(0)
    assert table != sorted(range(table[0], table[0] + 3)), "the table of the first should not be contiguous here"
    expected = [table[position // 4] * 4 + position % 4 for position in range(9)]
    for start in range(10):
        for end in range(start, 10):
            assert blocks.slots(0, start, end) == expected[start:end]
    for start, end in ((-1, 2), (3, 2), (0, 10)):
        with pytest.raises(KVError, match="it has 9 tokens"):
            blocks.slots(0, start, end)


def test_block_ids_is_a_copy() -> None:
    blocks = pool(4, 4, seq=8)
    blocks.block_ids(0).clear()
    assert len(blocks.block_ids(0)) == 2


@pytest.mark.parametrize(("num_tokens", "num_shared"), [(0, 0), (1, 1), (4, 1), (5, 2), (10, 3)])
def test_fork_shares_what_covers_the_prefix_and_takes_nothing(num_tokens: int, num_shared: int) -> None:
    blocks = pool(8, 4, seq=10)
    blocks.fork(0, 1, num_tokens)
    assert blocks.block_ids(1) == blocks.block_ids(0)[:num_shared]
    assert blocks.num_tokens(1) == num_tokens
    assert counts(blocks) == (5, 3, 2)


def test_the_first_writer_of_a_shared_tail_gets_a_copy() -> None:
    blocks = pool(8, 4, seq=6)
    full, tail = blocks.block_ids(0)
    blocks.fork(0, 1, 6)
    assert blocks.num_new_blocks(1, 1) == 1
    (copy,) = blocks.append(1, 1)
    assert copy == BlockCopy(tail, blocks.block_ids(1)[1])
    assert copy.destination not in (full, tail)
    assert (blocks.block_ids(0), blocks.block_ids(1)[0]) == ([full, tail], full)
    assert counts(blocks) == (5, 3, 2)
    assert blocks.append(0, 1) == [], "the tail has one holder left, which writes in place"
    assert counts(blocks) == (5, 3, 2)


def test_a_copy_is_made_for_a_full_block_that_was_rolled_back_into() -> None:
    blocks = pool(8, 4, seq=4)
    blocks.fork(0, 1, 4)
    blocks.rollback(1, 3)
    assert blocks.num_new_blocks(1, 3) == 2
    (copy,) = blocks.append(1, 3)
    assert copy == BlockCopy(blocks.block_ids(0)[0], blocks.block_ids(1)[0])
    assert counts(blocks) == (5, 3, 2)


def test_no_copy_without_a_write_and_none_at_a_block_boundary() -> None:
    blocks = pool(8, 4, seq=6)
    blocks.fork(0, 1, 6)
    blocks.fork(0, 2, 4)
    assert blocks.append(1, 0) == []
    assert blocks.append(2, 1) == []
    assert counts(blocks) == (5, 3, 3)


def test_out_of_blocks_changes_nothing() -> None:
    blocks = pool(3, 4, seq=6, other=1)
    blocks.fork(0, 2, 6)
    before = [blocks.block_ids(seq) for seq in range(3)]
    for seq, num_tokens, num_needed in ((0, 1, 1), (2, 1, 1), (0, 3, 2), (1, 4, 1)):
        assert blocks.num_new_blocks(seq, num_tokens) == num_needed
        with pytest.raises(OutOfBlocksError, match=f"need {num_needed} blocks, 0 of 3 are free"):
            blocks.append(seq, num_tokens)
    assert [blocks.block_ids(seq) for seq in range(3)] == before
    assert [blocks.num_tokens(seq) for seq in range(3)] == [6, 1, 6]
    assert counts(blocks) == (0, 3, 3)
    assert blocks.append(1, 3) == [], "what needs no block still works"


def test_out_of_blocks_counts_the_copy_too() -> None:
    blocks = pool(3, 4, seq=6)
    blocks.fork(0, 1, 6)
    with pytest.raises(OutOfBlocksError, match="need 2 blocks, 1 of 3 are free"):
        blocks.append(1, 3)
    assert counts(blocks) == (1, 2, 2)
    assert len(blocks.append(1, 2)) == 1


def test_rollback_gives_trailing_blocks_back() -> None:
    blocks = pool(8, 4, seq=10)
    table = blocks.block_ids(0)
    for num_tokens, num_kept in ((10, 3), (9, 3), (8, 2), (5, 2), (1, 1), (0, 0)):
        blocks.rollback(0, num_tokens)
        assert (blocks.num_tokens(0), blocks.block_ids(0)) == (num_tokens, table[:num_kept])
        assert counts(blocks) == (8 - num_kept, num_kept, 1)


def test_rollback_leaves_shared_blocks_to_the_other_holder() -> None:
    blocks = pool(8, 4, seq=10)
    blocks.fork(0, 1, 10)
    blocks.rollback(0, 2)
    assert (len(blocks.block_ids(1)), counts(blocks)) == (3, (5, 3, 2))
    blocks.free(1)
    assert counts(blocks) == (7, 1, 1)


def test_commit_keeps_the_winner_and_frees_the_losers() -> None:
    blocks = pool(8, 4, seq=6)
    for loser in (1, 2):
        blocks.fork(0, loser, 6)
        blocks.append(loser, 3)
    table = blocks.block_ids(1)
    assert counts(blocks) == (2, 6, 3)
    blocks.commit(1, (seq for seq in (0, 2)))
    assert (blocks.block_ids(1), blocks.num_tokens(1)) == (table, 9)
    assert counts(blocks) == (5, 3, 1)
    blocks.commit(1, [])
    assert counts(blocks) == (5, 3, 1)


@pytest.mark.parametrize("losers", [[1, 0], [1, 1], [1, UNKNOWN_SEQ]], ids=["winner", "twice", "unknown"])
def test_a_refused_commit_frees_nobody(losers: list[int]) -> None:
    blocks = pool(8, 4, winner=6, loser=2)
    with pytest.raises(KVError):
        blocks.commit(0, losers)
    with pytest.raises(KVError):
        blocks.commit(UNKNOWN_SEQ, [1])
    assert counts(blocks) == (5, 3, 2)


def test_free_returns_all_blocks_once() -> None:
    blocks = pool(8, 4, seq=6, other=3)
    blocks.free(0)
    assert counts(blocks) == (7, 1, 1)
    with pytest.raises(KVError, match="sequence 0 is unknown"):
        blocks.free(0)
    blocks.allocate(0)
    assert (blocks.num_tokens(0), counts(blocks)) == (0, (7, 1, 2))


UNKNOWN_CALLS: list[Callable[[KVBlocks], object]] = [
    lambda blocks: blocks.fork(UNKNOWN_SEQ, 1, 0),
    lambda blocks: blocks.append(UNKNOWN_SEQ, 1),
    lambda blocks: blocks.num_new_blocks(UNKNOWN_SEQ, 1),
    lambda blocks: blocks.rollback(UNKNOWN_SEQ, 0),
    lambda blocks: blocks.num_tokens(UNKNOWN_SEQ),
    lambda blocks: blocks.block_ids(UNKNOWN_SEQ),
    lambda blocks: blocks.slots(UNKNOWN_SEQ, 0, 0),
]
BAD_CALLS: list[Callable[[KVBlocks], object]] = [
    lambda blocks: blocks.allocate(0),
    lambda blocks: blocks.fork(0, 0, 1),
    lambda blocks: blocks.fork(0, 1, 7),
    lambda blocks: blocks.fork(0, 1, -1),
    lambda blocks: blocks.append(0, -1),
    lambda blocks: blocks.num_new_blocks(0, -1),
    lambda blocks: blocks.rollback(0, 7),
    lambda blocks: blocks.rollback(0, -1),
]


@pytest.mark.parametrize("call", [*UNKNOWN_CALLS, *BAD_CALLS])
def test_a_refused_call_changes_nothing(call: Callable[[KVBlocks], object]) -> None:
    blocks = pool(8, 4, seq=6)
    table = blocks.block_ids(0)
    with pytest.raises(KVError, match=r"sequence \d+"):
        call(blocks)
    assert (blocks.block_ids(0), blocks.num_tokens(0), counts(blocks)) == (table, 6, (6, 2, 1))


@pytest.mark.parametrize("trouble", ["ref_cnt", "leak", "free twice", "free and held", "too long", "twice in a table"])
def test_check_integrity_finds(trouble: str) -> None:
    blocks = pool(8, 4, seq=6)
    table = blocks._tables[0]
    if trouble == "ref_cnt":
        blocks._ref_cnts[table.block_ids[0]] += 1
    elif trouble == "leak":
        blocks._free.pop()
    elif trouble == "free twice":
        blocks._free.append(blocks._free[0])
    elif trouble == "free and held":
        blocks._free[0] = table.block_ids[0]
    elif trouble == "too long":
        table.num_tokens = 4
    else:
        table.block_ids[1] = table.block_ids[0]
    with pytest.raises(KVError, match=r"\d"):
        blocks.check_integrity()
