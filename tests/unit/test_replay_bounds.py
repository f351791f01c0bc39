"""What replays are held against: what the draft thinks of the recordings, drafting in turn, and a bound that no policy beats.

Against simulations written here.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.made_recordings import (
    POLICIES,
    agree_lists,
    config,
    draft_step_ms,
    fake,
    gammas,
    patient,
    ratios,
    recordings_of,
    run,
)
from vllm_specbranch.replay import Recording, Times
from vllm_specbranch.replay_bounds import (
    acceptance,
    agreement,
    best_sequential,
    coverage,
    every_outcome_guessed,
    sequential,
)


def seen_by(recordings: Sequence[Recording]) -> Any:
    model, kv = fake()
    found = agreement(model, kv, recordings, 4)
    assert kv.num_held == 0
    return found


@patient
@given(agree_lists, st.integers(0, 6), ratios)
def test_sequential_is_as_simulated(agrees: list[list[bool]], gamma: int, ratio: float) -> None:
    recordings = recordings_of(agrees)
    times = Times(ratio * draft_step_ms, draft_step_ms, target_token_cost=0.25, draft_token_cost=0.5)
    result = sequential(recordings, seen_by(recordings), gamma, times)
    model, _ = fake()
    rounds, time_ms = 0, 0.0
    for one in recordings:
        done, chunk = 0, 0
        while done < len(one.tokens):
            drafted = model.chain([*one.prompt, *one.tokens[:done]], min(chunk, len(one.tokens) - done), 4)
            rounds += 1
            time_ms += (gamma if done else 0) * draft_step_ms + ratio * draft_step_ms * (1 + 0.25 * len(drafted))
            done += 1
            for ours in drafted:
                if done > len(one.tokens) or ours != one.tokens[done - 1]:
                    break
                done += 1
            chunk = gamma
    assert result.num_rounds == rounds
    assert result.time_s == pytest.approx(time_ms / 1e3)


def test_plain_decoding_takes_one_round_a_token() -> None:
    recordings = recordings_of([[True] * 5, [False] * 3])
    plain = sequential(recordings, seen_by(recordings), 0, Times(10.0, 1.0, overhead_ms=2.0))
    assert (plain.num_rounds, plain.num_draft_tokens, plain.time_s) == (8, 0, pytest.approx(8 * 12e-3))
    both = sequential(recordings, seen_by(recordings), 0, Times(10.0, 1.0, target_token_cost=0.1), 2)
    assert (both.num_rounds, both.num_forwards) == (8, 5)
    assert both.time_s == pytest.approx((3 * 11.0 + 2 * 10.0) / 1e3)


@patient
@given(agree_lists, gammas, ratios, st.sampled_from(POLICIES), st.sampled_from([0.0, 0.125]))
def test_no_policy_is_quicker_than_every_outcome_guessed(
    agrees: list[list[bool]], gamma: int, ratio: float, policy: dict[str, object], cost: float
) -> None:
    recordings = recordings_of(agrees)
    times = Times(ratio * draft_step_ms, draft_step_ms, cost, cost)
    bound = every_outcome_guessed(recordings, seen_by(recordings), gamma, times)
    result = run(config(gamma, **policy), recordings, times)
    assert bound.time_s <= result.time_s + 1e-9
    assert bound.num_tokens == result.num_tokens == sum(map(len, agrees))
    assert bound.num_accepted_tokens + bound.num_rounds >= bound.num_tokens
    own = sequential(recordings, seen_by(recordings), gamma, times)
    assert bound.time_s <= own.time_s + 1e-9


def test_every_outcome_guessed_of_a_perfect_draft() -> None:
    """One token is ready after each draft step, and a round takes two: two tokens a round at best."""
    recordings = recordings_of([[True] * 7])
    result = every_outcome_guessed(recordings, seen_by(recordings), 4, Times(2.0, 1.0))
    # Places 0..6: the first round commits 0 at 2, when 1 has just been drafted; the next one 1 and 2 at 4, then 3 and 4, 5 and 6.
    assert result.time_s == pytest.approx(8e-3)
    assert every_outcome_guessed(recordings, seen_by(recordings), 1, Times(100.0, 1.0)).num_rounds == 4


@patient
@given(agree_lists, gammas, st.sampled_from([1.0, 2.0, 7.5]))
def test_a_slower_target_takes_longer(agrees: list[list[bool]], gamma: int, ratio: float) -> None:
    recordings = recordings_of(agrees)
    ours = seen_by(recordings)
    quick, slow = Times(ratio, 1.0), Times(1.5 * ratio, 1.0)
    assert sequential(recordings, ours, gamma, quick).time_s < sequential(recordings, ours, gamma, slow).time_s
    bounds = [every_outcome_guessed(recordings, ours, gamma, one).time_s for one in (quick, slow)]
    assert bounds[0] < bounds[1]
    assert (
        best_sequential(recordings, ours, [gamma, 0], quick)[1].time_s <= sequential(recordings, ours, 0, quick).time_s
    )


# --- what the draft thinks of the recordings -------------------------------------------------------------------------


@patient
@given(agree_lists)
def test_agreement_is_the_place_of_the_targets_token(agrees: list[list[bool]]) -> None:
    found = seen_by(recordings_of(agrees))
    assert [list(one.ranks) for one in found] == [[0 if agree else 1 for agree in one] for one in agrees]
    total = list(itertools.chain.from_iterable(agrees))
    assert acceptance(found) == pytest.approx(sum(total) / len(total))
    assert coverage(found, 2) == 1.0
    assert found[0].run_length(0, 99) == (agrees[0] + [False]).index(False)


def test_tokens_the_draft_does_not_think_of_have_no_rank() -> None:
    model, kv = fake()
    candidates = model.predict([7], 4).token_ids
    strange = next(token for token in range(50) if token not in candidates)
    (found,) = agreement(model, kv, [Recording((7,), (strange,), 1)], 4)
    assert found.ranks == (-1,) and coverage([found], 4) == 0.0


def test_long_prompts_and_many_recordings_are_fed_in_parts() -> None:
    model, kv = fake()
    generator = random.Random(1)
    many = [
        Recording(tuple(generator.randrange(50) for _ in range(600)), (generator.randrange(50),), 1) for _ in range(5)
    ]
    found = agreement(model, kv, many, 50)
    for one, ours in zip(many, found, strict=True):
        assert model.predict(one.prompt, 50).token_ids[ours.ranks[0]] == one.tokens[0]
    assert max(model.rows_per_forward) == 2
