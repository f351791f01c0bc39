"""The token tree of one request: what is committed, and the drafted continuations that hang below it.

Owns the tokens, the shape of the tree, and the walk that turns committed tokens into a hit or a miss. Owns neither KV
blocks (`kv_blocks`), nor the choice of what to draft next (`planner`), nor any model. Runs in the draft server process,
on the hot path: every call costs time in proportion to what it changes, never to the length of the trunk.

    trunk (committed)              below the root: drafted
    t0 t1 t2 ... t[n-1]=root --+-- a --- b --- c      position of the root: n - 1
                               |     +-- d            position of a and e:  n
                               +-- e
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm_specbranch.errors import TreeError

# Prefixes are hashed as polynomials modulo a Mersenne prime: one multiplication a token.
_PREFIX_MODULUS = 2**61 - 1
_PREFIX_BASE = 1_000_003 * 998_244_353
_PREFIX_INVERSE = pow(_PREFIX_BASE, -1, _PREFIX_MODULUS)

NO_LIMIT = 2**62


def extend_prefix(prefix: int, token: int) -> int:
    """The hash of a sequence of tokens, 0 for none, from that of all but the last; below 2**61."""
    return (prefix * _PREFIX_BASE + token + 1) % _PREFIX_MODULUS


def hash_prefix(tokens: Iterable[int], prefix: int = 0) -> int:
    """The hash of `tokens` after what `prefix` stands for."""
    for token in tokens:
        prefix = (prefix * _PREFIX_BASE + token + 1) % _PREFIX_MODULUS
    return prefix


def shorten_prefix(prefix: int, withdrawn: Iterable[int]) -> int:
    """The hash of a sequence without its last tokens; `withdrawn` names them, the very last first."""
    for token in withdrawn:
        prefix = (prefix - token - 1) * _PREFIX_INVERSE % _PREFIX_MODULUS
    return prefix


@dataclass(slots=True)
class Candidates:
    """The draft model's most likely next tokens after one node, best first.

    Attributes:
        token_ids: `[n]` token ids.
        probs: `[n]` their probabilities. For a greedy request these are shares of the whole softmax; for a sampled one they are the
            distribution that its drafts are drawn from, at its temperature, truncated to these tokens and renormalised.
    """

    token_ids: tuple[int, ...]
    probs: tuple[float, ...]


@dataclass(slots=True)
class Node:
    """One token of the tree. Callers set what comes after `children`; everything else is changed by `TokenTree` alone.

    Attributes:
        node_id: the tree's name for this node; never reused within a tree.
        token: the token id.
        position: 0-based index of the token in the whole sequence.
        prefix: hash of all tokens of the sequence up to this one (`extend_prefix`).
        parent: node id of the parent, None for the root.
        children: node id of each child by its token; in insertion order, which is the rank order.
        candidates: what the draft model says comes next; None until the node has been fed to it.
        choice: the token that drafting goes on with: the most likely one, or for a sampled request the one drawn. It depends on
            the tokens up to this node only; -1 until the node has been fed.
        score: what the stop rule compares with its threshold, 0..1.
        accepted: estimated chance that the target says `choice` after this node, 0..1.
        value: estimated chance that the target's tokens come by this node, 0..1.
        survival: of that, the part below the outcome that this node was drafted for.
        deepest: no token is drafted below this node beyond this position.
    """

    node_id: int
    token: int
    position: int
    prefix: int
    parent: int | None
    children: dict[int, int] = field(default_factory=dict)
    candidates: Candidates | None = None
    choice: int = -1
    score: float = 1.0
    accepted: float = 1.0
    value: float = 1.0
    survival: float = 1.0
    deepest: int = NO_LIMIT


@dataclass(frozen=True, slots=True)
class CommitResult:
    """What a commit did.

    Attributes:
        hit: the whole walk stayed in the tree.
        num_matched: how many of the committed tokens the walk matched.
        last_matched: node id of the deepest node the walk reached; the old root if it matched nothing. On a miss this
            node is among `removed`.
        removed: ids of the nodes that left the tree, with the old root and the walked path.
    """

    hit: bool
    num_matched: int
    last_matched: int
    removed: tuple[int, ...]


class TokenTree:
    """A trunk of committed tokens, and a tree of drafted ones rooted at the trunk's last token.

    Every method that raises leaves the tree as it was.
    """

    __slots__ = ("_next_id", "_nodes", "_root", "_trunk")

    def __init__(self, tokens: Sequence[int]) -> None:
        """Start a tree without drafted tokens.

        Args:
            tokens: `[num_tokens]` committed token ids, at least one.

        Raises:
            TreeError: there are no tokens.
        """
        if not tokens:
            raise TreeError("a token tree needs at least one committed token, got 0")
        self._trunk: list[int] = list(tokens)
        self._nodes: dict[int, Node] = {}
        self._next_id = 0
        self._root = self._plant_root(hash_prefix(tokens))

    def __len__(self) -> int:
        """The number of nodes, the root included."""
        return len(self._nodes)

    def __contains__(self, node_id: object) -> bool:
        """Whether a node id is in the tree."""
        return node_id in self._nodes

    @property
    def root(self) -> int:
        """Node id of the last committed token."""
        return self._root

    @property
    def trunk(self) -> Sequence[int]:
        """`[num_tokens]` committed token ids. A live view: read it, do not keep or change it."""
        return self._trunk

    @property
    def num_tokens(self) -> int:
        """The number of committed tokens."""
        return len(self._trunk)

    def node(self, node_id: int) -> Node:
        """The node with this id.

        Raises:
            TreeError: no such node.
        """
        try:
            return self._nodes[node_id]
        except KeyError:
            raise TreeError(f"node {node_id} is not in the tree of {len(self._nodes)} nodes") from None

    def extend(self, node_id: int, token: int) -> int:
        """Add a drafted token below a node, ranked after its siblings.

        Returns:
            The id of the new node.

        Raises:
            TreeError: no such node, or the token is already one of its children.
        """
        parent = self.node(node_id)
        if token in parent.children:
            raise TreeError(f"token {token} is already child {parent.children[token]} of node {node_id}")
        child_id = self._add(token, parent.position + 1, extend_prefix(parent.prefix, token), node_id)
        parent.children[token] = child_id
        return child_id

    def path(self, node_id: int) -> list[int]:
        """Node ids from just below the root down to `node_id`, both included; empty for the root.

        Raises:
            TreeError: no such node.
        """
        node = self.node(node_id)
        path: list[int] = []
        while node.parent is not None:
            path.append(node.node_id)
            node = self._nodes[node.parent]
        path.reverse()
        return path

    def leaves(self, under: int | None = None) -> list[int]:
        """Ids of the nodes without children, in rank order (depth first, best child first).

        Args:
            under: look only at this node and below it; the whole tree if None.

        Raises:
            TreeError: no such node.
        """
        start = self._root if under is None else self.node(under).node_id
        leaves: list[int] = []
        stack = [start]
        while stack:
            node = self._nodes[stack.pop()]
            if node.children:
                stack.extend(reversed(node.children.values()))
            else:
                leaves.append(node.node_id)
        return leaves

    def truncate_subtree(self, node_id: int) -> list[int]:
        """Prune a node and everything below it.

        Returns:
            The removed node ids, `node_id` first.

        Raises:
            TreeError: no such node, or it is the root.
        """
        node = self.node(node_id)
        if node.parent is None:
            raise TreeError(f"node {node_id} is the root, it can only be moved by commit or rollback")
        del self._nodes[node.parent].children[node.token]
        return self._remove([node_id])

    def commit(self, tokens: Sequence[int]) -> CommitResult:
        """Walk the tree along newly committed tokens (the design's section 2; SpecBranch, arXiv:2506.01979).

        On a hit the node reached becomes the root and keeps its id, its candidates, and all below it. On a miss the
        last token becomes a new root without children. Either way every other node leaves the tree.

        Args:
            tokens: `[num_committed]` token ids that follow the trunk, at least one.

        Raises:
            TreeError: there are no tokens.

        Mutates: the trunk grows by `tokens`.
        """
        if not tokens:
            raise TreeError("a commit needs at least one token, got 0")
        reached = self._nodes[self._root]
        num_matched = 0
        for token in tokens:
            child_id = reached.children.get(token)
            if child_id is None:
                break
            reached = self._nodes[child_id]
            num_matched += 1
        self._trunk.extend(tokens)
        hit = num_matched == len(tokens)
        removed = self._move_root(reached) if hit else self._replant(hash_prefix(tokens[num_matched:], reached.prefix))
        return CommitResult(hit, num_matched, reached.node_id, tuple(removed))

    def rollback(self, num_tokens: int) -> list[int]:
        """Withdraw committed tokens: keep only the first `num_tokens` of the trunk.

        With `num_tokens` equal to the trunk's length the root stays, with its id and its candidates, and only what is
        below it goes. With fewer the last token kept becomes a new root.

        Returns:
            The removed node ids.

        Raises:
            TreeError: `num_tokens` is not in [1, len(trunk)].
        """
        if not 1 <= num_tokens <= len(self._trunk):
            raise TreeError(f"cannot roll back to {num_tokens} tokens, the trunk has {len(self._trunk)}")
        if num_tokens < len(self._trunk):
            withdrawn = (self._trunk[index] for index in range(len(self._trunk) - 1, num_tokens - 1, -1))
            prefix = shorten_prefix(self._nodes[self._root].prefix, withdrawn)
            del self._trunk[num_tokens:]
            return self._replant(prefix)
        root = self._nodes[self._root]
        branches = list(root.children.values())
        root.children.clear()
        return self._remove(branches)

    def check_integrity(self) -> None:
        """Check every rule of the tree. For tests and idle moments: walks all nodes (not the trunk).

        Raises:
            TreeError: a rule is broken; the message gives the numbers.
        """
        root = self.node(self._root)
        if root.parent is not None or root.node_id != self._root:
            raise TreeError(f"root {self._root} is node {root.node_id} with parent {root.parent}")
        if (root.token, root.position) != (self._trunk[-1], len(self._trunk) - 1):
            raise TreeError(
                f"root is token {root.token} at position {root.position}, "
                f"the trunk ends in token {self._trunk[-1]} at position {len(self._trunk) - 1}"
            )
        num_reached = 0
        stack = [self._root]
        # The bound ends the walk if children form a loop.
        while stack and num_reached <= len(self._nodes):
            num_reached += 1
            node = self._nodes[stack.pop()]
            self._check_children(node)
            stack.extend(node.children.values())
        if num_reached != len(self._nodes):
            raise TreeError(f"{num_reached} nodes reached from the root != {len(self._nodes)} nodes held")

    def _check_children(self, node: Node) -> None:
        for token, child_id in node.children.items():
            child = self._nodes.get(child_id)
            if child is None:
                raise TreeError(f"node {node.node_id} has child {child_id}, which is not in the tree")
            expected = (child_id, token, node.position + 1, extend_prefix(node.prefix, token), node.node_id)
            found = (child.node_id, child.token, child.position, child.prefix, child.parent)
            if found != expected:
                raise TreeError(
                    f"child (id, token, position, prefix, parent) is {found}, its parent expects {expected}"
                )
            if child_id >= self._next_id:
                raise TreeError(f"node id {child_id} >= next id {self._next_id}")

    def _add(self, token: int, position: int, prefix: int, parent: int | None) -> int:
        node_id = self._next_id
        self._next_id += 1
        self._nodes[node_id] = Node(node_id, token, position, prefix, parent)
        return node_id

    def _plant_root(self, prefix: int) -> int:
        return self._add(self._trunk[-1], len(self._trunk) - 1, prefix, None)

    def _replant(self, prefix: int) -> list[int]:
        """Drop all nodes and make the trunk's last token the root. Returns the removed ids."""
        removed = list(self._nodes)
        self._nodes.clear()
        self._root = self._plant_root(prefix)
        return removed

    def _move_root(self, new_root: Node) -> list[int]:
        """Make a node below the root the new root: cut it off, then drop what is left. Returns the removed ids."""
        assert new_root.parent is not None, "a walk over one or more tokens ends below the root"
        del self._nodes[new_root.parent].children[new_root.token]
        new_root.parent = None
        old_root = self._root
        self._root = new_root.node_id
        return self._remove([old_root])

    def _remove(self, stack: list[int]) -> list[int]:
        """Remove these nodes and all below them; their parents must not point to them any more. Empties `stack`."""
        removed: list[int] = []
        while stack:
            node = self._nodes.pop(stack.pop())
            removed.append(node.node_id)
            stack.extend(node.children.values())
        return removed
