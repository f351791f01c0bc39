"""The policies on hand-made trees."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.planner import Chunk, Planner, WaitCosts
from vllm_specbranch.token_tree import Candidates, TokenTree


def planner(**keys: object) -> Planner:
    return Planner(
        SpecBranchConfig.from_user({"model": "m", "policy": "specbranch", "num_speculative_tokens": 4} | keys)
    )


def feed(tree: TokenTree, node_id: int, ids: tuple[int, ...], probs: tuple[float, ...], choice: int = 0) -> None:
    """What `DraftRequest.fed` does, with the `confidence` rule."""
    node = tree.node(node_id)
    node.candidates, node.choice, node.score, node.accepted = Candidates(ids, probs), ids[choice], probs[0], probs[0]


def forked(rule: Planner, tree: TokenTree, end: int, most: int | None = None) -> list[int]:
    """Tokens that are forked where all forks are at the end of the chunk."""
    forks = rule.branching.forks(tree, end, is_sampled=False, most=most)
    assert {fork.node_id for fork in forks} <= {end}
    return [fork.token for fork in forks]


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
    assert pearl.branching.num_branches(0.0) == 1
    assert forked(pearl, tree, chunk.end) == []


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
    assert planner(max_branches=8).branching.num_branches(confidence) == expected


def test_forks_are_the_candidates_that_are_not_there_yet() -> None:
    tree = chain([0.2], tail=1)
    assert forked(planner(max_branches=3), tree, tree.root) == [30]
    tree.extend(tree.root, 30)
    assert forked(planner(max_branches=3), tree, tree.root) == []
    assert forked(planner(max_branches=3), tree, tree.leaves()[0]) == [], "an unfed node has no candidates yet"


def test_branches_grow_until_a_full_chunk_is_ready_below_their_first_token() -> None:
    rule = planner(num_speculative_tokens=2)
    branching = rule.branching
    tree = chain([0.9, 0.9, 0.9], tail=1)
    branching.revalue(tree, tree.root, is_sampled=False)
    assert [leaf for _, leaf in rule.rows(tree)] == tree.leaves(), "depth 3: the candidate and two tokens below it"
    leaf = tree.leaves()[0]
    feed(tree, leaf, (40,), (0.9,))
    assert branching.extensions(tree, tree.root, is_sampled=False) == []
    assert rule.rows(tree) == []
    branching.revalue(tree, tree.path(leaf)[0], is_sampled=False)
    assert branching.extensions(tree, tree.path(leaf)[0], is_sampled=False) == [(leaf, 40)], (
        "after a commit there is room again"
    )


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
    assert rule.worth_waiting(growing, WaitCosts(delay_s=0.002, token_s=0.01, acceptance=0.5, num_waiting=1))
    assert not rule.worth_waiting(growing, WaitCosts(delay_s=0.002, token_s=0.01, acceptance=0.5, num_waiting=4))
    assert rule.worth_waiting(growing * 4, WaitCosts(delay_s=0.002, token_s=0.01, acceptance=0.5, num_waiting=4))
    assert not rule.worth_waiting([], WaitCosts(0.0, 1.0, 1.0, 1))


def test_nobody_waits_for_what_is_not_worth_its_verification() -> None:
    rule = planner(on_miss="auto")
    for price, expected in ((0.0, True), (0.2, True), (0.45, False), (2.0, False)):
        costs = WaitCosts(0.002, 0.02, 0.5, 4, price=price)
        assert rule.worth_waiting([Chunk(0, 0, False, 1.0)] * 4, costs) is expected


def test_where_the_draft_is_the_bottleneck_a_wait_gains_less() -> None:
    rule = planner(on_miss="auto", num_speculative_tokens=8)
    growing = [Chunk(0, 0, False, 1.0)]
    for steps_per_round, expected in ((100.0, True), (8.0, True), (4.0, True), (3.0, False)):
        costs = WaitCosts(0.002, 0.01, 0.5, 1, steps_per_round)
        assert rule.worth_waiting(growing, costs) is expected


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


def test_branches_are_the_best_candidates_not_what_was_drawn() -> None:
    """Rule 4 of the design: which branch survives is a look-up among deterministic candidates."""
    tree = TokenTree([7])
    feed(tree, tree.root, (10, 30, 50), (0.4, 0.35, 0.25), choice=2)
    rule = planner(max_branches=4)
    assert forked(rule, tree, tree.root) == [10, 30]
    assert forked(rule, tree, tree.root, most=1) == [10]
    assert rule.branching.extensions(tree, tree.root, is_sampled=False) == [], (
        "at the branch point itself nothing is drawn"
    )
    leaf = tree.extend(tree.root, 10)
    feed(tree, leaf, (11, 31), (0.9, 0.1), choice=1)
    assert rule.branching.extensions(tree, tree.root, is_sampled=False) == [(leaf, 31)], "below it the choice goes on"


def test_a_chunk_follows_what_was_drawn() -> None:
    tree = TokenTree([7])
    node = tree.root
    for index in range(3):
        feed(tree, node, (10 + index, 30 + index), (0.9, 0.1), choice=1)
        tree.extend(node, 10 + index)
        node = tree.extend(node, 30 + index)
    assert tokens(tree, planner().chunk(tree)) == [30, 31, 32]


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ((1.0,), 1.0),
        ((0.5, 0.5), 1.0 - math.sqrt(0.2 * math.log(2))),
        ((0.25, 0.25, 0.25, 0.25), 1.0 - math.sqrt(0.2 * math.log(4))),
        ((0.5, 0.25), 1.0 - math.sqrt(0.2 * 1.5 * math.log(2))),
        ((0.002,) * 500, 0.0),
    ],
)
def test_adaedl_s_bound(probs: tuple[float, ...], expected: float) -> None:
    """1 - sqrt(0.2 H), arXiv:2410.18351; what is missing from the probabilities counts as one outcome; never below 0."""
    rule = planner(stop_rule="adaedl")
    assert rule.score(Candidates(tuple(range(len(probs))), probs)) == pytest.approx(expected)
    assert rule.num_candidates == 64, "entropy needs more candidates than there are branches"


def test_a_score_does_not_change_with_the_names_of_the_tokens() -> None:
    for name in ("confidence", "adaedl", "none"):
        rule = planner(stop_rule=name)
        assert rule.score(Candidates((1, 2), (0.7, 0.3))) == rule.score(Candidates((9, 4), (0.7, 0.3)))


def test_without_time_a_miss_waits_for_a_fixed_number_of_tokens() -> None:
    rule = planner(deterministic=True, num_speculative_tokens=6)
    lengths = [length for length in range(7) if rule.wants_more(Chunk(0, length, False, 1e-9), hit=False)]
    assert lengths == [0, 1, 2, 3]
    assert not rule.wants_more(Chunk(0, 0, False, 1.0), hit=True)
    assert rule.worth_waiting([Chunk(0, 0, False, 1e-9)], WaitCosts(1e9, 1e-9, 0.0, 100)), "whatever it costs"


@pytest.mark.parametrize(
    ("price", "expected"),
    [(0.0, [10, 11, 12]), (0.4, [10, 11, 12]), (0.5, [10, 11]), (0.7, [10]), (0.95, []), (1.5, [])],
)
def test_a_chunk_ends_where_a_token_is_not_worth_its_verification(price: float, expected: list[int]) -> None:
    """Forward, rule 2: what counts is the chance before a token is drawn that it and all before it are accepted."""
    tree = chain([0.9, 0.7, 0.7])
    chunk = planner(stop_rule="none").chunk(tree, price)
    assert tokens(tree, chunk) == expected
    assert chunk.is_complete == (price >= 0.5)


@pytest.mark.parametrize(
    ("length_class", "expected", "is_complete"),
    [(None, [10], True), (0, [], True), (1, [10], True), (2, [10, 11, 12, 13], True)],
)
def test_a_length_class_cuts_all_of_the_chunk_none_of_it_or_leaves_it_to_the_rule(
    length_class: int | None, expected: list[int], is_complete: bool
) -> None:
    tree = chain([0.9, 0.05, 0.9, 0.9, 0.9])
    chunk = planner(stop_threshold=0.3).chunk(tree, length_class=length_class)
    assert (tokens(tree, chunk), chunk.is_complete) == (expected, is_complete)
    pearl = planner(policy="pearl").chunk(tree, length_class=length_class)
    assert tokens(tree, pearl) == [10, 11, 12, 13], "PEARL submits all it has"


def test_before_the_root_is_fed_class_0_is_complete_and_class_2_is_not() -> None:
    tree = TokenTree([7])
    assert planner().chunk(tree, length_class=0).is_complete, "nobody waits for what will not be submitted"
    assert not planner().chunk(tree, length_class=2).is_complete


def test_class_2_is_no_rule_of_load() -> None:
    tree = chain([0.9, 0.05, 0.9])
    assert tokens(tree, planner(stop_threshold=0.3).chunk(tree, 0.2, length_class=2)) == [10]


def test_nothing_is_awaited_for_a_chunk_that_would_stay_empty() -> None:
    assert planner().chunk(TokenTree([7]), price=1.0).is_complete
    assert not planner().chunk(TokenTree([7]), price=0.9).is_complete


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=40), st.floats(0.0, 0.5))
def test_rows_are_taken_while_they_raise_the_value_per_time(values: list[float], row_cost: float) -> None:
    values.sort(reverse=True)
    count = planner(policy="best_first").num_rows(values, row_cost)
    rates = [sum(values[:n]) / (1.0 + row_cost * (n - 1)) for n in range(1, len(values) + 1)]
    assert rates[count - 1] == pytest.approx(max(rates))
    for policy in ("pearl", "specbranch", "fanout"):
        assert planner(policy=policy).num_rows(values, row_cost) == len(values)
    assert planner(policy="best_first", deterministic=True).num_rows(values, row_cost) == len(values), "no times"
