"""A draft model that is a pure function of its context, read back through paged KV.

A mistake in the bookkeeping shows as a wrong token.
"""

import math
import random
from collections.abc import Sequence

from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_sampling import draw, uniform
from vllm_specbranch.kv_blocks import BlockCopy
from vllm_specbranch.messages import Sampling
from vllm_specbranch.token_tree import Candidates, hash_prefix


def predict(
    context: Sequence[int], vocab_size: int, top_k: int, confidences: Sequence[float], sampling: Sampling | None = None
) -> Candidates:
    """The fake model's top candidates after a context; depends on every token of it and on their order."""
    rng = random.Random(hash((17, *context)))
    if sampling is not None:
        return distribution(rng, vocab_size, sampling)
    top_k = min(top_k, vocab_size)
    ids = tuple(rng.sample(range(vocab_size), top_k))
    top = rng.choice(confidences)
    rest = (1.0 - top) / max(1, top_k)
    return Candidates(ids, (top, *(min(rest, top) for _ in ids[1:])))


def distribution(rng: random.Random, vocab_size: int, sampling: Sampling) -> Candidates:
    """A random distribution at a temperature, truncated to its `top_m` best tokens and renormalised."""
    logits = [rng.gauss(0.0, 2.0) / sampling.temperature for _ in range(vocab_size)]
    best = max(logits)
    weights = [math.exp(one - best) for one in logits]
    ids = sorted(range(vocab_size), key=lambda token: -weights[token])[: sampling.top_m]
    total = sum(weights[token] for token in ids)
    return Candidates(tuple(ids), tuple(weights[token] / total for token in ids))


class FakeDraftModel:
    """Stands in for `DraftModel`. Its KV cache holds the token ids themselves.

    Args:
        confidences: the top probabilities it may report; which one is a function of the context.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int = 50,
        max_model_len: int = 10_000,
        confidences: Sequence[float] = (0.05, 0.4, 0.6, 0.95),
    ) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.block_size = block_size
        self.confidences = confidences
        self.num_forwards = 0
        self.rows_per_forward: list[int] = []
        self._kv = [[-1] * block_size for _ in range(num_blocks)]

    def forward(self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        """See `DraftModel.forward`."""
        self.num_forwards += 1
        self.rows_per_forward.append(len(rows))
        contents = [list(self._kv[copy.source]) for copy in copies]
        for copy, content in zip(copies, contents, strict=True):
            self._kv[copy.destination] = content
        written: set[tuple[int, int]] = set()
        for row in rows:
            assert row.token_ids, "a row needs a query token"
            assert row.position + len(row.token_ids) <= self.max_model_len, "beyond the model's context"
            for offset, token in enumerate(row.token_ids):
                block, slot = divmod(row.position + offset, self.block_size)
                key = (row.block_ids[block], slot)
                assert key not in written, f"two rows write slot {key}"
                written.add(key)
                self._kv[key[0]][slot] = token
        return [self._read(row, top_k) for row in rows]

    def _read(self, row: Row, top_k: int) -> Candidates:
        context = [
            self._kv[row.block_ids[position // self.block_size]][position % self.block_size]
            for position in range(row.position + len(row.token_ids))
        ]
        assert -1 not in context, "attention reads KV that was never written"
        return self.predict(context, top_k, row.sampling)

    def predict(self, context: Sequence[int], top_k: int, sampling: Sampling | None = None) -> Candidates:
        """What comes after a context, computed without KV."""
        return predict(context, self.vocab_size, top_k, self.confidences, sampling)

    def chain(
        self, context: Sequence[int], num_tokens: int, top_k: int = 1, sampling: Sampling | None = None
    ) -> list[int]:
        """The continuation of a context, greedy or drawn, computed without KV."""
        tokens = list(context)
        for _ in range(num_tokens):
            candidates = self.predict(tokens, top_k, sampling)
            index = 0 if sampling is None else draw(candidates.probs, uniform(sampling.key, hash_prefix(tokens)))
            tokens.append(candidates.token_ids[index])
        return tokens[len(context) :]
