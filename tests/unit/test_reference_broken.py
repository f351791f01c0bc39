"""Systems that break one rule of sampled drafting each, and the enumeration that rejects them.

Owns the broken systems: each overrides one piece of `reference_round.Generation`. The right system passes with the very same
tables and rules, so that it is the break that is seen. Rules are those of the design's section 3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import cast

import pytest

from tests.reference_round import (
    Drafted,
    Generation,
    LazyUniform,
    Prefix,
    Row,
    Rules,
    difference,
    top,
)
from vllm_specbranch.draft_sampling import draw

EXACT = 1e-9
REJECTED = 1e-3
UNLIKELY = 0.35
KV_BLOCK_SIZE = 2

# Rows by the last token. The draft is sometimes sure, sometimes not, and disagrees with the target.
DRAFT_ROWS: Mapping[Prefix, Row] = {
    (): (0.5, 0.3, 0.2),
    (0,): (0.8, 0.1, 0.1),
    (1,): (0.1, 0.45, 0.45),
    (2,): (0.3, 0.3, 0.4),
}
TARGET_ROWS: Mapping[Prefix, Row] = {
    (): (0.3, 0.4, 0.3),
    (0,): (0.5, 0.25, 0.25),
    (1,): (0.2, 0.2, 0.6),
    (2,): (0.1, 0.7, 0.2),
}


def draft(prefix: Prefix) -> Row:
    return DRAFT_ROWS[prefix[-1:]]


def target(prefix: Prefix) -> Row:
    return TARGET_ROWS[prefix[-1:]]


def unsure(prefix: Prefix, row: Row) -> bool:
    """The confidence rule."""
    del prefix
    return max(row) < 0.43


PLAIN = Rules(horizon=3, gamma=2, top_m=3)


class FullQ(Generation):
    """Rule 1: verified against the full q while drawn from the truncated."""

    def recorded(self, prefix: Prefix, token: int) -> Mapping[int, float]:
        del token
        return dict(enumerate(self.draft(prefix)))


class RecordDependsOnToken(Generation):
    """Rule 1: a drawn token that a candidate had put into the tree before stays without a q, and is verified as one-hot."""

    def recorded(self, prefix: Prefix, token: int) -> Mapping[int, float] | None:
        is_candidate = token in top(self.draft(prefix), self.rules.num_branches)
        return None if is_candidate else super().recorded(prefix, token)


class CutLooksAtDrawn(Generation):
    """Rule 2: the chunk ends before a drawn token that is unlikely itself."""

    def enters(self, prefix: Prefix) -> bool:
        return super().enters(prefix) and self.draft(prefix)[self.drawn(prefix)] >= UNLIKELY


class BestLength(Generation):
    """Rule 2: the length is the best of all by a score of the whole drawn chain."""

    def chain(self) -> list[Drafted]:
        chunk = super().chain()
        scores = [0.0]
        survival = 1.0
        for drafted in chunk:
            survival *= self.draft(drafted.prefix)[drafted.token]
            scores.append(survival * len(scores))
        return chunk[: scores.index(max(scores))]


class LaterTokenDecides(Generation):
    """Rule 2: a token enters if the one drawn after it is likely."""

    def chain(self) -> list[Drafted]:
        chunk = super().chain()
        likely = [self.draft(drafted.prefix)[drafted.token] >= UNLIKELY for drafted in chunk]
        pairs = list(pairwise(likely))
        return chunk[: next((index for index, (_, later) in enumerate(pairs) if not later), len(chunk))]


class UsesWhatWasSentAhead(Generation):
    """Right: of a late reply what was sent ahead is used, and how much that is does not look at the drawn tokens."""

    def admitted(self, chunk: list[Drafted]) -> list[Drafted]:
        return chunk[: self.time_limit()]

    def time_limit(self) -> int:
        """Tokens that there is time for, drawn or not; gamma if the reply is not late."""
        return self.world.choose((0.1, 0.4, *[0.0] * (self.rules.gamma - 2), 0.5))


class LateReplyDropsTheChunk(UsesWhatWasSentAhead):
    """Rule 2: a late reply drops the whole chunk, and longer chunks are late more often."""

    def admitted(self, chunk: list[Drafted]) -> list[Drafted]:
        return chunk if len(chunk) <= self.time_limit() else []


class CutToTheRoom(Generation):
    """Right: when KV blocks run short a chunk is cut to the slots that the committed tokens leave, min(n, room)."""

    def admitted(self, chunk: list[Drafted]) -> list[Drafted]:
        return chunk[: self.room()]

    def room(self) -> int:
        """Slots left in the last block of the committed tokens, of which one is the prompt; gamma if blocks do not run short."""
        is_short = self.world.happens(0.6)
        return -(len(self.output) + 1) % KV_BLOCK_SIZE if is_short else self.rules.gamma


class PreemptedForItsChunk(CutToTheRoom):
    """Rule 2: a chunk that is too long for the KV room preempts the request, and its drafts are dropped."""

    def admitted(self, chunk: list[Drafted]) -> list[Drafted]:
        return chunk if len(chunk) <= self.room() else []


class EvictsUnlikely(Generation):
    """Right: what is evicted may be chosen by looks, if the same tokens come again and none is missing."""

    def chain(self) -> list[Drafted]:
        chunk = super().chain()
        if not self.looks_unlikely(chunk):
            return chunk
        self.forget_drafts()
        return super().chain()

    def looks_unlikely(self, chunk: Sequence[Drafted]) -> bool:
        return any(self.draft(drafted.prefix)[drafted.token] < UNLIKELY for drafted in chunk)


class RedrawsAfterEviction(EvictsUnlikely):
    """Rule 2: as above, with fresh numbers."""

    def forget_drafts(self) -> None:
        super().forget_drafts()
        self.numbers.clear()


class MissingAfterEviction(EvictsUnlikely):
    """Rule 2: as above, and the round goes on without drafts."""

    def chain(self) -> list[Drafted]:
        chunk = Generation.chain(self)
        return [] if self.looks_unlikely(chunk) else chunk


class RedrawsAtRandom(Generation):
    """Right: fresh numbers after an eviction that has nothing to do with what was drawn."""

    def forget_drafts(self) -> None:
        super().forget_drafts()
        self.numbers.clear()


class TwoDraws(Generation):
    """Right: two continuations of each prefix are drawn, and one is kept without a look."""

    def drawn(self, prefix: Prefix) -> int:
        if prefix not in self.tokens:
            q = self.truncated(prefix)
            first, second = (self.drawn_from(q, self.stream((prefix, number))) for number in range(2))
            self.tokens[prefix] = second if self.prefers_second(prefix, first, second) else first
        return self.tokens[prefix]

    def prefers_second(self, prefix: Prefix, first: int, second: int) -> bool:
        del prefix, first, second
        return self.world.happens(0.5)


class KeepsLikelier(TwoDraws):
    """Rule 3: by their probability."""

    def prefers_second(self, prefix: Prefix, first: int, second: int) -> bool:
        return self.draft(prefix)[second] > self.draft(prefix)[first]


class KeepsMoreConfident(TwoDraws):
    """Rule 3: by the draft's confidence after each."""

    def prefers_second(self, prefix: Prefix, first: int, second: int) -> bool:
        return max(self.draft((*prefix, second))) > max(self.draft((*prefix, first)))


class SharedAcceptance(Generation):
    """Rule 6: a token is accepted by the number that it was drawn with."""

    def accepts(self, drafted: Drafted, probability: float) -> bool:
        return self.number(drafted.prefix) < probability


class SharedRecovery(Generation):
    """Rule 6: a rejected token is replaced by the number that it was drawn with."""

    def recovered(self, drafted: Drafted, weights: Sequence[float]) -> int:
        return draw(weights, cast(float, self.number(drafted.prefix)))


class BusyWithTheLosers(Generation):
    """Right: how soon drafts are ready may depend on what was drawn elsewhere, as each prefix has its own number.

    After a miss the draft server has time only if it was idle, and it was if the losing chain had come to its end.
    """

    is_idle = False

    def chain(self) -> list[Drafted]:
        chunk = super().chain()
        self.is_idle = len(chunk) < min(self.rules.gamma, self.rules.horizon - len(self.output))
        return chunk

    def steps_after_miss(self) -> int:
        return self.rules.gamma if self.is_idle else 0


class NumberPerPosition(BusyWithTheLosers):
    """The same with a number per position of the stream, which all chains share.

    A token at position i of the losing chain decides whether there is time, and the first token of the new chain, if there is, is
    drawn with number i as well.
    """

    def number(self, prefix: Prefix) -> LazyUniform:
        return self.stream(len(prefix))


GRAMMAR: Mapping[Prefix, frozenset[int]] = {
    (): frozenset((0, 1)),
    (0,): frozenset((1, 2)),
    (1,): frozenset((0, 1, 2)),
    (2,): frozenset((0,)),
}


def constrained(prefix: Prefix) -> Row:
    """The target under the grammar."""
    allowed = GRAMMAR[prefix[-1:]]
    weights = [prob if token in allowed else 0.0 for token, prob in enumerate(target(prefix))]
    return tuple(weight / sum(weights) for weight in weights)


class GrammarCut(Generation):
    """The chunk ends at the first draft token that the grammar does not allow: a look at it, if it was drawn."""

    def admitted(self, chunk: list[Drafted]) -> list[Drafted]:
        return list(takewhile(lambda drafted: drafted.token in GRAMMAR[drafted.prefix[-1:]], chunk))


@dataclass(frozen=True)
class Case:
    """A broken system, the right one beside it, and the rules that both work by."""

    broken: type[Generation]
    right: type[Generation] = Generation
    rules: Rules = PLAIN


CASES = (
    Case(FullQ, rules=replace(PLAIN, top_m=2)),
    Case(RecordDependsOnToken, rules=replace(PLAIN, num_branches=1, lost_records=0.3)),
    Case(CutLooksAtDrawn),
    Case(BestLength),
    Case(LaterTokenDecides),
    Case(LateReplyDropsTheChunk, UsesWhatWasSentAhead, replace(PLAIN, stops=unsure)),
    Case(PreemptedForItsChunk, CutToTheRoom, replace(PLAIN, stops=unsure)),
    Case(RedrawsAfterEviction, EvictsUnlikely),
    Case(RedrawsAfterEviction, RedrawsAtRandom, replace(PLAIN, evictions=0.3)),
    Case(MissingAfterEviction, EvictsUnlikely),
    Case(KeepsLikelier, TwoDraws),
    Case(KeepsMoreConfident, TwoDraws),
    Case(SharedAcceptance),
    Case(SharedRecovery),
    Case(NumberPerPosition, BusyWithTheLosers, replace(PLAIN, stops=unsure, gamma=3)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.broken.__name__}, not {case.right.__name__}")
def test_the_broken_system_is_rejected_and_the_right_one_is_not(case: Case) -> None:
    assert difference(case.rules, target, draft, case.right) < EXACT
    assert difference(case.rules, target, draft, case.broken) > REJECTED


def test_a_grammar_may_cut_greedy_drafts_only() -> None:
    """Rule 2, structured output: sampled drafts that no one cuts are rejected by the target, which is right as well."""
    assert difference(replace(PLAIN, is_greedy=True), constrained, draft, GrammarCut) < EXACT
    assert difference(PLAIN, constrained, draft) < EXACT
    assert difference(PLAIN, constrained, draft, GrammarCut) > REJECTED


@pytest.mark.parametrize(
    "system",
    [
        CutLooksAtDrawn,
        BestLength,
        LaterTokenDecides,
        LateReplyDropsTheChunk,
        PreemptedForItsChunk,
        RedrawsAfterEviction,
        KeepsLikelier,
        NumberPerPosition,
    ],
)
def test_one_hot_verification_forgives_any_choice_of_the_draft(system: type[Generation]) -> None:
    """Rule 1: a token without a q is lossless however it was chosen, if that it has none does not depend on it."""
    rules = replace(PLAIN, stops=unsure, lost_records=1.0)
    assert difference(rules, target, draft, system) < EXACT
