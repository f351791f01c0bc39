"""The distributions that draft tokens were drawn from, on their way from the draft server to the verification.

Owns `ChunkDistributions` (what one chunk carries), their validation when they enter the engine, and `SampledDraftTokenIds`, the
form in which a target worker hands them to the scheduler. They travel sparse, as packed (id, probability) pairs; only `scorer`
makes dense rows of them. Runs in the target's workers and in the EngineCore process.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from vllm.v1.outputs import DraftTokenIds

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.messages import MAX_MESSAGE_BYTES, Draft
from vllm_specbranch.snapshots import Sample

logger = logging.getLogger("vllm.specbranch.draft_distributions")

# A distribution that float32 rounded may miss 1 by this much.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class ChunkDistributions:
    """What the draft tokens of one request were drawn from.

    Attributes:
        position: absolute position of the first of them; the number of committed tokens when they were drafted.
        tokens: `[num_tokens]` the draft tokens. A token is verified against its distribution only if it, and all before it, are
            these (rule 1 of the design, section 3).
        ids: `[num_tokens, m]` int32, row-major.
        probs: `[num_tokens, m]` float32.
    """

    position: int
    tokens: tuple[int, ...]
    ids: bytes
    probs: bytes

    def num_matching(self, token_ids: Sequence[int]) -> int:
        """How many leading tokens of a chunk under verification are the ones that these distributions belong to."""
        count = 0
        for mine, other in zip(self.tokens, token_ids, strict=False):
            if mine != other:
                break
            count += 1
        return count

    def rows(self, count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The first `count` distributions: ids and probabilities, `[count, m]` each."""
        shape = (len(self.tokens), -1)
        ids = np.frombuffer(self.ids, "<i4").reshape(shape)
        probs = np.frombuffer(self.probs, "<f4").reshape(shape)
        return ids[:count], probs[:count]


@dataclass
class SampledDraftTokenIds(DraftTokenIds):
    """vLLM's draft token ids, with the distributions of those that were sampled.

    Attributes:
        distributions: by request id; a request without one is verified as one-hot.
        sample: for the metrics.
    """

    distributions: dict[str, ChunkDistributions] = field(default_factory=dict)
    sample: Sample | None = None


def most_top_m(config: SpecBranchConfig, max_num_seqs: int) -> int:
    """`draft_top_m`, or less where the drafts of a full batch would not fit into one message.

    A reply that is too large is lost, and how large it is depends on how much was drawn: that must not decide what is verified.
    """
    fitting = MAX_MESSAGE_BYTES // 2 // (8 * max_num_seqs * config.num_speculative_tokens)
    if fitting < config.draft_top_m:
        logger.warning(
            "draft_top_m is lowered from %d to %d to keep replies small.", config.draft_top_m, max(1, fitting)
        )
    return max(1, min(config.draft_top_m, fitting))


def is_sound(draft: Draft, vocab_size: int) -> bool:
    """Whether a draft's distributions can be what its tokens were drawn from. If not, one-hot verification is still lossless.

    Each row must have as many ids as probabilities, ids of the vocabulary, no negative or infinite probability, a sum of 1, and its
    own token among the ids with a probability above 0. An id that comes twice counts with both probabilities.
    """
    num_tokens = len(draft.tokens)
    size, rest = divmod(len(draft.q_ids), 4 * num_tokens)
    if rest or not size or len(draft.q_probs) != len(draft.q_ids):
        return False
    ids = np.frombuffer(draft.q_ids, "<i4").reshape(num_tokens, size)
    probs = np.frombuffer(draft.q_probs, "<f4").reshape(num_tokens, size)
    if ids.min() < 0 or ids.max() >= vocab_size or not probs.min() >= 0.0:
        return False
    own = (probs * (ids == np.array(draft.tokens).reshape(num_tokens, 1))).sum(axis=1)
    return bool((np.abs(probs.sum(axis=1) - 1.0) < SUM_TOLERANCE).all() and (own > 0.0).all())
