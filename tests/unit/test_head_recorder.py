"""Rounds as they are recorded: features, draft and outcome of one request and one position, and full chunks only."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.head_data import Rounds
from vllm_specbranch.head_recorder import RoundRecorder
from vllm_specbranch.messages import Draft

GAMMA = 3


def draft(name: str, position: int, num_tokens: int = GAMMA) -> Draft:
    return Draft(name, position, [7] * num_tokens, True, b"", b"", [0.01 * position + 0.1] * num_tokens)


def step(recorder: RoundRecorder, *requests: tuple[str, int, int]) -> None:
    """One engine step; requests are (name, committed tokens, draft tokens verified). Features are the position."""
    names, positions, verified = zip(*requests, strict=True)
    features = torch.tensor([[float(one), 2.0 * one] for one in positions])
    recorder.observe_features(list(names), list(positions), features, list(verified))


def rows(rounds: Rounds) -> list[tuple[int, float, int]]:
    """(prompt, first feature, accepted) of each."""
    first = [row[0] for row in rounds.features.tolist()]
    return list(zip(rounds.prompts.tolist(), first, rounds.accepted.tolist(), strict=True))


def test_a_round_joins_what_belongs_together() -> None:
    recorder = RoundRecorder(GAMMA)
    # A prefill that ends, then three rounds of one request beside one of another; vLLM appends to names.
    step(recorder, ("0-ab", 10, 0), ("1-cd", 20, 0))
    recorder.observe_draft(draft("0-ab", 10))
    recorder.observe_draft(draft("1-cd", 20))
    step(recorder, ("1-cd", 24, GAMMA), ("0-ab", 11, GAMMA))
    recorder.observe_draft(draft("0-ab", 11))
    step(recorder, ("0-ab", 13, GAMMA))
    found = recorder.rounds(first_prompt=64, temperature=0.8)
    assert rows(found) == [(64, 10.0, 0), (64, 11.0, 1), (65, 20.0, 3)]
    assert found.labels.tolist() == [0, 1, 2]
    assert found.top_probs[:, 0].tolist() == pytest.approx([0.2, 0.21, 0.3])
    assert found.features[0].tolist() == [10.0, 20.0]
    assert found.temperatures.tolist() == pytest.approx([0.8] * 3)


def test_censored_rounds_are_none() -> None:
    recorder = RoundRecorder(GAMMA)
    step(recorder, ("0", 10, 0))
    # Shorter than gamma as it came.
    recorder.observe_draft(draft("0", 10, GAMMA - 1))
    step(recorder, ("0", 12, GAMMA - 1))
    # Cut by the scheduler: all of it accepted says nothing of the rest.
    recorder.observe_draft(draft("0", 12))
    step(recorder, ("0", 15, GAMMA - 1))
    # No draft in time.
    step(recorder, ("0", 16, 0))
    # A late draft of another position.
    recorder.observe_draft(draft("0", 15))
    step(recorder, ("0", 17, GAMMA))
    # A draft of a request that nobody knows.
    recorder.observe_draft(draft("9", 15))
    assert len(recorder) == 0
    assert len(recorder.rounds(0, 0.0)) == 0


def test_a_draft_without_probabilities_is_a_fault() -> None:
    recorder = RoundRecorder(GAMMA)
    step(recorder, ("0", 10, 0))
    with pytest.raises(AssertionError, match="not asked"):
        recorder.observe_draft(Draft("0", 10, [1, 2, 3], True, b"", b"", []))


def test_features_are_copied() -> None:
    """The engine writes the next step into the same memory."""
    recorder = RoundRecorder(GAMMA)
    features = torch.ones(1, 2)
    recorder.observe_features(["0"], [10], features, [0])
    features.zero_()
    recorder.observe_draft(draft("0", 10))
    step(recorder, ("0", 12, GAMMA))
    assert recorder.rounds(0, 0.0).features.tolist() == [[1.0, 1.0]]


def test_features_are_kept_in_the_target_s_dtype() -> None:
    """They are given as float32, which is wider: nothing may be lost on the way back."""
    recorder = RoundRecorder(GAMMA, torch.bfloat16)
    features = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    recorder.observe_features(["0"], [10], features.float(), [0])
    recorder.observe_draft(draft("0", 10))
    step(recorder, ("0", 12, GAMMA))
    found = recorder.rounds(0, 0.0).features
    assert found.dtype == torch.bfloat16 and torch.equal(found, features)


@given(st.lists(st.tuples(st.integers(0, GAMMA), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_every_full_round_is_recorded_once(rounds: list[tuple[int, bool, bool]]) -> None:
    """Any order of full, trimmed and missing chunks: each full one gives its outcome, no other gives anything."""
    recorder = RoundRecorder(GAMMA)
    position, expected = 10, []
    step(recorder, ("5", position, 0))
    for accepted, has_draft, is_trimmed in rounds:
        if has_draft:
            recorder.observe_draft(draft("5", position))
        verified = 0 if not has_draft else GAMMA - 1 if is_trimmed else GAMMA
        accepted = min(accepted, verified)
        if verified == GAMMA:
            expected.append((5, float(position), accepted))
        position += accepted + 1
        step(recorder, ("5", position, verified))
    assert rows(recorder.rounds(0, 0.0)) == expected


def test_an_empty_recording_is_saved(tmp_path: Path) -> None:
    recorder = RoundRecorder(GAMMA)
    assert not recorder.has_seen_any
    step(recorder, ("0", 10, 0))
    assert recorder.has_seen_any
    assert recorder.save(tmp_path / "shard.safetensors", 0, 0.0) == 0
    assert (tmp_path / "shard.safetensors").is_file()
