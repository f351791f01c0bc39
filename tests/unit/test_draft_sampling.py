"""The random streams of requests, and one draw."""

import itertools
import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.draft_sampling import KEY_BITS, draw, seeded_key, uniform, unseeded_key

keys = st.integers(0, 2**KEY_BITS - 1)


@given(keys, st.integers(0, 2**31 - 1))
def test_a_number_belongs_to_its_key_and_position(key: int, position: int) -> None:
    number = uniform(key, position)
    assert 0.0 <= number < 1.0
    assert number == uniform(key, position)
    assert number not in (uniform(key, position + 1), uniform(key ^ 1, position))


def test_numbers_are_spread_evenly_and_neighbours_have_nothing_in_common() -> None:
    """64 bins, 8,192 numbers: chi-squared within 5 sigma; lag-1 correlation of keys and of positions within 5 sigma."""
    for numbers in ([uniform(7, position) for position in range(8192)], [uniform(key, 7) for key in range(8192)]):
        bins = [0] * 64
        for number in numbers:
            bins[int(64 * number)] += 1
        chi_squared = sum((count - 128) ** 2 / 128 for count in bins)
        assert abs(chi_squared - 63) < 5 * math.sqrt(2 * 63)
        products = sum((a - 0.5) * (b - 0.5) for a, b in itertools.pairwise(numbers))
        assert abs(products) < 5 * math.sqrt(8191) / 12


def test_keys() -> None:
    """A seed's key is not the seed, and seeded and unseeded requests never share a stream."""
    seeds = [-5, 0, 1, 2, 42, 2**63]
    found = [seeded_key(seed) for seed in seeds] + [
        unseeded_key(engine, rank, number) for engine in (0, 1) for rank in (0, 1) for number in range(5)
    ]
    assert len(set(found)) == len(found)
    assert not set(found) & set(seeds)
    assert all(0 <= key < 2**KEY_BITS for key in found)


@given(
    st.lists(st.floats(0.0, 1.0, allow_subnormal=False), min_size=1, max_size=12), st.floats(0.0, 1.0, exclude_max=True)
)
def test_a_draw_is_the_inverse_of_the_distribution(probs: list[float], number: float) -> None:
    if sum(probs) < 1e-3:
        return
    index = draw(probs, number)
    assert probs[index] > 0.0
    total = sum(map(Fraction, probs))
    below, above = sum(map(Fraction, probs[:index])), sum(map(Fraction, probs[: index + 1]))
    assert below / total - Fraction(1, 10**9) <= Fraction(number) <= above / total + Fraction(1, 10**9)


def test_the_last_possible_number_draws_a_token_with_a_probability() -> None:
    assert draw([0.3, 0.7, 0.0], math.nextafter(1.0, 0.0)) == 1
    assert draw([0.0, 1.0], 0.0) == 1
