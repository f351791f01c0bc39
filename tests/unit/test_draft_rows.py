"""Rows as arrays: what every query token may see, against xformers' paged causal mask and a simulated KV memory."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specbranch.draft_model import Row, RowArrays
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks

BLOCK_SIZE = 4
NUM_BLOCKS = 40
MAX_ROWS, MAX_TOKENS, MAX_BLOCKS_PER_ROW = 6, 64, 8
MAX_LEN = MAX_BLOCKS_PER_ROW * BLOCK_SIZE

Mask = npt.NDArray[np.bool_]


def make_arrays() -> RowArrays:
    return RowArrays(MAX_ROWS, MAX_TOKENS, MAX_BLOCKS_PER_ROW, BLOCK_SIZE)


def visible_slots(arrays: RowArrays) -> Mask:
    """`[num_tokens, slots]`: the KV slots that a causal paged kernel reads for each query token of `arrays`."""
    mask = np.zeros((arrays.num_tokens, NUM_BLOCKS * BLOCK_SIZE), bool)
    for row in range(arrays.num_rows):
        start, end = arrays.query_start_loc[row : row + 2]
        for query in range(start, end):
            keys = np.arange(arrays.seq_lens[row] - (end - 1 - query))
            mask[query, arrays.block_table[row, keys // BLOCK_SIZE] * BLOCK_SIZE + keys % BLOCK_SIZE] = True
    return mask


def xformers_slots(rows: list[Row]) -> Mask:
    """The same from xformers. Unused table entries name a page of their own, because they blank the page they name."""
    import torch
    from xformers.ops.fmha import attn_bias

    unused = NUM_BLOCKS
    lengths = [len(row.token_ids) for row in rows]
    ends = [row.position + length for row, length in zip(rows, lengths, strict=True)]
    tables = []
    for row, end in zip(rows, ends, strict=True):
        used = list(row.block_ids)[: -(-end // BLOCK_SIZE)]
        tables.append(used + [unused] * (MAX_BLOCKS_PER_ROW + 1 - len(used)))
    bias = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        lengths, ends, torch.tensor(tables), BLOCK_SIZE, device=torch.device("cpu")
    )
    shape = (sum(lengths), len(rows) * (MAX_BLOCKS_PER_ROW + 1) * BLOCK_SIZE)
    mask: Mask = torch.isfinite(bias.materialize(shape)).numpy()
    return mask[:, : NUM_BLOCKS * BLOCK_SIZE]


class World:
    """Sequences over `KVBlocks`, and a KV memory in which each slot remembers the (position, token) written to it."""

    def __init__(self) -> None:
        self.kv = KVBlocks(NUM_BLOCKS, BLOCK_SIZE)
        self.tokens: dict[int, list[int]] = {}
        self.memory: dict[int, tuple[int, int]] = {}
        self.next_seq = 0
        self.next_token = 0
        self.arrays = make_arrays()

    def open(self, parent: int | None, num_tokens: int) -> None:
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        if parent is None:
            self.kv.allocate(seq)
            self.tokens[seq] = []
        else:
            self.kv.fork(parent, seq, num_tokens)
            self.tokens[seq] = self.tokens[parent][:num_tokens]

    def rows(self, lengths: dict[int, int]) -> tuple[list[Row], list[BlockCopy]]:
        """Append that many tokens, each of them unique, to each sequence."""
        rows, copies = [], list[BlockCopy]()
        for seq, length in lengths.items():
            copies += self.kv.append(seq, length)
            fresh = list(range(self.next_token, self.next_token + length))
            self.next_token += length
            rows.append(Row(fresh, len(self.tokens[seq]), self.kv.block_ids(seq)))
            self.tokens[seq] += fresh
        return rows, copies

    def forward(self, rows: list[Row], copies: list[BlockCopy]) -> Mask:
        """Copy, fill and write as a forward does; returns what the query tokens see."""
        for copy in copies:
            for offset in range(BLOCK_SIZE):
                source = self.memory.get(copy.source * BLOCK_SIZE + offset, (-1, -1))
                self.memory[copy.destination * BLOCK_SIZE + offset] = source
        self.arrays.fill(rows)
        batch = zip(self.arrays.slot_mapping, self.arrays.positions, self.arrays.input_ids, strict=True)
        for slot, position, token in list(batch)[: self.arrays.num_tokens]:
            self.memory[int(slot)] = (int(position), int(token))
        return visible_slots(self.arrays)

    def check(self, lengths: dict[int, int]) -> None:
        rows, copies = self.rows(lengths)
        seen = self.forward(rows, copies)
        np.testing.assert_array_equal(seen, xformers_slots(rows))
        query = 0
        for index, (seq, length) in enumerate(lengths.items()):
            tokens = self.tokens[seq]
            for end in range(len(tokens) - length + 1, len(tokens) + 1):
                contents = sorted(self.memory.get(int(slot), (-1, -1)) for slot in np.flatnonzero(seen[query]))
                assert contents == list(enumerate(tokens[:end]))
                query += 1
            assert self.arrays.last_tokens[index] == query - 1


@settings(deadline=None)
@given(st.data())
def test_each_query_token_sees_exactly_the_keys_of_its_own_branch(data: st.DataObject) -> None:
    """Random opens, forks, rollbacks, commits and forwards over mixed rows."""
    world = World()
    for _ in range(data.draw(st.integers(1, 8), "forwards")):
        seqs = sorted(world.tokens)
        for seq in data.draw(st.lists(st.sampled_from([None, *seqs]), max_size=3), "forks"):
            if len(world.tokens) < MAX_ROWS:
                length = len(world.tokens[seq]) if seq is not None else 0
                world.open(seq, data.draw(st.integers(length // 2, length), "kept by the fork"))
        if seqs and data.draw(st.booleans(), "rollback?"):
            seq = data.draw(st.sampled_from(seqs))
            del world.tokens[seq][data.draw(st.integers(0, len(world.tokens[seq])), "kept by the rollback") :]
            world.kv.rollback(seq, len(world.tokens[seq]))
        if len(seqs) > 1 and data.draw(st.booleans(), "commit?"):
            world.kv.commit(seqs[1], [seqs[0]])
            del world.tokens[seqs[0]]
        room = {seq: MAX_LEN - len(tokens) for seq, tokens in world.tokens.items()}
        lengths = {
            seq: data.draw(st.one_of(st.just(1), st.integers(1, min(9, left))), f"query tokens of {seq}")
            for seq, left in room.items()
            if left > 0
        }
        if lengths and world.kv.num_free >= sum(world.kv.num_new_blocks(seq, n) for seq, n in lengths.items()):
            world.check(lengths)


@pytest.mark.parametrize("broken", ["slot", "copy", "position", "table"])
def test_the_checks_above_can_fail(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.open(None, 0)
    world.check({0: 6})
    world.open(0, 6)
    fill = RowArrays.fill

    def broken_fill(arrays: RowArrays, rows: list[Row]) -> None:
        fill(arrays, rows)
        if broken == "slot":
            arrays.slot_mapping[0] += 1
        elif broken == "position":
            arrays.positions[0] += 1
        elif broken == "table":
            arrays.block_table[1, 0] += 1

    monkeypatch.setattr(RowArrays, "fill", broken_fill)
    if broken == "copy":
        monkeypatch.setattr(world, "rows", lambda lengths: (World.rows(world, lengths)[0], []))
    with pytest.raises(AssertionError):
        world.check({0: 1, 1: 2})


def test_decode_rows_and_longer_rows_as_arrays() -> None:
    arrays = make_arrays()
    arrays.fill([Row([10], 6, [3, 1]), Row([11, 12, 13], 2, [2, 0]), Row([14, 15, 16, 17], 0, [5])])
    assert (arrays.num_rows, arrays.num_tokens, arrays.max_query_len, arrays.max_seq_len) == (3, 8, 4, 7)
    assert arrays.input_ids[:8].tolist() == [10, 11, 12, 13, 14, 15, 16, 17]
    assert arrays.positions[:8].tolist() == [6, 2, 3, 4, 0, 1, 2, 3]
    assert arrays.slot_mapping[:8].tolist() == [6, 10, 11, 0, 20, 21, 22, 23]
    assert arrays.query_start_loc[:4].tolist() == [0, 1, 4, 8]
    assert arrays.seq_lens[:3].tolist() == [7, 5, 4]
    assert arrays.last_tokens[:3].tolist() == [0, 3, 7]


@settings(deadline=None)
@given(st.lists(st.integers(0, MAX_LEN - 1), min_size=1, max_size=MAX_ROWS))
def test_the_decode_path_lays_out_as_the_general_path(positions: list[int]) -> None:
    rows = [
        Row([7], position, list(range(index, index + MAX_BLOCKS_PER_ROW))) for index, position in enumerate(positions)
    ]
    decode, general = make_arrays(), make_arrays()
    decode.fill(rows)
    general.fill(rows)
    general._fill_mixed(rows)
    for name in ("input_ids", "positions", "slot_mapping", "query_start_loc", "seq_lens", "last_tokens", "block_table"):
        np.testing.assert_array_equal(getattr(decode, name), getattr(general, name))
    assert (decode.max_query_len, decode.max_seq_len) == (general.max_query_len, general.max_seq_len)


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [Row([], 3, [0])],
        [Row([1], 3, [0]), Row([], 3, [0]), Row([1, 2], 0, [0])],
        [Row([1], 0, [0])] * (MAX_ROWS + 1),
        [Row([1] * (MAX_TOKENS + 1), 0, [0])],
        [Row([1, 2], 3, [0])],
        [Row([1], 4, [0])],
    ],
    ids=["none", "no token", "one without", "too many rows", "too many tokens", "uncovered", "uncovered decode"],
)
def test_batches_that_break_the_contract_are_refused(rows: list[Row]) -> None:
    with pytest.raises((AssertionError, IndexError)):
        make_arrays().fill(rows)
