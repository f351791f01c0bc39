"""Hypothesis strategies that several test modules use.

Small ranges on purpose: collisions are where the bugs are. Each value is one draw, because draws are what a step of a
state machine costs, and CI runs 100,000 of them.
"""

from collections.abc import Sequence
from itertools import permutations, product
from typing import TypeVar

from hypothesis import strategies as st

from vllm_specbranch.token_tree import Candidates

T = TypeVar("T")

NUM_SMALL_TOKENS = 3


def picks() -> st.SearchStrategy[int]:
    """A number with which `pick` chooses one of the things that exist when a rule runs."""
    return st.integers(0, 255)


def pick(number: int, things: Sequence[T]) -> T:
    """The thing that a number from `picks` stands for; `things` must not be empty."""
    return things[number % len(things)]


def small_tokens() -> st.SearchStrategy[int]:
    """Token ids of a tiny vocabulary, so that random walks often stay in a tree."""
    return st.integers(0, NUM_SMALL_TOKENS - 1)


def token_lists(max_size: int = 4) -> st.SearchStrategy[tuple[int, ...]]:
    """One to `max_size` such token ids."""
    lengths = range(1, max_size + 1)
    return st.sampled_from([tokens for n in lengths for tokens in product(range(NUM_SMALL_TOKENS), repeat=n)])


def tails() -> st.SearchStrategy[tuple[int, ...]]:
    """What the target adds to the drafted tokens it accepts: often nothing new, or a token that nobody drafts."""
    never = NUM_SMALL_TOKENS
    return st.sampled_from([(), (), (), (0,), (1,), (2, 0), (never,), (0, never, 1)])


def candidates() -> st.SearchStrategy[Candidates]:
    """What a draft model might say comes next: distinct tokens, best first, probabilities that fall."""
    probs = tuple(0.5**rank for rank in range(1, NUM_SMALL_TOKENS + 1))
    return st.sampled_from([Candidates(order, probs) for order in permutations(range(NUM_SMALL_TOKENS))])


def block_shapes() -> st.SearchStrategy[tuple[int, int]]:
    """`(num_blocks, block_size)` of pools small enough to run dry."""
    return st.sampled_from([(1, 2), (4, 4), (7, 3), (12, 1), (12, 2), (16, 4), (24, 2), (24, 3)])
