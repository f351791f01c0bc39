"""Lines through measured times."""

import random

import pytest

from vllm_specbranch.costs import LinearCost


def test_a_line_is_found_through_noise() -> None:
    rng = random.Random(0)
    cost = LinearCost()
    for _ in range(500):
        amount = rng.randrange(1, 20)
        cost.observe(amount, 0.004 + 0.0002 * amount + rng.uniform(-0.0005, 0.0005))
    assert cost.slope_s == pytest.approx(0.0002, rel=0.2)
    assert cost.estimate_s(1) == pytest.approx(0.0042, rel=0.05)
    assert cost.relative_slope == pytest.approx(0.0002 / 0.0042, rel=0.25)


def test_a_change_is_followed() -> None:
    cost = LinearCost()
    for slope in (0.001, 0.0001):
        for index in range(1000):
            cost.observe(index % 10, 0.005 + slope * (index % 10))
    assert cost.slope_s == pytest.approx(0.0001, rel=0.1)


def test_equal_amounts_say_nothing_and_forget_nothing() -> None:
    cost = LinearCost()
    for _ in range(100):
        cost.observe(4, 0.005)
    assert cost.slope_s == 0.0
    for index in range(400):
        cost.observe(index % 4, 0.001 * (index % 4) + 0.002)
    known = cost.slope_s
    for _ in range(2000):
        cost.observe(2, 0.004)
    assert known == pytest.approx(0.001, rel=0.05)
    assert cost.slope_s == pytest.approx(known, rel=0.3)


def test_more_is_never_cheaper_and_nothing_is_not_negative() -> None:
    cost = LinearCost()
    for index in range(100):
        cost.observe(index % 10, 0.010 - 0.001 * (index % 10))
    assert cost.slope_s == 0.0
    assert LinearCost().relative_slope == 0.0
    assert LinearCost().estimate_s(3) == 0.0


def test_a_pause_of_the_machine_is_no_cost() -> None:
    cost = LinearCost()
    for index in range(200):
        cost.observe(index % 10, 0.005)
    cost.observe(9, 1.0)
    assert cost.slope_s < 4e-4
    for index in range(200):
        cost.observe(index % 10, 0.005)
    assert cost.slope_s < 1e-4


def test_a_jump_that_lasts_is_followed_however_large() -> None:
    """From batch 1 to batch 64, say: were every long step an accident, the price of verification would stay at nothing."""
    cost = LinearCost()
    for index in range(200):
        cost.observe(1 + index % 4, 0.010)
    for index in range(2000):
        amount = 64 + 10 * (index % 20)
        cost.observe(amount, 0.050 + 0.0004 * amount)
    assert cost.slope_s == pytest.approx(0.0004, rel=0.1)
    assert cost.estimate_s(64) == pytest.approx(0.0756, rel=0.1)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_slope(seed: int) -> None:
    """Few amounts, mostly alike, and rounds that are late now and then: as in verification at batch 1."""
    rng = random.Random(seed)
    cost = LinearCost()
    largest = 0.0
    for index in range(400):
        late_s = rng.expovariate(1 / 0.02) if rng.random() < 0.05 else 0.0
        cost.observe(rng.choice((2, 2, 2, 3)), 0.022 + rng.gauss(0.0, 0.001) + late_s)
        if index > 50:
            largest = max(largest, cost.slope_s)
    assert largest < 0.004, "a fifth of the time of a round"
    assert cost.slope_s < 0.002


def test_a_steep_slope_is_found_at_once() -> None:
    rng = random.Random(1)
    cost = LinearCost()
    for _ in range(20):
        amount = rng.randrange(64, 200)
        cost.observe(amount, 0.001 * amount * rng.uniform(0.95, 1.05))
    assert cost.slope_s == pytest.approx(0.001, rel=0.15)
