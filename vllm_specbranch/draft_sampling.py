"""Sampled drafts: the random stream of a request, and one draw from a distribution of the draft model.

Owns rules 2 and 6 of the design's section 3: every draw is a function of (request key, all tokens before it) and of the
distribution, so a token that was drawn at a prefix comes out again however often and whenever it is drawn there; and the stream has
nothing in common with the target's, which vLLM seeds with the request's bare seed. Pure Python. Runs in the draft server process;
keys are made by the proposer, in the target's worker.

Why not a number per (key, position): after a miss the new chain would draw with the numbers of the chain that lost, and how much of
the new chain is ready in time may depend on what the losing one was (the enumeration in tests/unit/test_reference_broken.py shows
it). A number per prefix is used for one prefix only, so nothing that happened before it can depend on it.
"""

import hashlib
from collections.abc import Callable, Sequence

# What is hashed is never a bare seed. A change of this word changes every seeded output.
DOMAIN_TAG = b"vllm-specbranch draft stream 1"
KEY_BITS = 63  # msgspec's bounded integers are signed.
_UNIFORM_BITS = 53  # Of a float's significand.

RandomNumber = Callable[[int, int], float]


def seeded_key(seed: int) -> int:
    """The key of a request that has a seed: the same for the same seed, whatever its id, so that its drafts can be repeated."""
    return _hashed(f"seed {seed}")


def unseeded_key(engine_seed: int, rank: int, number: int) -> int:
    """The key of the `number`th request without a seed of its own, of one data-parallel rank; repeatable for the same order."""
    return _hashed(f"engine {engine_seed} rank {rank} request {number}")


def _hashed(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=DOMAIN_TAG).digest()
    return int.from_bytes(digest, "little") >> (64 - KEY_BITS)


def uniform(key: int, prefix: int) -> float:
    """The number of a request's stream that belongs to a prefix, in [0, 1).

    Args:
        key: of the request, at least 0.
        prefix: hash of all tokens before the one to be drawn (`token_tree.extend_prefix`).
    """
    data = key.to_bytes(8, "little") + prefix.to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8, key=DOMAIN_TAG).digest()
    return (int.from_bytes(digest, "little") >> (64 - _UNIFORM_BITS)) * 2.0**-_UNIFORM_BITS


def draw(probs: Sequence[float], number: float) -> int:
    """The index that a number of [0, 1) falls on, by inversion.

    Args:
        probs: `[n]` probabilities of a truncated and renormalised distribution; their sum is 1 up to float32 rounding.
        number: uniform in [0, 1); only compared, never computed with.

    Returns:
        Index i with probability `probs[i] / sum(probs)`; never one whose probability is 0.
    """
    total = sum(probs)
    reached = 0.0
    last = 0
    for index, prob in enumerate(probs):
        if prob <= 0.0:
            continue
        reached += prob
        last = index
        if number < reached / total:
            return index
    return last
