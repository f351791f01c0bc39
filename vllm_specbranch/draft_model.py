"""The draft model as the draft server sees it: rows of tokens in, the most likely next tokens out.

Owns: what a row is, the layout of one batch of rows as arrays (`RowArrays`, numpy only), and `DraftModel`, the facade.
Does not own: block accounting (`kv_blocks`), what to feed (`planner`, `draft_server`), and all that knows vLLM or torch
(`draft_runtime`, imported when a model is loaded). Runs in the draft server process.

One forward of three rows, block size 4 (`.` = KV that is already there, `q` = query token of this forward):

    row 0, decode    position 6, 1 token    . . . .   . . q         query_start_loc  0 1 4 8
    row 1, catch-up  position 2, 3 tokens   . . q q   q             seq_lens         7 5 4
    row 2, prefill   position 0, 4 tokens   q q q q                 slot_mapping     where each q's KV is written
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_specbranch.kv_blocks import BlockCopy
from vllm_specbranch.messages import Sampling
from vllm_specbranch.token_tree import Candidates

if TYPE_CHECKING:
    from vllm_specbranch.draft_runtime import DraftRuntime


@dataclass(frozen=True, slots=True)
class DraftModelSettings:
    """What to load and how much of the device it may take. The names are vLLM's where vLLM has one.

    Args:
        model: path or hub id.
        max_model_len: longest sequence in tokens; the model's own limit wins when it is lower.
        kv_cache_bytes: size of the KV cache; None picks one (`draft_runtime.default_kv_cache_bytes`).
        gpu_memory_utilization: share of an accelerator's memory for weights, activations and KV; unused on CPU.
        max_num_rows: most rows in one forward.
        max_num_tokens: most query tokens in one forward, over all rows.
        block_size: tokens of a KV block; None picks 32 on CPU (whose kernels want a multiple of 32) and 16 elsewhere.
    """

    model: str
    max_model_len: int
    dtype: str = "auto"
    quantization: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    load_format: str = "auto"
    enforce_eager: bool = False
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_rows: int = 64
    max_num_tokens: int = 512
    seed: int = 0
    block_size: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One (request, branch) pair in a forward: one or more consecutive tokens on top of KV that is already there.

    Args:
        token_ids: the query tokens, at least one.
        position: absolute position of the first query token = number of tokens whose KV is valid.
        block_ids: the block table, covering `[0, position + len(token_ids))`.
        sampling: the temperature and truncation of the distribution wanted; None for plain probabilities.
    """

    token_ids: Sequence[int]
    position: int
    block_ids: Sequence[int]
    sampling: Sampling | None = None


class RowArrays:
    """One batch of rows as the arrays an attention backend takes, in buffers that are allocated once.

    T = query tokens of the batch, R = rows. Only the leading `[0, num_tokens)` or `[0, num_rows)` part is valid after
    `fill`; a row of `block_table` is valid up to the blocks that cover its `seq_lens`.

    Attributes:
        input_ids: `[T] int32`; positions: `[T] int64`; slot_mapping: `[T] int64`, block id * block size + offset.
        query_start_loc: `[R + 1] int32`, row i owns the query tokens `[query_start_loc[i], query_start_loc[i + 1])`.
        seq_lens: `[R] int32`, tokens with valid KV once this forward has written its own.
        last_tokens: `[R] int64`, index of each row's last query token, the only one that goes through the LM head.
        block_table: `[R, max_num_blocks_per_row] int32`.
    """

    def __init__(self, max_num_rows: int, max_num_tokens: int, max_num_blocks_per_row: int, block_size: int) -> None:
        self.block_size = block_size
        self.input_ids: npt.NDArray[np.int32] = np.zeros(max_num_tokens, np.int32)
        self.positions: npt.NDArray[np.int64] = np.zeros(max_num_tokens, np.int64)
        self.slot_mapping: npt.NDArray[np.int64] = np.zeros(max_num_tokens, np.int64)
        self.query_start_loc: npt.NDArray[np.int32] = np.zeros(max_num_rows + 1, np.int32)
        self.seq_lens: npt.NDArray[np.int32] = np.zeros(max_num_rows, np.int32)
        self.last_tokens: npt.NDArray[np.int64] = np.zeros(max_num_rows, np.int64)
        self.block_table: npt.NDArray[np.int32] = np.zeros((max_num_rows, max_num_blocks_per_row), np.int32)
        self.num_rows = 0
        self.num_tokens = 0
        self.max_query_len = 0
        self.max_seq_len = 0

    def fill(self, rows: Sequence[Row]) -> None:
        """Lay out a batch. Mutates: all buffers and counts of this object."""
        self.num_rows = len(rows)
        self.num_tokens = sum(len(row.token_ids) for row in rows)
        assert 0 < self.num_rows <= len(self.seq_lens), f"{self.num_rows} rows, at most {len(self.seq_lens)}"
        assert self.num_tokens <= len(self.input_ids), f"{self.num_tokens} tokens, at most {len(self.input_ids)}"
        for index, row in enumerate(rows):
            self.block_table[index, : len(row.block_ids)] = row.block_ids
        if self.num_tokens == self.num_rows:
            self._fill_decode(rows)
        else:
            self._fill_mixed(rows)

    def _fill_decode(self, rows: Sequence[Row]) -> None:
        """Every row has one query token."""
        size, num_rows = self.block_size, self.num_rows
        positions = [row.position for row in rows]
        self.input_ids[:num_rows] = [row.token_ids[0] for row in rows]
        self.positions[:num_rows] = positions
        self.slot_mapping[:num_rows] = [
            row.block_ids[row.position // size] * size + row.position % size for row in rows
        ]
        self.query_start_loc[: num_rows + 1] = range(num_rows + 1)
        self.last_tokens[:num_rows] = range(num_rows)
        self.seq_lens[:num_rows] = [position + 1 for position in positions]
        self.max_query_len = 1
        self.max_seq_len = max(positions) + 1

    def _fill_mixed(self, rows: Sequence[Row]) -> None:
        size, start, self.max_query_len, self.max_seq_len = self.block_size, 0, 0, 0
        self.query_start_loc[0] = 0
        for index, row in enumerate(rows):
            query_len = len(row.token_ids)
            seq_len, end = row.position + query_len, start + query_len
            assert query_len > 0, "a row needs a query token"
            assert seq_len <= len(row.block_ids) * size, f"{len(row.block_ids)} blocks of {size} for {seq_len} tokens"
            positions = np.arange(row.position, seq_len)
            self.input_ids[start:end] = row.token_ids
            self.positions[start:end] = positions
            self.slot_mapping[start:end] = self.block_table[index, positions // size] * size + positions % size
            self.query_start_loc[index + 1] = end
            self.last_tokens[index] = end - 1
            self.seq_lens[index] = seq_len
            self.max_query_len = max(self.max_query_len, query_len)
            self.max_seq_len = max(self.max_seq_len, seq_len)
            start = end


class DraftModel:
    """A loaded draft model with its paged KV cache. The caller does the block accounting."""

    def __init__(self, runtime: "DraftRuntime") -> None:
        self._runtime = runtime
        self.vocab_size: int = runtime.vocab_size
        self.max_model_len: int = runtime.max_model_len
        self.num_blocks: int = runtime.num_blocks
        self.block_size: int = runtime.block_size
        self.dtype: str = runtime.dtype
        self.path: str = runtime.path

    @classmethod
    def load(cls, settings: DraftModelSettings) -> "DraftModel":
        """Load weights, take the KV cache, compile. Takes seconds; once per process and model.

        Raises:
            ConfigError: the model cannot be found, or is of a kind that is not supported, or the KV cache is too small.
        """
        from vllm_specbranch.draft_runtime import DraftRuntime

        return cls(DraftRuntime.load(settings))

    def forward(self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        """Feed every row's query tokens in one batched forward.

        Args:
            rows: at most `max_num_rows` rows and `max_num_tokens` query tokens together.
            copies: KV blocks to copy first (copy-on-write of forks), in the order in which they were asked for.
            top_k: how many next tokens to return per row without `sampling`.

        Returns:
            Per row the most likely tokens after its last query token, best first. Without `sampling` the `top_k` best with
            their probability (float32 softmax over the whole vocabulary); the first is the lowest id among the best. With it
            the `top_m` best with the float32 softmax, at the temperature, over them alone.

        Mutates: the KV cache, in the slots of the query tokens and the destinations of `copies`.
        """
        ids, probs = self._runtime.forward(rows, copies, top_k)
        return [Candidates(tuple(row_ids), tuple(row_probs)) for row_ids, row_probs in zip(ids, probs, strict=True)]
