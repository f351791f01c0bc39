"""The policies on hand-made trees."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.planner import Chunk, Planner, WaitCosts
from vllm_specbranch.token_tree import Candidates, TokenTree


def planner(**keys: object) -> Planner:
    return Planner(SpecBranchConfig.from_user({"model": "m", "num_speculative_tokens": 4} | keys))


def feed(tree: TokenTree, node_id: int, ids: tuple[int, ...], probs: tuple[float, ...], choice: int = 0) -> None:
    """What `DraftRequest.fed` does, with the `confidence` rule."""
    node = tree.node(node_id)
    node.candidates, node.choice, node.score = Candidates(ids, probs), ids[choice], probs[0]


def chain(confidences: Sequence[float], tail: int = 1) -> TokenTree:
    """A tree with one chain of first choices, fed as far as there are confidences, then `tail` unfed nodes."""
    tree = TokenTree([7])
    node = tree.root
    for index, confidence in enumerate(confidences):
        feed(tree, node, (10 + index, 30 + index, 50 + index), (confidence, 0.01, 0.005))
        if index < len(confidences) - 1 or tail:
            node = tree.extend(node, 10 + index)
    return tree


def tokens(tree: TokenTree, chunk: Chunk) -> list[int]:
    return [tree.node(one).token for one in tree.path(chunk.end)]


@pytest.mark.parametrize(
    ("confidences", "expected", "is_complete"),
    [
        ([], [], False),
        ([0.9], [10], False),
        ([0.9, 0.8], [10, 11], False),
        ([0.9, 0.29, 0.9], [10], True),
        ([0.1, 0.9], [], True),
        ([0.3, 0.3, 0.3, 0.3, 0.3, 0.3], [10, 11, 12, 13], True),
    ],
)
def test_a_chunk_ends_before_the_first_unsure_token(
    confidences: list[float], expected: list[int], is_complete: bool
) -> None:
    tree = chain(confidences)
    chunk = planner(stop_threshold=0.3).chunk(tree)
    assert (tokens(tree, chunk), chunk.num_tokens, chunk.is_complete) == (expected, len(expected), is_complete)


def test_pearl_submits_all_up_to_the_limit_and_keeps_one_branch() -> None:
    tree = chain([0.01] * 6)
    pearl = planner(policy="pearl")
    chunk = pearl.chunk(tree)
    assert tokens(tree, chunk) == [10, 11, 12, 13]
    assert pearl.num_candidates == 1
    assert pearl.num_branches(0.0) == 1
    assert pearl.forks(tree, chunk.end) == []


def test_whether_a_token_enters_does_not_depend_on_the_token() -> None:
    """Rule 2 of the design: only the distribution that a token was drawn from decides; take the other token and nothing moves."""
    for swap in (False, True):
        tree = TokenTree([7])
        node = tree.root
        for index, confidence in enumerate([0.9, 0.5, 0.2, 0.9]):
            ids = (10 + index, 30 + index)
            feed(tree, node, ids, (confidence, 0.01), choice=int(swap))
            node = tree.extend(node, ids[1] if swap else ids[0])
        assert planner(stop_threshold=0.3).chunk(tree).num_tokens == 2


@pytest.mark.parametrize(("confidence", "expected"), [(1.0, 1), (0.9, 1), (0.75, 2), (0.5, 4), (0.3, 5), (0.0, 8)])
def test_branch_count_falls_with_confidence(confidence: float, expected: int) -> None:
    assert planner(max_branches=8).num_branches(confidence) == expected


def test_forks_are_the_candidates_that_are_not_there_yet() -> None:
    tree = chain([0.2], tail=1)
    assert planner(max_branches=3).forks(tree, tree.root) == [30]
    tree.extend(tree.root, 30)
    assert planner(max_branches=3).forks(tree, tree.root) == []
    assert planner(max_branches=3).forks(tree, tree.leaves()[0]) == [], "an unfed node has no candidates yet"


def test_branches_grow_until_a_full_chunk_is_ready_below_their_first_token() -> None:
    rule = planner(num_speculative_tokens=2)
    tree = chain([0.9, 0.9, 0.9], tail=1)
    assert rule.rows(tree, tree.root) == tree.leaves(), "depth 3: the candidate and two tokens below it are drafted"
    leaf = tree.leaves()[0]
    feed(tree, leaf, (40,), (0.9,))
    assert list(rule.extensions(tree, tree.root)) == []
    assert rule.rows(tree, tree.root) == []
    assert list(rule.extensions(tree, tree.path(leaf)[0])) == [(leaf, 40)], "after a commit there is room again"


def test_fixed_miss_rules() -> None:
    open_chunk, closed = Chunk(0, 1, False, 0.5), Chunk(0, 1, True, 0.5)
    for rule, hit, expected in (
        ("go", False, False),
        ("wait:2", False, True),
        ("wait:1", False, False),
        ("wait:2", True, False),
    ):
        assert planner(on_miss=rule).wants_more(open_chunk, hit=hit) is expected
    assert planner(on_miss="auto").wants_more(open_chunk, hit=True)
    assert not planner(on_miss="auto").wants_more(closed, hit=False)


def test_waiting_is_weighed_for_the_whole_step() -> None:
    rule = planner(on_miss="auto")
    growing = [Chunk(0, 0, False, 1.0)]
    assert rule.worth_waiting(growing, WaitCosts(step_s=0.002, token_s=0.01, acceptance=0.5, num_waiting=1))
    assert not rule.worth_waiting(growing, WaitCosts(step_s=0.002, token_s=0.01, acceptance=0.5, num_waiting=4))
    assert rule.worth_waiting(growing * 4, WaitCosts(step_s=0.002, token_s=0.01, acceptance=0.5, num_waiting=4))
    assert not rule.worth_waiting([], WaitCosts(0.0, 1.0, 1.0, 1))


@given(
    step_s=st.floats(1e-5, 1.0),
    token_s=st.floats(1e-5, 1.0),
    acceptance=st.floats(0.0, 1.0),
    survivals=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8),
    num_waiting=st.integers(1, 16),
)
def test_a_longer_chunk_is_never_more_worth_waiting_for(
    step_s: float, token_s: float, acceptance: float, survivals: list[float], num_waiting: int
) -> None:
    rule = planner()
    costs = WaitCosts(step_s, token_s, acceptance, num_waiting)
    longer = [Chunk(0, 2, False, survival / 2) for survival in survivals]
    if rule.worth_waiting(longer, costs):
        assert rule.worth_waiting([Chunk(0, 1, False, survival) for survival in survivals], costs)
