"""The length head that is learned while serving, and the gate that lets it cut chunks only where it pays."""

import random
from collections.abc import Sequence

import pytest

from tests.unit.test_planner import feed
from vllm_specbranch.benefit_gate import OF_A_HEAD, BenefitGate
from vllm_specbranch.online_head import WARM_UP_LABELS, Example, OnlineHead
from vllm_specbranch.token_tree import TokenTree

GAMMA = 3
BLOCK = OF_A_HEAD.block_rounds + OF_A_HEAD.settling_rounds


def chain(confidences: Sequence[float]) -> TokenTree:
    """A fed chain of first choices 10, 11, ...; other candidates are 30, 31, ..."""
    tree = TokenTree([7])
    node = tree.root
    for index, confidence in enumerate(confidences):
        feed(tree, node, (10 + index, 30 + index), (confidence, 1.0 - confidence))
        node = tree.extend(node, 10 + index)
    return tree


def labels_of(
    rounds: Sequence[tuple[Sequence[float], Sequence[int], int]], *, is_sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[tuple[int, int]], list[Example]]:
    """((position, accepted) that were learned, what is still open); a round is (confidences, committed tokens, draft tokens)."""
    learned = []
    monkeypatch.setattr(
        OnlineHead, "_learn", lambda self, one, accepted, *, is_sampled: learned.append((one.position, accepted))
    )
    head = OnlineHead(GAMMA)
    examples: list[Example] = []
    tree = TokenTree([7])
    for confidences, tokens, num_draft_tokens in rounds:
        if confidences:
            root = tree.node(tree.root)
            node = root
            for index, confidence in enumerate(confidences):
                if node.candidates is None:
                    feed(tree, node.node_id, (10 + index, 30 + index), (confidence, 1.0 - confidence))
                child = node.children.get(node.choice)
                node = tree.node(tree.extend(node.node_id, node.choice) if child is None else child)
            found = head.example(tree, is_sampled=is_sampled)
            assert found is not None
            examples.append(found)
        head.observe(examples, tree, tokens, num_draft_tokens, is_sampled=is_sampled)
        tree.commit(tokens)
    return learned, examples


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([99], [(0, 0)]), ([30], [(0, 0)]), ([10, 99], [(0, 1)]), ([10, 11, 99], [(0, 2)]), ([10, 11, 12, 99], [(0, 3)])],
)
def test_a_greedy_label_counts_the_drafts_choices_that_were_right(
    tokens: list[int], expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, examples = labels_of([([0.9] * 4, tokens, 3)], is_sampled=False, monkeypatch=monkeypatch)
    assert (learned, examples) == (expected, [])


def test_a_greedy_label_takes_as_many_rounds_as_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was submitted (class 0, say), and the draft was right all the same: the kept chain tells."""
    rounds = [([0.9] * 4, [10], 0), ([0.9] * 3, [11], 0), ([0.9] * 3, [12], 0)]
    learned, examples = labels_of(rounds, is_sampled=False, monkeypatch=monkeypatch)
    assert learned == [(0, 3)]
    assert [one.position for one in examples] == [1, 2]


def test_what_cannot_be_known_is_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """The right token was committed, but the one after it came before the draft had been asked."""
    learned, examples = labels_of([([0.9], [10], 0), ([], [50], 0)], is_sampled=False, monkeypatch=monkeypatch)
    assert (learned, examples) == ([], [])


@pytest.mark.parametrize(
    ("tokens", "num_draft_tokens", "expected"),
    [
        ([99], 2, [(0, 0)]),
        ([10, 99], 2, [(0, 1)]),
        ([10, 11, 99], 3, [(0, 2)]),
        ([10, 11, 12, 99], 3, [(0, 3)]),
        ([10, 11, 99], 2, []),
        ([10], 0, []),
    ],
)
def test_a_sampled_label_is_what_the_verification_showed(
    tokens: list[int], num_draft_tokens: int, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that was cut and accepted is censored; a token that was not submitted is not compared, whatever was drawn."""
    learned, examples = labels_of([([0.9] * 4, tokens, num_draft_tokens)], is_sampled=True, monkeypatch=monkeypatch)
    assert (learned, examples) == (expected, [])


@pytest.mark.parametrize("is_sampled", [False, True])
def test_it_learns_when_the_draft_is_wrong_at_once_and_when_all_is_right(is_sampled: bool) -> None:
    rng = random.Random(1)
    head = OnlineHead(GAMMA)
    sure, middling, unsure = [0.97] * 4, [0.6] * 4, [0.2] * 4
    assert head.length_class(chain(sure), is_sampled=is_sampled) is None, "nothing has been learned"
    for _ in range(1500):
        confidences, rate = rng.choice([(sure, 0.98), (middling, 0.6), (unsure, 0.1)])
        tree = chain(confidences)
        accepted = 0
        while accepted < GAMMA and rng.random() < rate:
            accepted += 1
        example = head.example(tree, is_sampled=is_sampled)
        assert example is not None
        tokens = [*range(10, 10 + accepted), 99]
        head.observe([example], tree, tokens, GAMMA, is_sampled=is_sampled)
    assert head.is_ready
    classes = [head.length_class(chain(one), is_sampled=is_sampled) for one in (unsure, middling, sure)]
    assert classes == [0, 1, 2]
    assert head.length_class(chain(sure), is_sampled=not is_sampled) is None, "the other kind has its own"
    assert head.length_class(TokenTree([7]), is_sampled=is_sampled) is None, "the root has not been fed"


def test_a_sampled_class_depends_on_the_distribution_at_the_root_alone() -> None:
    """Rule 2: not on what was drawn from it, nor on anything below."""
    head = OnlineHead(GAMMA)
    rng = random.Random(2)
    for _ in range(WARM_UP_LABELS):
        tree = chain([rng.random() for _ in range(4)])
        example = head.example(tree, is_sampled=True)
        assert example is not None
        head.observe([example], tree, [99] if rng.random() < 0.5 else [10, 11, 12, 99], GAMMA, is_sampled=True)
    for root in (0.05, 0.3, 0.6, 0.9):
        found = set()
        for choice in (0, 1):
            for below in (0.01, 0.99):
                tree = TokenTree([7])
                feed(tree, tree.root, (10, 30), (root, 1.0 - root), choice)
                child = tree.extend(tree.root, (10, 30)[choice])
                feed(tree, child, (11, 31), (below, 1.0 - below))
                found.add(head.length_class(tree, is_sampled=True))
        assert len(found) == 1


def played(gate: BenefitGate, num_rounds: int, gain: float, seed: int, noise: float = 0.5) -> tuple[float, float]:
    """(tokens, of them as many as there would have been without what is tried) of rounds of one second."""
    rng = random.Random(seed)
    made = without = 0.0
    for _ in range(num_rounds):
        bare = rng.uniform(3.0 * (1.0 - noise), 3.0 * (1.0 + noise))
        tokens = bare * (1.0 + gain) if gate.is_on else bare
        gate.observe_round(1.0, tokens)
        made, without = made + tokens, without + bare
    return made, without


def test_a_gate_is_shut_until_a_trial_has_begun_and_stays_shut_without_rounds() -> None:
    assert not BenefitGate().is_on


@pytest.mark.parametrize("seed", range(5))
def test_what_helps_is_used(seed: int) -> None:
    gate = BenefitGate()
    played(gate, 2 * OF_A_HEAD.max_pairs * BLOCK, 0.3, seed)
    made, without = played(gate, 5000, 0.3, seed + 100)
    assert made > 1.2 * without


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("loss", [-0.5, -0.1, -0.03])
def test_what_harms_costs_its_trials_only(seed: int, loss: float) -> None:
    """Never worse than without, after the warm-up: what is lost is the loss times the share of rounds that were trials."""
    gate = BenefitGate()
    played(gate, 2 * OF_A_HEAD.max_pairs * BLOCK, loss, seed)
    made, without = played(gate, 60_000, loss, seed + 100)
    assert made > 0.99 * without


def test_trials_become_rarer_while_their_verdict_stays() -> None:
    gate = BenefitGate()
    counts = []
    for _ in range(6):
        before = gate.num_trials
        played(gate, 100 * BLOCK, -0.5, 7, noise=0.1)
        counts.append(gate.num_trials - before)
    assert counts[0] >= 1 and sum(counts) <= 4
    assert 2 * OF_A_HEAD.min_pairs < OF_A_HEAD.first_rest


def test_a_verdict_may_change() -> None:
    gate = BenefitGate()
    played(gate, 1000, 0.4, 1)
    assert gate.num_trials and gate.is_on
    played(gate, 40_000, -0.4, 2)
    made, without = played(gate, 5000, -0.4, 3)
    assert made > 0.97 * without
