"""A length head without a file: it learns while serving how far the next draft is accepted, from the draft's own confidences.

Owns what it has learned. Decides nothing about when it is used (`benefit_gate`). Pure Python, draft server process.

A class is a function of what rule 2 of the design (section 3) allows: for a sampled request of the distribution at the root, before
anything is drawn from it; for a greedy one of the whole chain, as far as it has been drafted. What has been learned comes from
tokens already committed. Differs from arXiv:2506.01979, whose head is trained offline on features of the target.

Labels are those of section 5 of the design: how many tokens of an uncut chain of gamma tokens the target accepts, if that is known.
    greedy   the target's tokens are compared with the draft's choice after each, submitted or not, over as many rounds as it takes
    sampled  what has not been verified cannot be known: only the chunk that was submitted counts, and a chunk that was cut and
             accepted says no more than that it was not rejected at once
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specbranch.token_tree import Candidates, TokenTree

LEARNING_RATE = 0.05
# Labels of one kind of request, greedy or sampled, before it is given classes.
WARM_UP_LABELS = 64
# A class that changes the chunk must be likelier than not.
LEAST_CHANCE = 0.5
# Surprise in nats beyond which a token is just unlikely.
MOST_SURPRISE = 4.0


class _Chance:
    """The chance of an event by logistic regression, one gradient step per label."""

    def __init__(self) -> None:
        self._weights: list[float] = []

    def of(self, features: Sequence[float]) -> float:
        """0..1; 1/2 before anything was seen."""
        if not self._weights:
            return 0.5
        score = sum(weight * one for weight, one in zip(self._weights, features, strict=True))
        return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, score))))

    def learn(self, features: Sequence[float], happened: bool) -> None:
        """Take in one outcome."""
        step = LEARNING_RATE * (happened - self.of(features))
        weights = self._weights or [0.0] * len(features)
        self._weights = [weight + step * one for weight, one in zip(weights, features, strict=True)]


@dataclass(frozen=True, slots=True)
class Example:
    """A chain whose acceptance is not known yet: position of the root that it hangs below, and what was known of it there."""

    position: int
    features: tuple[float, ...]


class OnlineHead:
    """See the top of this file.

    Args:
        max_chunk: gamma, the length of an uncut chain.
    """

    def __init__(self, max_chunk: int) -> None:
        self._max_chunk = max_chunk
        self._none = {False: _Chance(), True: _Chance()}
        self._all = {False: _Chance(), True: _Chance()}
        self._num_labels = {False: 0, True: 0}

    @property
    def is_ready(self) -> bool:
        """Whether any kind of request has seen enough for classes."""
        return max(self._num_labels.values()) >= WARM_UP_LABELS

    def length_class(self, tree: TokenTree, *, is_sampled: bool) -> int | None:
        """0, 1 or 2 as in `Planner.chunk`; None while nothing can be said."""
        if self._num_labels[is_sampled] < WARM_UP_LABELS:
            return None
        features = self._features(tree, is_sampled=is_sampled)
        if features is None:
            return None
        if self._none[is_sampled].of(features) > LEAST_CHANCE:
            return 0
        return 2 if self._all[is_sampled].of(features) > LEAST_CHANCE else 1

    def example(self, tree: TokenTree, *, is_sampled: bool) -> Example | None:
        """What is known when a chunk is submitted; None if that is nothing."""
        features = self._features(tree, is_sampled=is_sampled)
        return None if features is None else Example(tree.num_tokens - 1, features)

    def _features(self, tree: TokenTree, *, is_sampled: bool) -> tuple[float, ...] | None:
        root = tree.node(tree.root)
        if root.candidates is None:
            return None
        first = _surprise(root.candidates)
        if is_sampled:
            second = root.candidates.probs[1] if len(root.candidates.probs) > 1 else 0.0
            return 1.0, first, root.candidates.probs[0], second
        surprises: list[float] = []
        node = root
        while node.candidates is not None and len(surprises) < self._max_chunk:
            surprises.append(_surprise(node.candidates))
            child = node.children.get(node.choice)
            if child is None:
                break
            node = tree.node(child)
        return 1.0, first, sum(surprises) / len(surprises), max(surprises), len(surprises) / self._max_chunk

    def observe(
        self,
        examples: list[Example],
        tree: TokenTree,
        tokens: Sequence[int],
        num_draft_tokens: int,
        *,
        is_sampled: bool,
    ) -> None:
        """Learn from the outcome of a round, before the tree takes it in.

        Args:
            examples: open ones of the request.
            tokens: committed, the target's own token last.
            num_draft_tokens: how many draft tokens were verified.

        Mutates: `examples`: those that are decided now, or never will be, are taken out.
        """
        if is_sampled:
            self._observe_verified(examples, tree, len(tokens) - 1, num_draft_tokens)
        else:
            self._observe_choices(examples, tree, tokens)

    def _observe_verified(
        self, examples: list[Example], tree: TokenTree, num_accepted: int, num_draft_tokens: int
    ) -> None:
        here = [one for one in examples if one.position == tree.num_tokens - 1]
        examples.clear()
        if not num_draft_tokens:
            return
        for one in here:
            if num_accepted < num_draft_tokens or num_draft_tokens >= self._max_chunk:
                self._learn(one, num_accepted, is_sampled=True)
            else:
                self._none[True].learn(one.features, False)

    def _observe_choices(self, examples: list[Example], tree: TokenTree, tokens: Sequence[int]) -> None:
        node = tree.node(tree.root)
        for index, token in enumerate(tokens):
            if node.candidates is None:
                examples.clear()
                return
            is_right = token == node.choice
            done = [one for one in examples if not is_right or node.position + 1 - one.position >= self._max_chunk]
            for one in done:
                self._learn(one, node.position - one.position + is_right, is_sampled=False)
                examples.remove(one)
            child = node.children.get(token)
            if child is None:
                if index + 1 < len(tokens):
                    examples.clear()
                return
            node = tree.node(child)

    def _learn(self, example: Example, num_accepted: int, *, is_sampled: bool) -> None:
        self._none[is_sampled].learn(example.features, num_accepted == 0)
        self._all[is_sampled].learn(example.features, num_accepted >= self._max_chunk)
        self._num_labels[is_sampled] += 1


def _surprise(candidates: Candidates) -> float:
    """Of the draft's first choice, in nats: 0 where it is certain."""
    return min(MOST_SURPRISE, -math.log(max(1e-9, min(1.0, candidates.probs[0]))))
