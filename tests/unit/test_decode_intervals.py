"""The percentile bootstrap of the decode benchmark: what it promises, for any samples."""

import statistics

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.decode_intervals import Spread, bootstrap, ratio, spread

samples = st.lists(st.floats(0.1, 10.0), min_size=1, max_size=12)
seeds = st.integers(0, 2**32)


@settings(max_examples=40, deadline=None)
@given(samples, seeds)
def test_the_interval_contains_the_median_and_stays_within_the_samples(values: list[float], seed: int) -> None:
    low, high = bootstrap(values, seed)
    assert min(values) <= low <= statistics.median(values) <= high <= max(values)


@settings(max_examples=40, deadline=None)
@given(samples, seeds)
def test_the_same_seed_gives_the_same_interval(values: list[float], seed: int) -> None:
    assert bootstrap(values, seed) == bootstrap(values, seed)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 10.0), st.integers(1, 12), seeds)
def test_equal_samples_leave_no_doubt(value: float, count: int, seed: int) -> None:
    assert bootstrap([value] * count, seed) == (value, value)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=3, max_size=8), seeds)
def test_more_of_the_same_repetitions_make_it_no_wider(values: list[float], seed: int) -> None:
    assume(max(values) - min(values) > 0.1)
    few, many = bootstrap(values, seed), bootstrap(values * 40, seed)
    assert many[1] - many[0] <= few[1] - few[0]


@settings(max_examples=40, deadline=None)
@given(samples, seeds, st.floats(0.5, 4.0))
def test_it_scales_with_the_samples(values: list[float], seed: int, factor: float) -> None:
    low, high = bootstrap(values, seed)
    scaled = bootstrap([factor * one for one in values], seed)
    assert abs(scaled[0] - factor * low) < 1e-9 and abs(scaled[1] - factor * high) < 1e-9


def test_spread_and_ratio() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    found = ratio("plain", [1.0, 1.5, 2.0], seed=0)
    assert (found.to, found.median, found.least, found.most) == ("plain", 1.5, 1.0, 2.0)
    assert found.low == 1.0 and found.high == 2.0
