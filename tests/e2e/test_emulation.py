"""An observed engine in real vLLM: every forward of both models is noted, and lasts as long as it is told to."""

import pytest

pytest.importorskip("vllm")

from tests.model_paths import DRAFT, TARGET
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure import running
from vllm_specbranch.measure_messages import Emulation, Forward
from vllm_specbranch.provenance import available_cores

# Far from what the models take by themselves, on a busy machine as well.
EMULATION = Emulation(target_forward_ms=80.0, draft_step_ms=20.0, draft_token_cost=0.02)
PROMPTS = ["import os\n\ndef read(path):\n", "class Stack:\n    def __init__(self):\n"]


def test_both_models_keep_the_pace_and_the_output_stays() -> None:
    cores = available_cores()
    lineup = Lineup(
        TARGET, DRAFT, place(cores, 0), kv_cache_bytes=64 << 20, enforce_eager=True, num_engines=1, observe=True
    )
    with running([lineup.specbranch(4, policy="pearl")]) as (engine,):
        prompts = engine.encode(PROMPTS)
        free = engine.run(prompts, 24)
        paced = engine.run(prompts, 24, emulation=EMULATION)
        again = engine.run(prompts, 24)
    answers = [[one.token_ids for one in run.requests] for run in (free, paced, again)]
    assert answers[0] == answers[1] == answers[2]
    for run in (free, paced, again):
        assert len(run.target_forwards) == run.num_steps
        assert run.target_forwards[0].num_tokens == len(prompts[0])
        assert min(one.num_tokens for one in run.target_forwards) >= 1
        assert max(one.num_tokens for one in run.target_forwards[1 : run.num_steps // 2]) <= 5
        assert len(run.draft_forwards) > 10
        assert is_in_order(run.target_forwards, run.wall_s) and is_in_order(run.draft_forwards, run.wall_s)
    assert min(lengths_s(paced.target_forwards)) >= 0.080
    assert all(
        one.end_s - one.start_s >= 0.020 * (1 + 0.02 * (one.num_tokens - 1)) - 1e-9 for one in paced.draft_forwards
    )
    # Noise of the machine may lengthen some, not most.
    assert median(lengths_s(paced.target_forwards)) < 0.120
    assert paced.num_overruns < (len(paced.target_forwards) + len(paced.draft_forwards)) / 2
    assert median(lengths_s(free.target_forwards)) < 0.080 and free.num_overruns == 0
    assert median(lengths_s(again.draft_forwards)) < 0.020, "the pace ends with its run, in the draft server too"
    assert overlap_s(paced.target_forwards, paced.draft_forwards) > 0.5 * sum(lengths_s(paced.target_forwards)), (
        "the draft model drafts while the target verifies"
    )


def lengths_s(forwards: list[Forward]) -> list[float]:
    return [one.end_s - one.start_s for one in forwards]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def is_in_order(forwards: list[Forward], wall_s: float) -> bool:
    """One after another, all of them begun during the run."""
    ends = [0.0, *(one.end_s for one in forwards)]
    return all(end <= one.start_s < wall_s for end, one in zip(ends, forwards, strict=False))


def overlap_s(left: list[Forward], right: list[Forward]) -> float:
    return sum(max(0.0, min(a.end_s, b.end_s) - max(a.start_s, b.start_s)) for a in left for b in right)
