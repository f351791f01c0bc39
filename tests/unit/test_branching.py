"""Where policies fork, on hand-made trees."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.acceptance import AcceptanceModel
from vllm_specbranch.branching import MIN_VALUE, Branching, Fork
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.token_tree import Candidates, TokenTree

GAMMA = 4
WIDTH = 6


def branching(policy: str, acceptance: AcceptanceModel | None = None, **keys: object) -> Branching:
    user = {"model": "m", "num_speculative_tokens": GAMMA, "policy": policy} | keys
    return Branching(SpecBranchConfig.from_user(user), acceptance or AcceptanceModel())


def chunk(confidences: Sequence[float]) -> tuple[TokenTree, int]:
    """A tree with a chunk of drafted tokens, all fed, its end as well: token `10 i` is the choice of node i."""
    tree = TokenTree([7])
    node_id = tree.root
    for index, confidence in enumerate(confidences):
        node = tree.node(node_id)
        ids = tuple(10 * index + rank for rank in range(WIDTH))
        rest = (1.0 - confidence) / 2
        node.candidates = Candidates(ids, (confidence, *(rest / 2**rank for rank in range(WIDTH - 1))))
        node.choice, node.score, node.accepted = ids[0], confidence, confidence
        if index < len(confidences) - 1:
            node_id = tree.extend(node_id, ids[0])
    return tree, node_id


def plant(rule: Branching, tree: TokenTree, end: int, is_sampled: bool = False) -> list[Fork]:
    rule.revalue(tree, end, is_sampled=is_sampled)
    forks = rule.forks(tree, end, is_sampled=is_sampled)
    for fork in forks:
        rule.grow_fork(tree, fork, tree.extend(fork.node_id, fork.token))
    return forks


def places(tree: TokenTree, forks: Sequence[Fork]) -> list[int]:
    return [tree.node(fork.node_id).position for fork in forks]


def test_specbranch_forks_at_the_end_only_and_fixed_means_all() -> None:
    tree, end = chunk([0.9, 0.5, 0.5])
    for rule, expected in (("adaptive", 2), ("fixed", 5)):
        forks = branching("specbranch", max_branches=5, branch_rule=rule).forks(tree, end, is_sampled=False)
        assert {fork.node_id for fork in forks} == {end}
        assert [fork.token for fork in forks] == [20, 21, 22, 23, 24][:expected]


def test_fanout_falls_geometrically_and_reaches_every_position() -> None:
    tree, end = chunk([0.5, 0.5, 0.5, 0.5])
    rule = branching("fanout", max_branches=12)
    found = places(tree, plant(rule, tree, end))
    counts = [found.count(position) for position in range(4)]
    ratio = AcceptanceModel().mean ** 0.5
    share = 12 / sum(ratio**index for index in range(4))
    assert counts == [min(5, round(share * ratio**index)) for index in range(4)]
    assert counts[0] > counts[-1] >= 1
    assert plant(rule, tree, end) == [], "all is there"


def test_best_first_takes_the_likeliest_outcomes_wherever_they_are() -> None:
    tree, end = chunk([0.5, 0.95, 0.95])
    forks = plant(branching("best_first", max_branches=3), tree, end)
    # 0.5 x 0.95 x 0.95 = 0.45 at the end; 0.25 and 0.125 at the first position.
    assert [(position, fork.token) for position, fork in zip(places(tree, forks), forks, strict=True)] == [
        (2, 20),
        (0, 1),
        (0, 2),
    ]
    assert [fork.value for fork in forks] == pytest.approx([0.5 * 0.95 * 0.95, 0.25, 0.125])


def test_inside_a_chunk_the_draft_token_itself_is_no_fork() -> None:
    for is_sampled in (False, True):
        tree, end = chunk([0.5, 0.5, 0.5])
        for policy in ("fanout", "best_first"):
            forks = branching(policy, max_branches=64).forks(tree, end, is_sampled=is_sampled)
            assert not {0, 10} & {fork.token for fork in forks}
            assert 20 in {fork.token for fork in forks}, "after the chunk it is the first candidate"


def test_under_pressure_there_is_one_fork_at_the_end() -> None:
    for policy in ("specbranch", "fanout", "best_first"):
        tree, end = chunk([0.3, 0.3, 0.3])
        forks = branching(policy, max_branches=64).forks(tree, end, is_sampled=False, most=1)
        assert [(fork.node_id, fork.token) for fork in forks] == [(end, 20)]


def test_extensions_follow_the_choice_and_end_where_they_are_not_worth_it() -> None:
    rule = branching("best_first", max_branches=64)
    tree, end = chunk([0.5, 0.5])
    plant(rule, tree, end)
    leaf = next(leaf for leaf in tree.leaves() if tree.node(leaf).token == 1)
    node = tree.node(leaf)
    node.candidates, node.choice, node.accepted = Candidates((40, 41), (0.6, 0.2)), 41, 0.6
    assert rule.extensions(tree, end, is_sampled=False) == [(leaf, 41)]
    assert rule.extensions(tree, end, is_sampled=False, price=0.6) == [(leaf, 41)]
    assert rule.extensions(tree, end, is_sampled=False, price=0.61) == []
    assert rule.extensions(tree, end, is_sampled=True, price=0.61) == [(leaf, 41)], "by nothing that was drawn"
    child = tree.extend(leaf, 41)
    rule.grow_extension(tree, leaf, child, is_sampled=False)
    assert tree.node(child).value == pytest.approx(node.value * 0.6)
    assert (tree.node(child).survival, tree.node(child).deepest) == (pytest.approx(0.6), 0 + 1 + GAMMA)
    rule.grow_extension(tree, leaf, child, is_sampled=True)
    assert tree.node(child).value == node.value, "a branch of a sampled request is worth the same at every depth"
    rule.revalue(tree, end, is_sampled=True)
    assert tree.node(child).value == tree.node(leaf).value


@given(
    confidences=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=GAMMA + 1),
    policy=st.sampled_from(["pearl", "specbranch", "fanout", "best_first"]),
    is_sampled=st.booleans(),
    budget=st.integers(1, 64),
)
def test_values_are_those_of_disjoint_outcomes(
    confidences: list[float], policy: str, is_sampled: bool, budget: int
) -> None:
    """Outcomes exclude each other, so the values of all forks are at most 1 together; estimated anew they are the same."""
    rule = branching(policy, **({} if policy == "pearl" else {"max_branches": budget}))
    tree, end = chunk(confidences)
    rule.revalue(tree, end, is_sampled=is_sampled)
    forks = plant(rule, tree, end, is_sampled)
    assert sum(fork.value for fork in forks) <= 1.0 + 1e-9
    assert len({(fork.node_id, fork.token) for fork in forks}) == len(forks)
    if policy == "best_first":
        assert all(fork.value >= MIN_VALUE for fork in forks)
    before = {leaf: (tree.node(leaf).value, tree.node(leaf).deepest) for leaf in tree.leaves()}
    rule.revalue(tree, end, is_sampled=is_sampled)
    for leaf, (value, deepest) in before.items():
        if leaf != end:
            assert tree.node(leaf).value == pytest.approx(value)
            assert tree.node(leaf).deepest == deepest


@given(st.lists(st.floats(0.01, 0.99), min_size=2, max_size=GAMMA + 1), st.integers(1, 40))
def test_no_outcome_left_out_is_likelier_than_one_taken(confidences: list[float], budget: int) -> None:
    tree, end = chunk(confidences)
    rule = branching("best_first", max_branches=budget)
    rule.revalue(tree, end, is_sampled=False)
    taken = plant(rule, tree, end)
    everything = branching("best_first", max_branches=64)
    left = [fork.value for fork in everything.forks(tree, end, is_sampled=False)]
    if taken and left:
        assert max(left) <= min(fork.value for fork in taken) + 1e-12
    assert len(taken) <= budget or math.isclose(taken[-1].value, taken[budget - 1].value)
