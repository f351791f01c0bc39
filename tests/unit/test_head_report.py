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
    MODEL_ERROR,
    ONE,
    SAVED,
    TWO,
    Predictions,
    accuracy_gain,
    as_text,
    by_temperature,
    dear_misses,
    figures,
    fit_thresholds,
    judge,
    miss_table,
    said_by_confidence,
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
    assert ("slower" if said == 0 else "no difference") in verdict.text
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
    for words in (MAJORITY, ONE, TWO, HEAD, SAVED, "accepted 2: all", "c = 20", "hybrid, classes known"):
        assert words in text
    assert {"all_accuracy_head", "greedy_accuracy_majority", "speed_ratio_low"} <= set(summary(found))
    assert all(isinstance(value, float) for value in summary(found).values())


def test_the_summary_is_of_the_head_as_it_is_saved() -> None:
    """What is kept with a head describes what the file says, not what it would say without its shifts."""
    parts = split(made_rounds(3000), seed=0)
    ones = [torch.ones_like(one.labels) for one in (parts.choose, parts.held_out)]
    chosen, held_out = (
        Predictions({HEAD: one.labels}, {HEAD: said})
        for one, said in zip((parts.choose, parts.held_out), ones, strict=True)
    )
    found = figures(parts, chosen, held_out, c=5.0)
    values = summary(found)
    right = float((parts.held_out.labels == 1).float().mean())
    assert (
        values["all_accuracy_head"] == pytest.approx(right, abs=1e-4) and values["all_accuracy_head_likeliest"] == 1.0
    )
    assert found["groups"]["all"]["confusion"][SAVED][0][0] == 0 < found["groups"]["all"]["confusion"][HEAD][0][0]
    gains = found["groups"]["all"]["gains"]
    assert gains[HEAD][ONE][0] > gains[SAVED][ONE][0]


def test_thresholds_are_those_of_each_kind_of_rounds() -> None:
    """All rounds together are judged by no threshold of their own: greedy and sampled ones show different things."""
    rounds = made_rounds(2000, told_by_features=0.0, told_by_confidence=4.0)
    # Sampled rounds are bolder: the best thresholds differ.
    is_sampled = rounds.temperatures > 0
    rounds.top_probs[is_sampled] = rounds.top_probs[is_sampled].sqrt()
    parts = split(rounds, seed=0)
    thresholds = fit_thresholds(parts.train)
    assert thresholds["greedy"] != thresholds["sampled"]
    found = figures(parts, *perfect(parts), c=5.0)
    groups = found["groups"]
    said = said_by_confidence(parts.held_out, thresholds)
    for rule in (ONE, TWO):
        right = {kind: groups[kind]["accuracy"][rule] * groups[kind]["num_rounds"] for kind in groups}
        assert right["all"] == pytest.approx(right["greedy"] + right["sampled"], abs=0.1)
        assert groups["all"]["accuracy"][rule] == pytest.approx(
            float((said[rule] == parts.held_out.labels).float().mean())
        )
    for kind, which in by_temperature(parts.held_out).items():
        if kind != "all":
            alone = said_by_confidence(parts.held_out.select(which), {kind: thresholds[kind]})
            assert torch.equal(alone[TWO], said[TWO][which])
            assert found["thresholds"][kind]["epsilon"] == thresholds[kind][0]


def test_the_verdict_names_the_model_and_the_cost_of_a_miss() -> None:
    parts = split(made_rounds(3000), seed=0)
    found = figures(parts, *perfect(parts), c=5.0, miss_cost=5.0)
    verdict = judge(found)
    rules_of = found["speeds"][0]["rules"]
    assert (
        "c = 5 draft steps" in verdict.text
        and "rejected token 5 more" in verdict.text
        and "round model" in verdict.text
    )
    assert verdict.rollback == rules_of["hybrid"]["rollback_per_round"] < verdict.rollback_without
    assert f"{verdict.rollback:.2f} draft tokens are rolled back" in verdict.text
    cheap = judge(figures(parts, *perfect(parts), c=5.0, miss_cost=0.5))
    assert cheap.ratio < verdict.ratio, "the dearer a miss, the more a head that knows is worth"


@pytest.mark.parametrize(
    ("interval", "lead", "is_worth"),
    [
        ([1.0 + MODEL_ERROR + 0.01, 1.2], "Worth using", True),
        ([1.01, 1.2], "Not shown to be worth using", False),
        ([0.99, 1.2], "Not worth using: no difference", False),
        ([0.8, 0.99], "Not worth using: with the head, held-out rounds are slower", False),
    ],
)
def test_a_gain_within_the_error_of_the_model_is_none(interval: list[float], lead: str, is_worth: bool) -> None:
    found = found_with(3.0)
    found["speeds"][0]["rules"]["hybrid"] |= {"ratio": sum(interval) / 2, "interval": interval}
    verdict = judge(found)
    assert verdict.text.startswith(lead) and verdict.is_worth == is_worth


@pytest.mark.parametrize("is_mixed", [True, False])
def test_picture(tmp_path: Path, is_mixed: bool) -> None:
    rounds = made_rounds(600)
    if not is_mixed:
        rounds.temperatures.zero_()
    parts = split(rounds, seed=0)
    found = figures(parts, *perfect(parts), c=5.0)
    path = draw_report(found, tmp_path / "report.png", "a pair")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
