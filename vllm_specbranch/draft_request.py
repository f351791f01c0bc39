"""One request on the draft server: its token tree, and which leaf owns which KV sequence.

Owns the invariant that ties the two together: every leaf of the tree owns exactly one sequence of the shared `KVBlocks`, whose
valid tokens are the leaf's path without (at least) the leaf itself; an evicted request owns none. Decides nothing: the planner
does. Pure Python, runs in the draft server process.

    trunk: t0 t1 ... tn | chunk: d1 d2 | branches: b1 c1 ...      leaf c1 owns sequence 7 (KV of t0 .. b1)
                    root           ^ branch point  b2             leaf b2 owns sequence 9 (KV of t0 .. d2, blocks shared)
"""

from array import array
from collections.abc import Iterator, Sequence

from vllm_specbranch.draft_sampling import RandomNumber, draw, uniform
from vllm_specbranch.errors import TreeError
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks
from vllm_specbranch.messages import Draft, Sampling
from vllm_specbranch.metrics import DraftServerCounters
from vllm_specbranch.online_head import Example
from vllm_specbranch.planner import Planner
from vllm_specbranch.token_tree import Candidates, CommitResult, TokenTree


class DraftRequest:
    """Token tree and KV sequences of one request.

    Args:
        tokens: the committed tokens so far (the prompt, or the whole history after a restart); at least one.
        kv: the block pool, shared by all requests of the server.
        planner: the policy, with what has been learned of its engine's target.
        sequence_ids: gives a fresh sequence id at each `next`; shared likewise.
        sampling: how its drafts are drawn; None for greedy ones.
        random_number: gives the number of a random stream for (key, hash of the prefix).
    """

    def __init__(
        self,
        tokens: Sequence[int],
        kv: KVBlocks,
        planner: Planner,
        sequence_ids: Iterator[int],
        sampling: Sampling | None = None,
        random_number: RandomNumber = uniform,
    ) -> None:
        self.tree = TokenTree(tokens)
        self.planner = planner
        self.sampling = sampling
        # Least chance of acceptance that is worth a token's verification, as things stand (see `Planner.chunk`).
        self.price = 0.0
        # What the length head says of the next chunk (see `Planner.chunk`); as of the last commit.
        self.length_class: int | None = None
        # Whether the head that is learned while serving says it instead, and what that head waits to learn from this request.
        self.asks_online_head = False
        self.examples: list[Example] = []
        # Gave its drafted KV back; until its next commit nothing more is drafted for it.
        self.is_shortened = False
        # The engine that it belongs to, and that engine's counters.
        self.engine = b""
        self.counters = DraftServerCounters()
        self._random_number = random_number
        self._kv = kv
        self._sequence_ids = sequence_ids
        self._owned: dict[int, int] = {}
        self.chunk_end = self.tree.root
        self.readmit()

    @property
    def is_evicted(self) -> bool:
        """Whether it holds no KV."""
        return not self._owned

    @property
    def is_resting(self) -> bool:
        """Whether it waits for its next commit with what it has, because KV blocks ran short."""
        return self.is_shortened or not self._owned

    @property
    def num_sequences(self) -> int:
        """KV sequences it owns, one per leaf."""
        return len(self._owned)

    def readmit(self) -> None:
        """Give an evicted request an empty sequence again; its trunk and the chain below it are then pending as a whole."""
        if self._owned:
            return
        sequence = next(self._sequence_ids)
        self._kv.allocate(sequence)
        (leaf,) = self.tree.leaves()
        self._owned[leaf] = sequence

    def block_ids(self) -> set[int]:
        """The KV blocks that it holds, those that its branches share once."""
        return {block for sequence in self._owned.values() for block in self._kv.block_ids(sequence)}

    @property
    def num_blocks(self) -> int:
        """How many KV blocks it holds."""
        if len(self._owned) > 1:
            return len(self.block_ids())
        return sum(-(-self._kv.num_tokens(sequence) // self._kv.block_size) for sequence in self._owned.values())

    def sequence(self, leaf: int) -> int:
        """The KV sequence of a leaf."""
        return self._owned[leaf]

    @property
    def num_unread(self) -> int:
        """How many of its committed tokens have no KV yet; 0 for one that holds none at all."""
        return max(0, self.tree.num_tokens - max((self._kv.num_tokens(one) for one in self._owned.values()), default=0))

    def num_pending(self, leaf: int) -> int:
        """How many tokens, up to and with the leaf's, have no KV yet; 0 when the leaf has been fed."""
        return self.tree.node(leaf).position + 1 - self._kv.num_tokens(self._owned[leaf])

    def is_complete(self, leaf: int, sequence: int) -> bool:
        """Whether a leaf that was to be fed through a KV sequence still has that one, and all its tokens have KV."""
        return self._owned.get(leaf) == sequence and not self.num_pending(leaf)

    def has_kv(self, node_id: int) -> bool:
        """Whether a node has its KV, so that it can be forked at; after an eviction it lacks it until the chain is fed again."""
        leaf = node = self.tree.node(node_id)
        while leaf.children:
            leaf = self.tree.node(next(iter(leaf.children.values())))
        return self._kv.num_tokens(self._owned[leaf.node_id]) > node.position

    def pending(self, leaf: int, most: int) -> tuple[int, list[int]]:
        """The next tokens to feed on the way to a leaf.

        Args:
            leaf: a leaf of the tree.
            most: most tokens to return.

        Returns:
            (absolute position of the first one, token ids).
        """
        start = self._kv.num_tokens(self._owned[leaf])
        count = min(most, self.num_pending(leaf))
        num_trunk = self.tree.num_tokens
        tokens = list(self.tree.trunk[start : start + count]) if start < num_trunk else []
        if len(tokens) < count:
            path = self.tree.path(leaf)
            first = max(0, start - num_trunk)
            tokens += [self.tree.node(one).token for one in path[first : first + count - len(tokens)]]
        return start, tokens

    def reserve(self, leaf: int, num_tokens: int) -> list[BlockCopy]:
        """Reserve slots for the next `num_tokens` on the way to a leaf; returns the copies to do before they are written.

        Raises:
            OutOfBlocksError: nothing was changed.
        """
        return self._kv.append(self._owned[leaf], num_tokens)

    @property
    def is_sampled(self) -> bool:
        """Whether its drafts are drawn."""
        return self.sampling is not None

    def fed(self, leaf: int, candidates: Candidates, score: float, accepted: float) -> None:
        """Note what the draft model predicts after a leaf, all of whose tokens have KV now, and choose the token to go on with.

        Args:
            candidates: for a sampled request, the distribution to draw from.
            score: for the stop rule.
            accepted: estimated chance that the token chosen is accepted.
        """
        node = self.tree.node(leaf)
        node.candidates, node.score, node.accepted = candidates, score, accepted
        index = 0
        if self.sampling is not None:
            # The same number at every draw after this prefix: a token once drawn there is never drawn anew.
            index = draw(candidates.probs, self._random_number(self.sampling.key, node.prefix))
        node.choice = candidates.token_ids[index]

    def draft(self, request_id: str, hit: bool, end: int | None = None, *, with_top_probs: bool = False) -> Draft:
        """The chunk that ends at a node (`chunk_end` if None), as it goes to the engine."""
        end = self.chunk_end if end is None else end
        tokens = [self.tree.node(one).token for one in self.tree.path(end)]
        top_probs = self._top_probs(end) if with_top_probs else []
        return Draft(request_id, self.tree.num_tokens, tokens, hit, *self._distributions(end), top_probs)

    def _top_probs(self, end: int) -> list[float]:
        """The draft's top probability where each token of the chunk that ends at `end` was chosen."""
        fed = [self.tree.node(one).candidates for one in (self.tree.root, *self.tree.path(end)[:-1])]
        # Rounding may lift a sum of shares over 1, which the wire refuses.
        return [min(1.0, one.probs[0]) for one in fed if one is not None] if end != self.tree.root else []

    def _distributions(self, end: int) -> tuple[bytes, bytes]:
        """What the tokens of the chunk that ends at `end` were drawn from, as `Draft` carries it; empty for greedy drafts."""
        if self.sampling is None:
            return b"", b""
        ids, probs = array("i"), array("f")
        node = self.tree.node(self.tree.root)
        for node_id in self.tree.path(end):
            assert node.candidates is not None and node.choice == self.tree.node(node_id).token
            ids.extend(node.candidates.token_ids)
            probs.extend(node.candidates.probs)
            node = self.tree.node(node_id)
        return ids.tobytes(), probs.tobytes()

    def extend(self, node_id: int, token: int) -> int:
        """Add a drafted token below a node that has been fed.

        Below a leaf it takes the leaf's sequence over; elsewhere it forks one that passes through the node.

        Returns:
            The new leaf.
        """
        node = self.tree.node(node_id)
        if node.candidates is None:
            raise TreeError(f"node {node_id} has not been fed, so nothing can be drafted below it")
        sequence = self._owned.get(node_id)
        if sequence is None:
            through = self._owned[self.tree.leaves(node_id)[0]]
            child = self.tree.extend(node_id, token)
            sequence = next(self._sequence_ids)
            self._kv.fork(through, sequence, node.position + 1)
        else:
            child = self.tree.extend(node_id, token)
            del self._owned[node_id]
        self._owned[child] = sequence
        return child

    def commit(self, position: int, tokens: Sequence[int]) -> CommitResult | None:
        """Walk committed tokens; keep the survivors' KV and free all other in the same call.

        Args:
            position: absolute position of `tokens[0]`. Inside the trunk, the trunk is first truncated to it (tokens were
                withdrawn); beyond its end, tokens are missing.
            tokens: at least one.

        Returns:
            What the walk found, or None if tokens are missing before `position` (nothing was changed).
        """
        if not 1 <= position <= self.tree.num_tokens:
            return None
        if position < self.tree.num_tokens:
            self.rollback(position)
        keeper = self._leaf_on_the_way(tokens)
        result = self.tree.commit(tokens)
        kept_sequence = None if keeper is None else self._owned[keeper]
        losers = [self._owned.pop(one) for one in result.removed if one in self._owned]
        if not result.hit and kept_sequence is not None:
            losers.remove(kept_sequence)
            self._owned[self.tree.root] = kept_sequence
            shared = position + result.num_matched
            self._kv.rollback(kept_sequence, min(shared, self._kv.num_tokens(kept_sequence)))
        if kept_sequence is not None:
            self._kv.commit(kept_sequence, losers)
        self.chunk_end = self.tree.root
        self.is_shortened = False
        return result

    def _leaf_on_the_way(self, tokens: Sequence[int]) -> int | None:
        """A leaf whose KV reaches as far as any along `tokens`; None for an evicted request."""
        if not self._owned:
            return None
        reached = self.tree.root
        for token in tokens:
            child = self.tree.node(reached).children.get(token)
            if child is None:
                break
            reached = child
        return self.tree.leaves(reached)[0]

    def rollback(self, num_tokens: int) -> None:
        """Shorten the trunk to `num_tokens` committed tokens; all drafts are dropped."""
        sequences = list(self._owned.values())
        self._owned.clear()
        self.tree.rollback(num_tokens)
        self.chunk_end = self.tree.root
        if sequences:
            self._owned[self.tree.root] = sequences[0]
            self._kv.rollback(sequences[0], min(num_tokens - 1, self._kv.num_tokens(sequences[0])))
            self._kv.commit(sequences[0], sequences[1:])

    def prune(self, node_id: int) -> None:
        """Drop a drafted node and all below it, with its KV; the root cannot be dropped."""
        parent = self.tree.node(node_id).parent
        removed = self.tree.truncate_subtree(node_id)
        assert parent is not None
        sequences = [self._owned.pop(one) for one in removed if one in self._owned]
        if not self.tree.node(parent).children and sequences:
            self._owned[parent] = sequences.pop(0)
            self._kv.rollback(self._owned[parent], self.tree.node(parent).position + 1)
        for sequence in sequences:
            self._kv.free(sequence)

    def narrow(self) -> int:
        """Drop every child but one at each node, the chosen one where there is one; returns how many branches went."""
        dropped = 0
        node = self.tree.node(self.tree.root)
        while node.children:
            kept = node.children.get(node.choice, next(iter(node.children.values())))
            others = [child for child in node.children.values() if child != kept]
            for other in others:
                self.prune(other)
            dropped += len(others)
            node = self.tree.node(kept)
        return dropped

    @property
    def num_drafted_blocks(self) -> int:
        """How many KV blocks of a narrowed request hold drafted tokens only: what `shorten` would free."""
        if len(self._owned) != 1:
            return 0
        (sequence,) = self._owned.values()
        size, num_kept = self._kv.block_size, self.tree.num_tokens
        return max(0, -(-self._kv.num_tokens(sequence) // size) - -(-num_kept // size))

    def shorten(self) -> None:
        """Free the KV of what has been drafted, and rest until the next commit. For a narrowed request.

        The trunk keeps its KV, and the chain its tokens, for the reason that `evict` gives: one short row feeds it again.
        """
        (sequence,) = self._owned.values()
        if self._kv.num_tokens(sequence) > self.tree.num_tokens:
            self._kv.rollback(sequence, self.tree.num_tokens)
            self._owned = {self._cut_to_the_chain(): sequence}
        self.is_shortened = True

    def evict(self) -> None:
        """Free all KV, and drop all drafts but the chain of chosen tokens; its KV is computed again after `readmit`.

        The chain stays because it has been drawn: how much KV it takes depends on its tokens, and so then does the eviction. Were
        it dropped, or cut, whether a token is submitted would depend on that token (rule 2 of the design, section 3).
        """
        for sequence in self._owned.values():
            self._kv.free(sequence)
        self._owned.clear()
        self._cut_to_the_chain()
        self.chunk_end = self.tree.root

    def _cut_to_the_chain(self) -> int:
        """Drop all drafts but the chain of chosen tokens; returns its end, which has not been fed. Leaves the KV to the caller."""
        node = self.tree.node(self.tree.root)
        while node.candidates is not None:
            for token, child in list(node.children.items()):
                if token != node.choice:
                    self.tree.truncate_subtree(child)
            kept = node.children.get(node.choice)
            deepest = node.deepest
            node = self.tree.node(self.tree.extend(node.node_id, node.choice) if kept is None else kept)
            if kept is None:
                node.deepest = deepest
        return node.node_id

    def check_integrity(self) -> None:
        """Raise TreeError unless exactly the leaves own sequences, each valid no further than its leaf."""
        self.tree.check_integrity()
        if not self._owned:
            return
        if set(self._owned) != set(self.tree.leaves()):
            raise TreeError(f"sequences are owned by {sorted(self._owned)}, leaves are {sorted(self.tree.leaves())}")
        for leaf, sequence in self._owned.items():
            valid, end = self._kv.num_tokens(sequence), self.tree.node(leaf).position + 1
            fed = self.tree.node(leaf).candidates is not None
            if not (valid == end if fed else valid < end):
                raise TreeError(f"leaf {leaf} (fed: {fed}) at position {end - 1} has KV of {valid} tokens")
