"""A draft model that remembers what it was asked: replays are the same with it, and no forward is asked for twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.made_recordings import (
    BLOCK_SIZE,
    NUM_BLOCKS,
    POLICIES,
    agree_lists,
    config,
    fake,
    gammas,
    patient,
    ratios,
    recordings_of,
)
from vllm_specbranch import draft_memory, replay
from vllm_specbranch.draft_memory import RememberingModel
from vllm_specbranch.replay import Times


@patient
@given(
    agree_lists,
    st.lists(st.tuples(gammas, st.sampled_from(POLICIES), ratios), min_size=2, max_size=4),
    st.booleans(),
    st.sampled_from([0, 3, 4096]),
)
def test_remembering_changes_nothing(
    agrees: list[list[bool]], cases: list[tuple[int, dict[str, object], float]], is_tight: bool, most_copies: int
) -> None:
    recordings = recordings_of(agrees)
    num_blocks = 30 if is_tight else NUM_BLOCKS
    bare, kv = fake(num_blocks)
    asked, _ = fake(num_blocks)
    remembering = RememberingModel(asked, num_blocks, BLOCK_SIZE, 3, 8)
    for gamma, policy, ratio in cases:
        times = Times(ratio, 1.0)
        chosen = config(gamma, **policy)
        expected = replay.replay(chosen, bare, kv, recordings, times, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draft_memory, "MAX_COPIES", most_copies)
            assert replay.replay(chosen, remembering, kv, recordings, times, 2) == expected
    assert all(count <= 3 for count in asked.rows_per_forward)


def test_what_is_remembered_is_not_asked_for_again() -> None:
    recordings = recordings_of([[True, False] * 8])
    asked, kv = fake()
    remembering = RememberingModel(asked, NUM_BLOCKS, BLOCK_SIZE)
    replay.replay(config(), remembering, kv, recordings, Times(5.0, 1.0))
    count = asked.num_forwards
    replay.replay(config(), remembering, kv, recordings, Times(5.0, 1.0))
    assert asked.num_forwards == count
    # More candidates than before are another question.
    replay.replay(config(max_branches=12), remembering, kv, recordings, Times(5.0, 1.0))
    assert asked.num_forwards > count
