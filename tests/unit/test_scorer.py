"""The books of verification."""

from vllm_specbranch.metrics import EngineCounters, rates
from vllm_specbranch.scorer import Scorer


def test_outcomes_are_counted_by_what_was_scheduled_not_by_what_was_proposed() -> None:
    counters = EngineCounters()
    scorer = Scorer(counters)
    scorer.hand_over("a", [1, 2, 3, 4])
    scorer.hand_over("b", [5, 6])
    scorer.begin_step({"a": [1, 2], "b": [5, -1]})
    scorer.observe("a", 3)
    scorer.observe("b", 1)
    scorer.observe("c", 1)
    assert (counters.num_rounds, counters.num_draft_tokens, counters.num_accepted_tokens) == (3, 3, 2)
    assert dict(counters.accepted_by_position) == {0: 1, 1: 1}
    assert dict(counters.drafted_by_position) == {0: 2, 1: 1}
    assert counters.num_foreign_drafts == 0


def test_drafts_that_are_not_ours_are_noticed() -> None:
    counters = EngineCounters()
    scorer = Scorer(counters)
    scorer.hand_over("a", [1, 2])
    scorer.begin_step({"a": [1, 9], "b": [3]})
    assert counters.num_foreign_drafts == 2
    scorer.forget("a")
    scorer.begin_step({"a": [1]})
    assert counters.num_foreign_drafts == 3


def test_rates() -> None:
    engine = {"num_rounds": 10, "num_accepted_tokens": 15, "num_draft_tokens": 30}
    server = {"num_hits": 3, "num_misses": 1, "num_rollback_tokens": 5, "num_kept_tokens": 15}
    assert rates(engine, server) == {
        "mean_acceptance_length": 2.5,
        "acceptance_rate": 0.5,
        "hit_rate": 0.75,
        "rollback_rate": 0.25,
    }
    assert rates({}, {}) == {
        "mean_acceptance_length": 1.0,
        "acceptance_rate": 0.0,
        "hit_rate": 0.0,
        "rollback_rate": 0.0,
    }
