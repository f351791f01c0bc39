"""Where a policy forks: for which outcomes of the verification under way something is drafted ahead.

An outcome is (a, y): a draft tokens accepted, then the target's own token y. It is drafted for by a fork: a child y of the node
after a draft tokens, and the draft's choices below it. Pure decisions on a token tree. Owns no state; the acceptance estimates are
the planner's. Draft server process.

    pearl, specbranch   candidates at the end of the chunk only (arXiv:2408.11850; arXiv:2506.01979, section 5)
    fanout              candidates at every position, their number falling geometrically (SSD, arXiv:2603.03251)
    best_first          the likeliest outcomes wherever they are, up to a budget
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_specbranch.acceptance import MAX_RANKS, AcceptanceModel
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.token_tree import Node, TokenTree

# SSD's power law: the miss rate falls as fan-out^-r.
FANOUT_EXPONENT = 1.0
# An outcome less likely than this is not worth a KV sequence.
MIN_VALUE = 0.003


def num_ranks(config: SpecBranchConfig) -> int:
    """How many candidates of a node a policy looks at. Forks inside a chunk are many, but hardly any of a high rank."""
    if config.policy in ("pearl", "specbranch"):
        return config.max_branches
    return min(config.max_branches + 1, MAX_RANKS)  # Inside a chunk one of them is the draft token itself.


@dataclass(frozen=True, slots=True)
class Fork:
    """A token to add below a node of the chunk; `value` is the chance of that outcome."""

    node_id: int
    token: int
    value: float


class Branching:
    """Forks of one engine's policy.

    Args:
        config: policy and numbers of branches.
        acceptance: the estimates; only read.
    """

    def __init__(self, config: SpecBranchConfig, acceptance: AcceptanceModel) -> None:
        self._policy = config.policy
        self._max_branches = config.max_branches
        self._is_fixed = config.branch_rule == "fixed"
        self._max_chunk = config.num_speculative_tokens
        self._acceptance = acceptance
        self._most = num_ranks(config)

    def num_branches(self, confidence: float) -> int:
        """k = max(1, floor(k_max (1 - q))), arXiv:2506.01979 section 5; k_max with the fixed rule.

        Args:
            confidence: the draft's top probability at the branch point, 0..1.
        """
        return self._max_branches if self._is_fixed else max(1, int(self._max_branches * (1.0 - confidence)))

    def revalue(self, tree: TokenTree, end: int, *, is_sampled: bool) -> None:
        """Estimate anew how likely each node is to be reached, now that the chunk from the root to `end` is verified.

        Mutates: `value`, `survival` and `deepest` of all nodes.
        """
        on_chunk = {tree.root, *tree.path(end)}
        root = tree.node(tree.root)
        root.value = root.survival = 1.0
        root.deepest = self._deepest(root)
        stack = [tree.root]
        while stack:
            node = tree.node(stack.pop())
            chances = self._chances(node, end, is_sampled=is_sampled) if node.children else {}
            for token, child_id in node.children.items():
                child = tree.node(child_id)
                chance = chances.get(token, 0.0)
                if is_sampled and node.node_id not in on_chunk:
                    chance = float(token == node.choice)
                child.value = node.value * chance
                is_fork = node.node_id in on_chunk and child_id not in on_chunk
                child.survival = 1.0 if is_fork else node.survival * chance
                child.deepest = self._deepest(node) if is_fork or child_id in on_chunk else node.deepest
                stack.append(child_id)

    def _deepest(self, parent: Node) -> int:
        """A branch is drafted until a full chunk is ready below its first token."""
        return parent.position + 1 + self._max_chunk

    def _chances(self, node: Node, end: int, *, is_sampled: bool) -> dict[int, float]:
        """The chance of each child's token to be the target's, given that the node is reached."""
        assert node.candidates is not None
        is_inside = node.node_id != end
        outcomes = self._acceptance.outcomes(
            node.candidates, is_sampled=is_sampled, is_inside=is_inside, most=self._most
        )
        chances = dict(zip(node.candidates.token_ids, outcomes, strict=False))
        if is_inside:
            chances[node.choice] = node.accepted
        return chances

    def grow_fork(self, tree: TokenTree, fork: Fork, child_id: int) -> None:
        """Mark a fork's node, which has just been added."""
        child = tree.node(child_id)
        child.value, child.survival, child.deepest = fork.value, 1.0, self._deepest(tree.node(fork.node_id))

    def grow_chunk(self, tree: TokenTree, child_id: int) -> None:
        """Mark a node that makes the coming chunk longer, which has just been added."""
        tree.node(child_id).deepest = self._deepest(tree.node(tree.root))

    def extensions(self, tree: TokenTree, end: int, *, is_sampled: bool, price: float = 0.0) -> list[tuple[int, int]]:
        """Fed leaves off the chunk that get their choice appended now, as (leaf, token); best first below each node.

        How far a branch of a sampled request grows must not depend on what is drawn in it: when KV blocks run short it is dropped
        with what was drawn, and whether they run short depends on its length (rule 2 of the design, section 3).

        Args:
            price: no token of a greedy request is drafted that is less likely to be accepted, once its outcome has come (see
                `Planner.chunk`).
        """
        found = []
        for leaf in tree.leaves():
            node = tree.node(leaf)
            if leaf == end or node.candidates is None or node.position >= node.deepest:
                continue
            if is_sampled or node.survival * node.accepted >= price:
                found.append((leaf, node.choice))
        return found

    def grow_extension(self, tree: TokenTree, leaf: int, child_id: int, *, is_sampled: bool) -> None:
        """Mark the node of an extension, which has just been added. In a branch of a sampled request all are worth the same."""
        node, child = tree.node(leaf), tree.node(child_id)
        chance = 1.0 if is_sampled else node.accepted
        child.value, child.survival = node.value * chance, node.survival * chance
        child.deepest = node.deepest

    def forks(self, tree: TokenTree, end: int, *, is_sampled: bool, most: int | None = None) -> list[Fork]:
        """What to fork now, beyond what is there.

        Never by a look at a drawn token: the target's token is looked up among the likeliest candidates.

        Args:
            end: where the chunk under verification ends.
            most: so many candidates at its end and none elsewhere, whatever the policy wants.
        """
        if most is not None or self._policy in ("pearl", "specbranch"):
            return self._forks_at_the_end(tree, end, most, is_sampled=is_sampled)
        if self._policy == "fanout":
            return self._forks_by_position(tree, end, is_sampled=is_sampled)
        return self._likeliest_forks(tree, end, is_sampled=is_sampled)

    def _options(self, tree: TokenTree, node_id: int, end: int, *, is_sampled: bool) -> Iterator[Fork]:
        """The candidates at one node of the chunk, the likeliest first as the draft has it."""
        node = tree.node(node_id)
        if node.candidates is None:
            return
        is_inside = node_id != end
        chances = self._acceptance.outcomes(
            node.candidates, is_sampled=is_sampled, is_inside=is_inside, most=self._most
        )
        for token, chance in zip(node.candidates.token_ids, chances, strict=False):
            if not (is_inside and token == node.choice):
                yield Fork(node_id, token, node.value * chance)

    def _forks_at_the_end(self, tree: TokenTree, end: int, most: int | None, *, is_sampled: bool) -> list[Fork]:
        node = tree.node(end)
        if node.candidates is None:
            return []
        count = self.num_branches(node.candidates.probs[0]) if most is None else most
        options = list(self._options(tree, end, end, is_sampled=is_sampled))[:count]
        return [fork for fork in options if fork.token not in node.children]

    def _forks_by_position(self, tree: TokenTree, end: int, *, is_sampled: bool) -> list[Fork]:
        """k_i proportional to alpha^(i / (1 + r)) at position i of the chunk, all together about `max_branches`."""
        path = [tree.root, *tree.path(end)]
        ratio = self._acceptance.mean ** (1.0 / (1.0 + FANOUT_EXPONENT))
        weights = [ratio**index for index in range(len(path))]
        found = []
        for node_id, weight in zip(path, weights, strict=True):
            count = max(1, round(self._max_branches * weight / sum(weights)))
            options = list(self._options(tree, node_id, end, is_sampled=is_sampled))[:count]
            found += [fork for fork in options if fork.token not in tree.node(node_id).children]
        return found

    def _likeliest_forks(self, tree: TokenTree, end: int, *, is_sampled: bool) -> list[Fork]:
        """The outcomes of highest probability, `max_branches` with those that are there; better ones come on top."""
        path = [tree.root, *tree.path(end)]
        options: list[Fork] = []
        known: list[float] = []
        for node_id in path:
            children = tree.node(node_id).children
            for fork in self._options(tree, node_id, end, is_sampled=is_sampled):
                if fork.token in children:
                    known.append(fork.value)
                elif fork.value >= MIN_VALUE:
                    options.append(fork)
        values = sorted([*known, *(fork.value for fork in options)], reverse=True)
        least = values[self._max_branches - 1] if len(values) > self._max_branches else 0.0
        return sorted((fork for fork in options if fork.value >= least), key=lambda fork: -fork.value)
