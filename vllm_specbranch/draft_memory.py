"""A draft model that remembers what it predicted, for replays that go through the same contexts again and again.

Owns the memory, and which of the KV in the draft model's cache is really there: what is remembered is not computed, so its KV is
missing, and is made up for when a new context needs it. Runs in the process of `tune` or a benchmark, never in a draft server.

    slot of the KV cache        0   1   2   3   4        tokens: which token a slot stands for
    should hold the prefix      a  ab abc abd  ..        wanted: hash of the prefix that ends there
    really holds                a  ab   -   -            held: the same for what the model has computed
"""

from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_steps import Model
from vllm_specbranch.kv_blocks import BlockCopy
from vllm_specbranch.token_tree import Candidates, extend_prefix

# No prefix has this hash.
NOTHING = -2
# Copies that are put off; with more than that, what they would have copied is computed again.
MAX_COPIES = 4096


class RememberingModel:
    """See the top of this file. Stands in for `DraftModel`; greedy rows only.

    Args:
        model: the draft model.
        num_blocks, block_size: of its KV cache.
        max_num_rows, max_num_tokens: most that one of its forwards takes.
    """

    def __init__(
        self, model: Model, num_blocks: int, block_size: int, max_num_rows: int = 64, max_num_tokens: int = 512
    ) -> None:
        self.vocab_size = model.vocab_size
        self.max_model_len = model.max_model_len
        self.num_forwards = 0
        self._model = model
        self._block_size = block_size
        self._max_num_rows = max_num_rows
        self._max_num_tokens = max_num_tokens
        shape = (num_blocks, block_size)
        self._tokens: npt.NDArray[np.int32] = np.zeros(shape, np.int32)
        self._wanted: npt.NDArray[np.int64] = np.full(shape, -1, np.int64)
        self._held: npt.NDArray[np.int64] = np.full(shape, NOTHING, np.int64)
        self._copies: list[BlockCopy] = []
        self._width = 0
        self._known: dict[int, tuple[array[int], array[float]]] = {}

    def forward(self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        """See `DraftModel.forward`; the model is asked only for contexts that are new."""
        if top_k > self._width:
            self._known.clear()
            self._width = top_k
        self._copy(copies)
        contexts = [self._note(row) for row in rows]
        new = {context: row for context, row in zip(contexts, rows, strict=True) if context not in self._known}
        if new:
            self._learn(new)
        return [self._candidates(context, top_k) for context in contexts]

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        """Note copies of blocks; the KV itself is copied before anything is computed again, and unchanged until then."""
        if len(self._copies) > MAX_COPIES:
            self._held[[copy.destination for copy in self._copies]] = NOTHING
            self._copies.clear()
        for copy in copies:
            for kept in (self._tokens, self._wanted, self._held):
                kept[copy.destination] = kept[copy.source]
        self._copies += copies

    def _candidates(self, context: int, top_k: int) -> Candidates:
        ids, probs = self._known[context]
        return Candidates(tuple(ids[:top_k]), tuple(probs[:top_k]))

    def _note(self, row: Row) -> int:
        """Note which prefixes a row's slots stand for now; returns the hash of its whole context."""
        assert row.sampling is None, "only greedy rows can be remembered"
        size = self._block_size
        context = 0
        if row.position:
            block, offset = divmod(row.position - 1, size)
            context = int(self._wanted[row.block_ids[block], offset])
        for position, token in enumerate(row.token_ids, row.position):
            context = extend_prefix(context, token)
            block, offset = divmod(position, size)
            self._tokens[row.block_ids[block], offset] = token
            self._wanted[row.block_ids[block], offset] = context
        return context

    def _learn(self, new: dict[int, Row]) -> None:
        """Ask the model for new contexts, with the KV that it lacks."""
        batch: list[tuple[int, Row]] = []
        num_tokens = 0
        for context, row in new.items():
            for piece in self._pieces(row):
                if len(batch) == self._max_num_rows or num_tokens + len(piece.token_ids) > self._max_num_tokens:
                    self._ask(batch)
                    batch, num_tokens = [], 0
                batch.append((context, piece))
                num_tokens += len(piece.token_ids)
        self._ask(batch)

    def _pieces(self, row: Row) -> list[Row]:
        """What must be fed for a row's prediction, in rows that a forward takes; the slots count as held from now on.

        A row of the same forward may read what an earlier one writes: all KV of a layer is written before its attention.
        """
        size = self._block_size
        end = row.position + len(row.token_ids)
        blocks = list(row.block_ids[: -(-end // size)])
        wanted, held = self._wanted[blocks].ravel()[:end], self._held[blocks].ravel()[:end]
        missing = np.flatnonzero(wanted != held)
        # The last token is fed in any case: its prediction is wanted.
        start = min(int(missing[0]) if len(missing) else end, end - 1)
        tokens: list[int] = self._tokens[blocks].ravel()[start:end].tolist()
        for position in range(start, end):
            block, offset = divmod(position, size)
            self._held[row.block_ids[block], offset] = wanted[position]
        most = self._max_num_tokens
        return [
            Row(tokens[first : first + most], start + first, row.block_ids) for first in range(0, len(tokens), most)
        ]

    def _ask(self, batch: Sequence[tuple[int, Row]]) -> None:
        self.num_forwards += 1
        predicted = self._model.forward([row for _, row in batch], self._copies, self._width)
        self._copies = []
        for (context, _), candidates in zip(batch, predicted, strict=True):
            # A long row comes in pieces; the last one is the one that counts.
            self._known[context] = (array("i", candidates.token_ids), array("d", candidates.probs))
