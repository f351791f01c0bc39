"""The books of verification, and the rows that vLLM's rejection sampler gets."""

from array import array
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.draft_distributions import ChunkDistributions
from vllm_specbranch.metrics import EngineCounters, rates
from vllm_specbranch.scorer import Scorer

CPU = torch.device("cpu")
VOCAB = 12

Rows = Sequence[dict[int, float]]


def chunk(tokens: Sequence[int], rows: Rows, position: int = 5) -> ChunkDistributions:
    ids, probs = array("i"), array("f")
    for row in rows:
        ids.extend(row.keys())
        probs.extend(row.values())
    return ChunkDistributions(position, tuple(tokens), ids.tobytes(), probs.tobytes())


def test_outcomes_are_counted_by_what_was_scheduled_not_by_what_was_proposed() -> None:
    counters = EngineCounters()
    scorer = Scorer(counters, VOCAB)
    scorer.hand_over("a", [1, 2, 3, 4])
    scorer.hand_over("b", [5, 6])
    scorer.begin_step({"a": [1, 2], "b": [5, -1]})
    scorer.check_origin()
    scorer.observe("a", 3)
    scorer.observe("b", 1)
    scorer.observe("c", 1)
    assert (counters.num_rounds, counters.num_draft_tokens, counters.num_accepted_tokens) == (3, 3, 2)
    assert dict(counters.accepted_by_position) == {0: 1, 1: 1}
    assert dict(counters.drafted_by_position) == {0: 2, 1: 1}
    assert counters.num_foreign_drafts == 0
    assert (counters.num_sampled_draft_tokens, counters.num_sampled_outcomes) == (0, 0)


def test_outcomes_that_a_distribution_decided_are_counted() -> None:
    counters = EngineCounters()
    scorer = Scorer(counters, VOCAB)
    known = chunk([1, 2, 3], [{1: 0.5, 0: 0.5}] * 3)
    for num_sampled, decided in ((4, 3), (3, 3), (2, 2), (1, 1)):
        scorer.begin_step({"a": [1, 2, 3], "b": [7]}, {"a": known})
        before = counters.num_sampled_outcomes
        scorer.observe("a", num_sampled)
        scorer.observe("b", 2)
        assert counters.num_sampled_outcomes - before == decided
    assert counters.num_sampled_draft_tokens == 12


def test_drafts_that_are_not_ours_are_noticed() -> None:
    counters = EngineCounters()
    scorer = Scorer(counters, VOCAB)
    scorer.hand_over("a", [1, 2])
    scorer.begin_step({"a": [1, 9], "b": [3]})
    scorer.check_origin()
    assert counters.num_foreign_drafts == 2
    scorer.forget("a")
    scorer.begin_step({"a": [1]})
    scorer.check_origin()
    assert counters.num_foreign_drafts == 3


def test_no_sampled_draft_needs_no_dense_rows() -> None:
    scorer = Scorer(EngineCounters(), VOCAB)
    scorer.begin_step({"a": [1, 2]})
    assert scorer.draft_probs(["a"], [2], CPU) is None
    scorer.begin_step({"a": [1, 2]}, {"a": chunk([9, 2], [{9: 1.0}, {2: 1.0}])})
    assert scorer.draft_probs(["a"], [2], CPU) is None, "other ids: not what these were drawn from"


def test_each_row_is_what_its_token_was_drawn_from_else_one_hot() -> None:
    """A mixed batch in another order than the scheduler's: sampled, cut short, changed half-way, greedy, invalidated, none."""
    rows = [{1: 0.25, 3: 0.75}, {2: 0.5, 4: 0.5}, {0: 0.125, 5: 0.875}]
    scorer = Scorer(EngineCounters(), VOCAB)
    scheduled = {"whole": [1, 2, 5], "cut": [3], "changed": [3, 7, 0], "greedy": [6, 8], "grammar": [9, -1]}
    known = {"whole": chunk([1, 2, 5], rows), "cut": chunk([3, 4, 0], rows), "changed": chunk([3, 4, 0], rows)}
    scorer.begin_step(scheduled, known)
    order = ["greedy", "changed", "idle", "whole", "grammar", "cut"]
    dense = scorer.draft_probs(order, [2, 3, 0, 3, 2, 1], CPU)
    one_hot = [{6: 1.0}, {8: 1.0}]
    changed = [rows[0], {7: 1.0}, {0: 1.0}]
    assert dense is not None
    assert dense.shape == (11, VOCAB) and dense.dtype == torch.float32 and dense.is_contiguous()
    for row, expected in zip(dense, [*one_hot, *changed, *rows, {9: 1.0}, {}, rows[0]], strict=True):
        assert {token: value for token, value in enumerate(row.tolist()) if value} == expected


def test_a_step_forgets_the_distributions_of_the_step_before() -> None:
    scorer = Scorer(EngineCounters(), VOCAB)
    scorer.begin_step({"a": [1]}, {"a": chunk([1], [{1: 0.5, 2: 0.5}])})
    assert scorer.draft_probs(["a"], [1], CPU) is not None
    scorer.begin_step({"a": [1]})
    assert scorer.draft_probs(["a"], [1], CPU) is None


def test_an_id_that_comes_twice_counts_with_both_probabilities() -> None:
    known = ChunkDistributions(5, (1,), array("i", [1, 2, 1]).tobytes(), array("f", [0.25, 0.5, 0.25]).tobytes())
    scorer = Scorer(EngineCounters(), VOCAB)
    scorer.begin_step({"a": [1]}, {"a": known})
    dense = scorer.draft_probs(["a"], [1], CPU)
    assert dense is not None and dense[0, 1] == 0.5 and dense[0, 2] == 0.5


@given(st.data())
def test_scattered_rows_hold_every_probability_and_nothing_else(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5))
    size = data.draw(st.integers(1, VOCAB))
    scheduled, known, expected = {}, {}, []
    for index, count in enumerate(counts):
        rows = []
        for _ in range(count):
            ids = data.draw(st.permutations(range(VOCAB)))[:size]
            rows.append({token: 1.0 / 2 ** (place + 1) for place, token in enumerate(ids)})
        tokens = [data.draw(st.sampled_from(sorted(row))) for row in rows]
        if count:
            scheduled[str(index)] = tokens
        if count and data.draw(st.booleans()):
            known[str(index)] = chunk(tokens, rows)
            expected += rows
        else:
            expected += [{token: 1.0} for token in tokens]
    scorer = Scorer(EngineCounters(), VOCAB)
    scorer.begin_step(scheduled, known)
    dense = scorer.draft_probs([str(index) for index in range(len(counts))], counts, CPU)
    assert (dense is None) == (not known)
    if dense is not None:
        wanted = torch.zeros(len(expected), VOCAB)
        for row, entries in enumerate(expected):
            for token, value in entries.items():
                wanted[row, token] = value
        assert torch.equal(dense, wanted)


def test_rates() -> None:
    engine = {"num_rounds": 10, "num_accepted_tokens": 15, "num_draft_tokens": 30}
    server = {"num_hits": 3, "num_misses": 1, "num_rollback_tokens": 5, "num_kept_tokens": 15}
    assert rates(engine, server) == {
        "mean_acceptance_length": 2.5,
        "acceptance_rate": 0.5,
        "hit_rate": 0.75,
        "rollback_rate": 0.25,
    }
    assert rates({}, {}) == pytest.approx(
        {"mean_acceptance_length": 1.0, "acceptance_rate": 0.0, "hit_rate": 0.0, "rollback_rate": 0.0}
    )
