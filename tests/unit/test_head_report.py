"""The rules a head is held against, the round model, the verdict, the words and the picture; on made-up rounds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.made_rounds import made_rounds
from vllm_specbranch import head_rules as rules
from vllm_specbranch.head_data import Rounds
from vllm_specbranch.head_pictures import draw_report
from vllm_specbranch.head_report import (
    HEAD,
    MAJORITY,
    ONE,
    TWO,
    Predictions,
    accuracy_gain,
    as_text,
    dear_misses,
    figures,
    judge,
    miss_table,
    summary,
)
from vllm_specbranch.head_training import Parts, split


def one_prompt(accepted: list[int], top_probs: list[list[float]], temperature: float = 0.0) -> Rounds:
    count = len(accepted)
    return Rounds(
        features=torch.zeros(count, 2),
        top_probs=torch.tensor(top_probs),
        accepted=torch.tensor(accepted),
        prompts=torch.zeros(count, dtype=torch.int64),
        temperatures=torch.full((count,), temperature),
    )


def saying(classes: torch.Tensor) -> Predictions:
    return Predictions({HEAD: classes}, {HEAD: classes})


def perfect(parts: Parts) -> tuple[Predictions, Predictions]:
    return saying(parts.choose.labels), saying(parts.held_out.labels)


def test_confidence_cuts_before_the_first_doubt() -> None:
    top_probs = torch.tensor([[0.9, 0.2, 0.9], [0.1, 0.9, 0.9], [0.9, 0.9, 0.3]])
    assert rules.lengths_by_confidence(top_probs, 0.3).tolist() == [1, 0, 3]
    assert rules.lengths_by_confidence(top_probs, 0.0).tolist() == [3, 3, 3]
    assert rules.classes_by_length(torch.tensor([0, 1, 3]), gamma=3).tolist() == [0, 1, 2]


def test_classes_overrule_the_threshold() -> None:
    rounds = one_prompt([0, 0, 0], [[0.9, 0.2]] * 3)
    assert rules.submitted(rounds, 0.5, torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]
    assert rules.submitted(rounds, 0.5).tolist() == [1, 1, 1]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20), st.floats(1.0, 30.0))
def test_round_model_by_hand(rounds: list[tuple[int, int]], c: float) -> None:
    accepted, lengths = [one for one, _ in rounds], [one for _, one in rounds]
    found = rules.outcome(one_prompt(accepted, [[0.5] * 4] * len(rounds)), torch.tensor(lengths), c)
    tokens = sum(min(a, n) + 1 for a, n in rounds)
    cost = sum(c + (rules.WAIT_STEPS if a < n else 0) for a, n in rounds)
    assert found.speed == pytest.approx(tokens / cost)
    assert found.num_accepted == sum(min(a, n) for a, n in rounds)
    assert found.num_wasted == sum(n - min(a, n) for a, n in rounds)


def test_knowing_more_is_never_slower() -> None:
    """No rule beats knowing the length; a head that is always right is at least as fast as confidence alone."""
    rounds = made_rounds(told_by_confidence=2.0)
    best = rules.outcome(rounds, rounds.accepted, 5.0).speed
    for epsilon in rules.EPSILONS:
        alone = rules.outcome(rounds, rules.submitted(rounds, epsilon), 5.0)
        with_head = rules.outcome(rounds, rules.submitted(rounds, epsilon, rounds.labels), 5.0)
        assert alone.speed <= with_head.speed + 1e-9 <= best + 2e-9


def test_best_thresholds_are_the_best_that_there_are() -> None:
    rounds = made_rounds(told_by_features=0.0, told_by_confidence=4.0)
    labels = rounds.labels

    def right(said: torch.Tensor) -> int:
        return int((said == labels).sum())

    epsilon = rules.best_epsilon_for_classes(rounds)
    lengths = {one: rules.lengths_by_confidence(rounds.top_probs, one) for one in rules.EPSILONS}
    counts = {one: right(rules.classes_by_length(length, rounds.gamma)) for one, length in lengths.items()}
    assert counts[epsilon] == max(counts.values())
    bounds = rules.best_bounds(rounds)
    best = right(bounds.classes(rounds))
    assert best > int(torch.bincount(labels).max()) + 0.05 * len(labels)
    for low in (0.0, 0.1, 0.3, 0.5):
        for high in (0.05, 0.1, 0.3, 2.0):
            assert best >= right(rules.Bounds(low, high).classes(rounds)) - 0.01 * len(labels)


def test_shifts_make_a_head_that_knows_little_worth_no_less_than_none() -> None:
    """A head that says 0 at random: with shifts it does not, and what it says is worth what confidence alone is, or more."""
    rounds = made_rounds(told_by_features=0.0, told_by_confidence=3.0)
    logits = torch.randn(len(rounds), 3, generator=torch.Generator().manual_seed(0))
    alone = max(rules.outcome(rounds, rules.submitted(rounds, one), 5.0).speed for one in rules.EPSILONS)

    def best(said: torch.Tensor) -> float:
        return max(rules.outcome(rounds, rules.submitted(rounds, one, said), 5.0).speed for one in rules.EPSILONS)

    assert best(logits.argmax(dim=1)) < 0.95 * alone
    shifts = rules.best_shifts(logits, rounds, 5.0)
    assert shifts[0] > 1.0
    assert best(rules.shifted(logits, shifts).argmax(dim=1)) >= alone


def test_a_head_that_knows_is_not_shifted() -> None:
    rounds = made_rounds()
    logits = 20.0 * torch.nn.functional.one_hot(rounds.labels, 3).float()
    assert rules.best_shifts(logits, rounds, 5.0) == (0.0, 0.0)


def test_the_dearer_a_miss_the_more_a_head_is_worth() -> None:
    """One that is always right; and what is known of every round is worth the same at the wait of the round model."""
    parts = split(made_rounds(1500, told_by_confidence=2.0), seed=0)
    logits = [20.0 * torch.nn.functional.one_hot(one.labels, 3).float() for one in (parts.choose, parts.held_out)]
    rows = dear_misses(parts, *logits, c=6.0)
    assert [row["miss_cost"] for row in rows] == [rules.WAIT_STEPS, 3.0, 6.0, 12.0]
    ratios = [row["ratio"] for row in rows]
    assert ratios == sorted(ratios) and ratios[-1] > ratios[0] + 0.05
    assert all(row["ratio"] == pytest.approx(row["known_ratio"]) for row in rows)
    assert "a miss costs" in miss_table(rows, 6.0)


def test_sampled_rounds_show_their_first_confidence_only() -> None:
    rounds = one_prompt([0, 0], [[0.9, 0.1]] * 2)
    sampled = one_prompt([0, 0], [[0.9, 0.1]] * 2, temperature=0.8)
    assert rules.survival(rounds).tolist() == pytest.approx([0.09] * 2)
    assert rules.survival(sampled).tolist() == pytest.approx([0.9] * 2)


def test_confusion_has_labels_in_rows() -> None:
    assert rules.confusion(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1])) == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def found_with(told_by_features: float) -> dict[str, Any]:
    parts = split(made_rounds(3000, told_by_features=told_by_features), seed=0)
    return figures(parts, *perfect(parts), c=5.0)


def test_a_perfect_head_is_worth_using() -> None:
    found = found_with(3.0)
    assert found["groups"]["all"]["accuracy"][HEAD] == 1.0
    assert (
        found["groups"]["greedy"]["num_rounds"] + found["groups"]["sampled"]["num_rounds"]
        == found["num_rounds"]["held_out"]
    )
    assert judge(found).is_worth and judge(found).text.startswith("Worth using")


@pytest.mark.parametrize("said", [0, 1])
def test_a_head_that_knows_nothing_is_not(said: int) -> None:
    parts = split(made_rounds(3000, told_by_features=0.0, told_by_confidence=3.0), seed=0)
    chosen, held_out = (saying(torch.full_like(one.labels, said)) for one in (parts.choose, parts.held_out))
    verdict = judge(figures(parts, chosen, held_out, c=5.0))
    assert not verdict.is_worth
    assert verdict.text.startswith("Not worth using: " + ("slower" if said == 0 else "no difference"))
    # Class 1 everywhere is confidence alone.
    assert verdict.ratio < 0.95 if said == 0 else verdict.ratio == pytest.approx(1.0)


def test_accuracy_gain_has_an_interval_over_prompts() -> None:
    rounds = made_rounds(600)
    wrong = (rounds.labels + 1) % 3
    assert accuracy_gain(rounds, rounds.labels, wrong) == [1.0, 1.0, 1.0]
    gain, low, high = accuracy_gain(rounds, rounds.labels, torch.zeros_like(rounds.labels))
    assert low < gain < high


def test_majority_is_that_of_the_training_rounds() -> None:
    """A rule that looks at the held-out labels would be better than it can be."""
    rounds = made_rounds(300, told_by_features=0.0)
    most = int(torch.bincount(rounds.labels).argmax())
    held_out = rounds.select(rounds.labels != most)
    parts = Parts(rounds, rounds, held_out)
    found = figures(parts, saying(rounds.labels), saying(held_out.labels), c=5.0)
    assert found["groups"]["all"]["accuracy"][MAJORITY] == 0.0


def test_words_and_summary() -> None:
    found = found_with(3.0)
    text = as_text(found)
    for words in (MAJORITY, ONE, TWO, HEAD, "accepted 2: all", "c = 20", "hybrid, classes known"):
        assert words in text
    assert {"all_accuracy_head", "greedy_accuracy_majority", "speed_ratio_low"} <= set(summary(found))
    assert all(isinstance(value, float) for value in summary(found).values())


@pytest.mark.parametrize("is_mixed", [True, False])
def test_picture(tmp_path: Path, is_mixed: bool) -> None:
    rounds = made_rounds(600)
    if not is_mixed:
        rounds.temperatures.zero_()
    parts = split(rounds, seed=0)
    found = figures(parts, *perfect(parts), c=5.0)
    path = draw_report(found, tmp_path / "report.png", "a pair")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
