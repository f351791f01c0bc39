"""The acceptance estimate: it finds the true rates, whatever the draft claims, and stays a probability."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.acceptance import AcceptanceModel
from vllm_specbranch.token_tree import Candidates

IDS = tuple(range(6))


def candidates(top: float) -> Candidates:
    rest = (1.0 - top) / 8
    return Candidates(IDS, (top, *[rest] * 5))


def test_before_anything_was_seen_the_draft_is_believed() -> None:
    model = AcceptanceModel()
    assert model.accepted(candidates(0.6), is_sampled=False) == pytest.approx(0.6)
    assert model.outcomes(candidates(0.6), is_sampled=False, is_inside=False) == pytest.approx([0.6, *[0.05] * 5])
    assert model.outcomes(candidates(0.6), is_sampled=False, is_inside=True)[0] == 0.0


@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("is_inside", [False, True])
def test_true_rates_are_found_whatever_the_draft_claims(is_sampled: bool, is_inside: bool) -> None:
    rng = random.Random(1)
    model = AcceptanceModel()
    # The draft claims 0.6 for its first token; it is right 30% of the time, and its third token is the one in another 50%.
    for _ in range(3000):
        outcome = rng.choices(["first", "third", "none"], [0.3, 0.5, 0.2])[0]
        token = {"first": 0, "third": 2, "none": 99}[outcome]
        model.observe(
            candidates(0.6), token, is_sampled=is_sampled, is_inside=is_inside, is_accepted=outcome == "first"
        )
    found = model.outcomes(candidates(0.6), is_sampled=is_sampled, is_inside=is_inside)
    assert found[2] == pytest.approx(0.5, abs=0.08)
    assert sum(found[3:]) < 0.02
    if is_inside:
        assert model.accepted(candidates(0.6), is_sampled=is_sampled) == pytest.approx(0.3, abs=0.06)
        assert found[0] < 0.02, "the draft token itself never replaces itself here"
    else:
        assert found[0] == pytest.approx(0.3, abs=0.06)
    other = model.outcomes(candidates(0.2), is_sampled=is_sampled, is_inside=is_inside)
    assert other == AcceptanceModel().outcomes(candidates(0.2), is_sampled=is_sampled, is_inside=is_inside)


def test_old_rounds_fade() -> None:
    model = AcceptanceModel()
    for is_right in (True, False):
        for _ in range(3000):
            model.observe(candidates(0.6), 0 if is_right else 9, is_sampled=False, is_inside=True, is_accepted=is_right)
    assert model.accepted(candidates(0.6), is_sampled=False) < 0.05


@given(
    st.lists(
        st.tuples(st.floats(0.0, 1.0), st.integers(0, 8), st.booleans(), st.booleans(), st.booleans()), max_size=60
    ),
    st.floats(0.0, 1.0),
)
def test_estimates_are_probabilities(seen: list[tuple[float, int, bool, bool, bool]], top: float) -> None:
    model = AcceptanceModel()
    for confidence, token, is_sampled, is_inside, is_accepted in seen:
        model.observe(
            candidates(confidence), token, is_sampled=is_sampled, is_inside=is_inside, is_accepted=is_accepted
        )
    for is_sampled in (False, True):
        assert 0.0 <= model.accepted(candidates(top), is_sampled=is_sampled) <= 1.0
        for is_inside in (False, True):
            found = model.outcomes(candidates(top), is_sampled=is_sampled, is_inside=is_inside)
            assert len(found) == len(IDS)
            assert all(prob >= 0.0 for prob in found)
            assert sum(found) <= 1.0 + 1e-9
