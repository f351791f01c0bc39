"""Tests of `token_tree`, one rule of the tree at a time."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.errors import TreeError
from vllm_specbranch.token_tree import Candidates, CommitResult, TokenTree, extend_prefix, hash_prefix, shorten_prefix

UNKNOWN_NODE = 10**9


def chain(tree: TokenTree, start: int, *tokens: int) -> list[int]:
    """Extend a chain of tokens below a node; returns the new node ids."""
    node_ids = []
    for token in tokens:
        start = tree.extend(start, token)
        node_ids.append(start)
    return node_ids


def test_new_tree_has_only_the_last_token_as_root() -> None:
    tree = TokenTree((7, 8, 9))
    root = tree.node(tree.root)
    assert list(tree.trunk) == [7, 8, 9]
    assert (tree.num_tokens, len(tree)) == (3, 1)
    assert (root.node_id, root.token, root.position, root.parent) == (tree.root, 9, 2, None)
    assert (root.children, root.candidates) == ({}, None)
    assert tree.path(tree.root) == []
    assert tree.leaves() == [tree.root]
    tree.check_integrity()


def test_the_trunk_is_a_copy_of_the_callers_tokens() -> None:
    tokens = [1, 2]
    tree = TokenTree(tokens)
    tree.commit([3])
    tokens.append(4)
    assert (tokens, list(tree.trunk)) == ([1, 2, 4], [1, 2, 3])


def test_extend_adds_children_in_rank_order() -> None:
    tree = TokenTree([5])
    first, second = tree.extend(tree.root, 9), tree.extend(tree.root, 3)
    below = tree.extend(first, 4)
    assert list(tree.node(tree.root).children.items()) == [(9, first), (3, second)]
    assert (tree.node(below).token, tree.node(below).position, tree.node(below).parent) == (4, 2, first)
    assert tree.path(below) == [first, below]
    assert tree.leaves() == [below, second]
    assert tree.leaves(first) == [below]
    assert tree.leaves(second) == [second]
    assert len(tree) == 4 and below in tree and UNKNOWN_NODE not in tree


def test_truncate_subtree_removes_a_node_and_all_below() -> None:
    tree = TokenTree([5])
    first, below = chain(tree, tree.root, 1, 2)
    side = tree.extend(first, 3)
    other = tree.extend(tree.root, 2)
    removed = tree.truncate_subtree(first)
    assert removed[0] == first and sorted(removed) == sorted([first, below, side])
    assert tree.node(tree.root).children == {2: other}
    assert tree.extend(tree.root, 1) > other, "a pruned token can come back, under a new id"
    tree.check_integrity()


def test_commit_hit_keeps_exactly_what_hangs_below() -> None:
    tree = TokenTree([5])
    old_root = tree.root
    one, two, three = chain(tree, old_root, 1, 2, 3)
    side_of_one = tree.extend(one, 7)
    below_side = [tree.extend(side_of_one, token) for token in range(4)]
    side_below = tree.extend(two, 8)
    tree.node(two).candidates = Candidates((3, 8), (0.6, 0.3))
    result = tree.commit([1, 2])
    assert (result.hit, result.num_matched, result.last_matched) == (True, 2, two)
    assert sorted(result.removed) == sorted([old_root, one, side_of_one, *below_side])
    assert list(tree.trunk) == [5, 1, 2]
    assert tree.root == two
    assert tree.node(two).candidates == Candidates((3, 8), (0.6, 0.3))
    assert tree.leaves() == [three, side_below]
    assert (tree.node(three).position, tree.node(two).parent) == (3, None)
    tree.check_integrity()


def test_commit_hit_at_a_leaf_leaves_a_bare_root() -> None:
    tree = TokenTree([5])
    leaf = tree.extend(tree.root, 1)
    assert tree.commit([1]).hit
    assert (tree.root, len(tree), tree.leaves()) == (leaf, 1, [leaf])


@pytest.mark.parametrize(
    ("tokens", "num_matched"),
    [([1, 9], 1), ([9], 0), ([9, 1, 2], 0), ([1, 2, 3], 2)],
    ids=["inside", "at once", "first of several", "below a leaf"],
)
def test_commit_miss_drops_all_and_plants_the_last_token(tokens: list[int], num_matched: int) -> None:
    tree = TokenTree([5])
    reached = [tree.root, *chain(tree, tree.root, 1, 2)]
    result = tree.commit(tokens)
    assert result == CommitResult(False, num_matched, reached[num_matched], result.removed)
    assert sorted(result.removed) == reached
    assert list(tree.trunk) == [5, *tokens]
    root = tree.node(tree.root)
    assert tree.root not in reached
    assert (root.token, root.position, root.candidates, len(tree)) == (tokens[-1], len(tokens), None, 1)
    tree.check_integrity()


def test_rollback_into_the_trunk_plants_a_new_root() -> None:
    tree = TokenTree([5, 6, 7])
    old = [tree.root, *chain(tree, tree.root, 1, 2)]
    assert sorted(tree.rollback(2)) == old
    assert list(tree.trunk) == [5, 6]
    root = tree.node(tree.root)
    assert tree.root not in old and (root.token, root.position, len(tree)) == (6, 1, 1)
    tree.check_integrity()


def test_rollback_to_the_whole_trunk_keeps_the_root_node() -> None:
    tree = TokenTree([5, 6])
    root = tree.root
    tree.node(root).candidates = Candidates((1,), (0.9,))
    removed = tree.rollback(2) + tree.rollback(2)
    assert removed == []
    below = [*chain(tree, root, 1, 2), tree.extend(root, 3)]
    assert sorted(tree.rollback(2)) == sorted(below)
    assert (tree.root, len(tree), tree.node(root).candidates) == (root, 1, Candidates((1,), (0.9,)))
    tree.check_integrity()


def test_errors_name_the_trouble() -> None:
    tree = TokenTree([5, 6])
    child = tree.extend(tree.root, 1)
    with pytest.raises(TreeError, match="at least one committed token"):
        TokenTree([])
    with pytest.raises(TreeError, match="at least one token"):
        tree.commit([])
    with pytest.raises(TreeError, match=f"token 1 is already child {child}"):
        tree.extend(tree.root, 1)
    with pytest.raises(TreeError, match="is the root"):
        tree.truncate_subtree(tree.root)
    for num_tokens in (-1, 0, 3):
        with pytest.raises(TreeError, match=f"roll back to {num_tokens} tokens, the trunk has 2"):
            tree.rollback(num_tokens)
    for call in (tree.node, tree.path, tree.leaves, tree.truncate_subtree, lambda node_id: tree.extend(node_id, 1)):
        with pytest.raises(TreeError, match=f"node {UNKNOWN_NODE} is not in the tree of 2 nodes"):
            call(UNKNOWN_NODE)
    tree.check_integrity()
    assert (len(tree), list(tree.trunk)) == (2, [5, 6])


class UnwalkableList(list[int]):
    """A list that can be indexed and appended to, but not walked or sliced."""

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("the trunk was walked")

    def __getitem__(self, index: object) -> int:  # type: ignore[override]
        assert isinstance(index, int), "the trunk was sliced"
        return super().__getitem__(index)


def test_no_call_walks_the_trunk() -> None:
    tree = TokenTree([5])
    tree._trunk = UnwalkableList([5])
    chain(tree, tree.root, 1, 2)
    tree.leaves()
    tree.commit([1])
    tree.commit([9, 8])
    tree.extend(tree.root, 4)
    tree.rollback(3)
    assert (tree.num_tokens, tree.node(tree.root).token) == (3, 9)
    tree.check_integrity()


def test_a_very_deep_chain_needs_no_recursion() -> None:
    tree = TokenTree([0])
    below = chain(tree, tree.root, *[1] * 5_000)
    assert tree.path(below[-1]) == below and tree.leaves() == [below[-1]]
    assert len(tree.commit([1] * 10).removed) == 10
    tree.check_integrity()
    assert len(tree.rollback(11)) == 4_990


@pytest.mark.parametrize("trouble", ["parent", "position", "token", "orphan", "missing", "root", "trunk", "loop", "id"])
def test_check_integrity_finds(trouble: str) -> None:
    tree = TokenTree([5, 6])
    first, below = chain(tree, tree.root, 1, 2)
    if trouble == "parent":
        tree.node(below).parent = tree.root
    elif trouble == "position":
        tree.node(below).position = 7
    elif trouble == "token":
        tree.node(below).token = 7
    elif trouble == "orphan":
        tree.node(first).children.clear()
    elif trouble == "missing":
        del tree._nodes[below]
    elif trouble == "root":
        tree.node(tree.root).parent = below
    elif trouble == "trunk":
        tree._trunk.append(7)
    elif trouble == "loop":
        tree.node(below).children[6] = tree.root
    else:
        tree._next_id = below
    with pytest.raises(TreeError, match=r"\d"):
        tree.check_integrity()


def test_a_prefix_is_hashed_by_its_tokens_whatever_became_of_them_on_the_way() -> None:
    """Drafted, committed as a hit or a miss, withdrawn and committed again: only which tokens they are counts."""
    assert extend_prefix(hash_prefix([5, 0]), 7) == hash_prefix([5, 0, 7]) == hash_prefix([0, 7], hash_prefix([5]))
    tree = TokenTree([5, 0])
    drafted = tree.extend(tree.extend(tree.root, 7), 8)
    assert tree.node(drafted).prefix == hash_prefix([5, 0, 7, 8])
    tree.commit([7])
    assert tree.node(tree.root).prefix == hash_prefix([5, 0, 7])
    tree.commit([8, 9, 1])
    assert tree.node(tree.root).prefix == hash_prefix([5, 0, 7, 8, 9, 1])
    tree.rollback(3)
    assert tree.node(tree.root).prefix == hash_prefix([5, 0, 7])
    assert len({hash_prefix(tokens) for tokens in ([], [0], [0, 0], [1], [0, 1], [1, 0])}) == 6


@given(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(0, 20))
def test_a_hash_can_be_shortened(tokens: list[int], count: int) -> None:
    kept = tokens[: max(0, len(tokens) - count)]
    withdrawn = tokens[len(kept) :]
    assert shorten_prefix(hash_prefix(tokens), reversed(withdrawn)) == hash_prefix(kept)
