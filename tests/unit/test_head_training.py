"""Training on made-up rounds: it learns what is there, repeats itself, and sees no held-out prompt."""

import pytest
import torch

from tests.made_rounds import made_rounds
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_training import (
    Parts,
    Trained,
    TrainSettings,
    balanced_accuracy,
    class_weights,
    joint_inputs,
    logits_of,
    predict,
    shift_classes,
    split,
    train,
)

QUICK = TrainSettings(num_epochs=4)


def trained(parts: Parts, settings: TrainSettings = QUICK) -> Trained:
    return train(parts.train, parts.choose, settings)


def accuracy(parts: Parts, head: Trained) -> float:
    return float((predict(head.head, parts.held_out) == parts.held_out.labels).float().mean())


def majority(parts: Parts) -> float:
    return float(torch.bincount(parts.held_out.labels).max()) / len(parts.held_out)


def test_split_is_by_prompt_and_repeats() -> None:
    rounds = made_rounds()
    parts, again, other = split(rounds, seed=3), split(rounds, seed=3), split(rounds, seed=4)
    prompts = [set(one.prompts.tolist()) for one in (parts.train, parts.choose, parts.held_out)]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 60
    assert [len(one) for one in prompts] == [42, 6, 12]
    assert len(parts.train) + len(parts.choose) + len(parts.held_out) == len(rounds)
    assert torch.equal(parts.held_out.features, again.held_out.features)
    assert set(other.held_out.prompts.tolist()) != prompts[2]


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 10 prompts"):
        split(made_rounds(90, num_prompts=9), seed=0)


def test_it_learns_what_the_features_tell() -> None:
    parts = split(made_rounds(), seed=0)
    assert accuracy(parts, trained(parts)) > majority(parts) + 0.15


def test_it_learns_nothing_where_there_is_nothing() -> None:
    """Features of one prompt are no help with another: were held-out prompts seen in training, this would pass for learning."""
    parts = split(made_rounds(told_by_features=0.0), seed=0)
    assert accuracy(parts, trained(parts)) < majority(parts) + 0.05


def test_same_seed_same_head_and_the_callers_random_state_stays() -> None:
    parts = split(made_rounds(400), seed=0)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = trained(parts)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    second = trained(parts)
    other = trained(parts, TrainSettings(num_epochs=4, seed=1))
    weights = [one.head.layers[0].weight for one in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.losses == second.losses


def test_the_epoch_with_the_least_loss_is_kept() -> None:
    parts = split(made_rounds(400), seed=0)
    seen: list[tuple[int, float, float]] = []
    settings = TrainSettings(num_epochs=8, learning_rate=3e-2, patience=8)
    found = train(parts.train, parts.choose, settings, on_epoch=lambda *one: seen.append(one))
    assert [one[0] for one in seen] == list(range(1, 9))
    choosing = [one[2] for one in seen]
    assert choosing[found.epoch - 1] == min(choosing) == min(one for _, one in found.losses)


def test_training_ends_when_nothing_gets_better() -> None:
    """Labels by chance: what is learned is the training rounds by heart."""
    parts = split(made_rounds(400, told_by_features=0.0), seed=0)
    found = trained(parts, TrainSettings(num_epochs=50, learning_rate=1e-2, patience=2))
    assert len(found.losses) == found.epoch + 2 < 50


def test_features_are_standardised_from_the_training_rounds() -> None:
    parts = split(made_rounds(), seed=0)
    head = trained(parts).head
    scaled = (parts.train.features - head.mean) / head.scale
    assert scaled.mean(dim=0).abs().max() < 1e-3
    assert (scaled.std(dim=0) - 1).abs().max() < 1e-2


def test_a_feature_that_never_varies_is_left_alone() -> None:
    rounds = made_rounds(400)
    rounds.features[:, 3] = 42.0
    parts = split(rounds, seed=0)
    head = trained(parts).head
    assert head.scale[3] == 1.0
    assert bool(head(parts.held_out.features).isfinite().all())


def test_class_weights() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    assert class_weights(labels).tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert bool(class_weights(torch.zeros(5, dtype=torch.int64)).isfinite().all())


def test_class_weights_are_taken_back_where_that_names_more_rounds_right() -> None:
    """Rounds with no information: the best that can be said is the most frequent class, not the rare ones in turn."""
    parts = split(made_rounds(told_by_features=0.0), seed=0)
    found = trained(parts)
    assert found.prior_share > 0
    labels = parts.choose.labels
    named = predict(found.head, parts.choose)
    assert float((named == labels).float().mean()) >= float(torch.bincount(labels).max()) / len(labels) - 0.05


def test_shifted_classes_stay_with_the_head() -> None:
    parts = split(made_rounds(400), seed=0)
    head = trained(parts).head
    before = logits_of(head, parts.held_out)
    shift_classes(head, (0.5, 1e4))
    after = logits_of(head, parts.held_out)
    assert torch.allclose(after, before - torch.tensor([0.5, 0.0, 1e4]))
    assert 2 not in head.classes(parts.held_out.features)


def test_joint_inputs_hide_later_confidences_of_sampled_rounds() -> None:
    rounds = made_rounds(40)
    found = joint_inputs(rounds)
    assert found.shape == (40, 12 + 4 + 1)
    odds, is_sampled = found[:, 12:16], found[:, 16].bool()
    assert torch.equal(is_sampled, rounds.temperatures > 0)
    assert bool((odds[is_sampled][:, 1:] == 0).all()) and bool((odds[is_sampled][:, 0] != 0).all())
    assert bool((odds[~is_sampled] != 0).all())
    assert torch.allclose(odds[~is_sampled], torch.logit(rounds.top_probs[~is_sampled]), atol=1e-3)
    assert torch.equal(joint_inputs(rounds, with_features=False), found[:, 12:])


def test_balanced_accuracy() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    assert balanced_accuracy(torch.tensor([0, 0, 0, 0, 0, 1]), labels) == pytest.approx(0.75)
