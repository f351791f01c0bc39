"""Random operations on a token tree, beside a model made of plain tuples."""

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.strategies import NUM_SMALL_TOKENS, candidates, pick, picks, small_tokens, tails, token_lists
from vllm_specbranch.errors import TreeError
from vllm_specbranch.token_tree import Candidates, TokenTree

MAX_NODES = 40
MIN_STEPS = 50_000
UNKNOWN_NODE = 10**9

Tokens = tuple[int, ...]

num_steps = 0


class TreeMachine(RuleBasedStateMachine):
    """Runs a tree beside a model: the trunk as a list, the drafted part as a dict from token path to node id.

    Every path of the model starts below the root; the root itself is the empty path.
    """

    @initialize(tokens=token_lists())
    def start(self, tokens: Tokens) -> None:
        global num_steps
        num_steps -= 1  # the invariant counts this too, and it is not a rule
        self.begin(tokens)

    def begin(self, tokens: Tokens) -> None:
        """A new request: a fresh tree and a fresh model of it."""
        self.tree = TokenTree(tokens)
        self.trunk = list(tokens)
        self.ids: dict[Tokens, int] = {(): self.tree.root}
        self.seen = {self.tree.root}
        self.fed: dict[int, Candidates] = {}

    def remember(self, path: Tokens, node_id: int) -> None:
        """Note a node that is new in the tree."""
        assert node_id not in self.seen, f"node id {node_id} was used before"
        self.seen.add(node_id)
        self.ids[path] = node_id

    def forget(self, paths: list[Tokens], removed: list[int]) -> None:
        """Note that nodes left the tree, and check that the tree said so."""
        assert sorted(removed) == sorted(self.ids.pop(path) for path in paths)
        for node_id in removed:
            assert node_id not in self.tree
            self.fed.pop(node_id, None)

    def apply_commit(self, tokens: Tokens) -> None:
        """Commit to the tree and to the model."""
        reached = max((path for path in self.ids if path == tokens[: len(path)]), key=len)
        last_matched = self.ids[reached]
        result = self.tree.commit(tokens)
        assert (result.hit, result.num_matched) == (reached == tokens, len(reached))
        assert result.last_matched == last_matched
        self.trunk += tokens
        self.forget([path for path in self.ids if path[: len(tokens)] != tokens], list(result.removed))
        self.ids = {path[len(tokens) :]: node_id for path, node_id in self.ids.items()}
        if not result.hit:
            self.remember((), self.tree.root)

    def grow(self, path: Tokens, token: int) -> None:
        """Extend the tree and the model, unless the token is there."""
        if (*path, token) not in self.ids:
            self.remember((*path, token), self.tree.extend(self.ids[path], token))

    # Hypothesis switches rules off at random, run by run, so that many runs are without one that adds something, and
    # drops a run in which no rule is allowed. So no rule has a precondition, and those that take away first see to it
    # that there is something to take.

    def have_branches(self, number: int) -> None:
        """Draft something if (nearly) nothing is drafted."""
        if len(self.ids) < 4:
            for shift in range(6):
                self.grow(pick(number >> shift, list(self.ids)), number * (shift + 1) % NUM_SMALL_TOKENS)

    def make_room(self) -> None:
        """Drop what is below the root if the tree is full."""
        if len(self.ids) >= MAX_NODES:
            self.roll_back_by(0)

    @rule(where=picks(), token=small_tokens())
    def extend(self, where: int, token: int) -> None:
        self.make_room()
        path = pick(where, list(self.ids))
        if (*path, token) in self.ids:
            with pytest.raises(TreeError):
                self.tree.extend(self.ids[path], token)
        else:
            self.remember((*path, token), self.tree.extend(self.ids[path], token))

    @rule(where=picks(), tokens=token_lists(max_size=3))
    def fork(self, where: int, tokens: Tokens) -> None:
        """Several candidates at one branch point."""
        self.make_room()
        path = pick(where, list(self.ids))
        for token in tokens:
            self.grow(path, token)

    @rule(token=small_tokens())
    def draft_one_step(self, token: int) -> None:
        """One batched draft step: a token below every leaf."""
        self.make_room()
        paths = {node_id: path for path, node_id in self.ids.items()}
        for leaf in self.tree.leaves():
            self.remember((*paths[leaf], token), self.tree.extend(leaf, token))

    @rule(where=picks(), proposals=candidates())
    def feed(self, where: int, proposals: Candidates) -> None:
        node_id = pick(where, list(self.ids.values()))
        self.tree.node(node_id).candidates = proposals
        self.fed[node_id] = proposals

    @rule(where=picks(), depth=st.integers(0, 3), tail=tails())
    def commit(self, where: int, depth: int, tail: Tokens) -> None:
        """What a round of the target ends in: some of the drafted tokens, and perhaps some of its own."""
        self.have_branches(where)
        tokens = pick(where, list(self.ids))[:depth] + tail
        self.apply_commit(tokens or (0,))

    @rule(where=picks(), back=st.integers(0, 3))
    def rollback(self, where: int, back: int) -> None:
        self.have_branches(where)
        self.roll_back_by(back)

    def roll_back_by(self, back: int) -> None:
        """Withdraw the last `back` tokens of the trunk, from the tree and from the model."""
        num_tokens = max(1, len(self.trunk) - back)
        keeps_root = num_tokens == len(self.trunk)
        removed = self.tree.rollback(num_tokens)
        del self.trunk[num_tokens:]
        self.forget([path for path in self.ids if path or not keeps_root], removed)
        if not keeps_root:
            self.remember((), self.tree.root)

    @rule(where=picks())
    def truncate(self, where: int) -> None:
        self.have_branches(where)
        pruned = pick(where, [path for path in self.ids if path])
        removed = self.tree.truncate_subtree(self.ids[pruned])
        self.forget([path for path in self.ids if path[: len(pruned)] == pruned], removed)

    @rule(tokens=token_lists())
    def evict(self, tokens: Tokens) -> None:
        """The request is dropped and comes back with its whole trunk, then drafts anew."""
        self.begin((*self.trunk[-3:], *tokens))

    @rule(where=picks(), what=st.integers(0, 4))
    def misuse(self, where: int, what: int) -> None:
        gone = pick(where, [*sorted(self.seen - set(self.ids.values())), UNKNOWN_NODE])
        with pytest.raises(TreeError):
            if what == 0:
                self.tree.extend(gone, 0)
            elif what == 1:
                self.tree.truncate_subtree(pick(where, [gone, self.tree.root]))
            elif what == 2:
                self.tree.rollback(pick(where, [0, len(self.trunk) + 1]))
            elif what == 3:
                self.tree.commit([])
            else:
                calls: list[Callable[[int], object]] = [self.tree.path, self.tree.leaves, self.tree.node]
                pick(where, calls)(gone)

    @invariant()
    def tree_equals_model(self) -> None:
        global num_steps
        num_steps += 1
        tree, ids = self.tree, self.ids
        tree.check_integrity()
        assert (list(tree.trunk), tree.num_tokens) == (self.trunk, len(self.trunk))
        assert (len(tree), tree.root) == (len(ids), ids[()])
        parents = {path[:-1] for path in ids if path}
        bare = [path for path in ids if path not in parents]
        # Ids rise, so rank order (insertion order) is id order, level by level.
        bare.sort(key=lambda path: [ids[path[:depth]] for depth in range(len(path) + 1)])
        assert tree.leaves() == [ids[path] for path in bare]
        for path, node_id in ids.items():
            node = tree.node(node_id)
            assert node.position == len(self.trunk) - 1 + len(path)
            assert node.candidates == self.fed.get(node_id)
            assert list(node.children.values()) == sorted(node.children.values())

    @rule(where=picks())
    def look(self, where: int) -> None:
        self.have_branches(where)
        path = pick(where, list(self.ids))
        node_ids = self.tree.path(self.ids[path])
        assert node_ids == [self.ids[path[:depth]] for depth in range(1, len(path) + 1)]
        assert [self.tree.node(node_id).token for node_id in node_ids] == list(path)
        below = {node_id for other, node_id in self.ids.items() if other[: len(path)] == path}
        assert self.tree.leaves(self.ids[path]) == [node_id for node_id in self.tree.leaves() if node_id in below]


@pytest.mark.timeout(300)
@pytest.mark.steps
def test_random_operations_keep_the_tree_equal_to_the_model() -> None:
    steps_before = num_steps
    limits = settings(max_examples=605, stateful_step_count=100, deadline=None, derandomize=False)
    run_state_machine_as_test(TreeMachine, settings=limits)
    assert num_steps - steps_before >= MIN_STEPS
