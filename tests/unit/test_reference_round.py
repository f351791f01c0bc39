"""Sampled drafts are lossless: the reference of the whole round gives the target's distribution, enumerated and not sampled.

Owns the right system: the enumeration itself, the pure `verify`, and the equality for all chunk lengths up to 4 with everything
that may befall a chunk. The broken systems, which the same enumeration rejects, are in `test_reference_broken`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_round import (
    Drafted,
    Explorer,
    Generation,
    LazyUniform,
    Prefix,
    Row,
    Rules,
    Table,
    World,
    accept_probability,
    difference,
    enumerate_outcomes,
    max_difference,
    never_stops,
    residual,
    top,
    verify,
)
from vllm_specbranch.draft_sampling import draw

EXACT = 1e-9


def random_table(seed: str, vocab_size: int) -> Table:
    """A distribution for any prefix: with zeros, certain tokens, ties and almost certain tokens."""
    rows: dict[Prefix, Row] = {}

    def table(prefix: Prefix) -> Row:
        if prefix not in rows:
            random = Random(f"{seed} {prefix}")
            weights = [random.choice((0, 1, 1, 2, 3, 5, 400)) for _ in range(vocab_size)]
            weights[random.randrange(vocab_size)] += 1
            rows[prefix] = tuple(weight / sum(weights) for weight in weights)
        return rows[prefix]

    return table


def numbered_table(rows: list[list[int]]) -> Table:
    """Rows of weights, given out to prefixes in turn: each its own, if there are enough."""

    def table(prefix: Prefix) -> Row:
        number = 0
        for token in prefix:
            number = number * len(rows[0]) + token + 1
        weights = rows[number % len(rows)]
        weights = weights if any(weights) else [1] * len(weights)
        return tuple(weight / sum(weights) for weight in weights)

    return table


def steps(num: int) -> tuple[float, ...]:
    """Weights of the draft steps after a miss: always so many."""
    return (*[0.0] * num, 1.0)


def none_or_all(num: int) -> tuple[float, ...]:
    """An empty chunk, or a whole one."""
    return (0.4, *[0.0] * (num - 1), 0.6)


def any_steps(num: int) -> tuple[float, ...]:
    """Up to so many."""
    return (0.4, *[0.6 / num] * num)


def unsure(prefix: Prefix, row: Row) -> bool:
    """The confidence rule: the draft's top probability is low."""
    del prefix
    return max(row) < 0.6


def clock(prefix: Prefix, row: Row) -> bool:
    """A limit of time or load that depends on the text before: some prefixes leave no time for another token."""
    del row
    return (sum(prefix) + 2 * len(prefix)) % 5 == 3


# The enumeration.


def test_a_certain_choice_is_no_fork() -> None:
    explorer = Explorer(lambda world: (world.choose((0.0, 3.0)), world.happens(1.0), world.happens(0.0)))
    assert explorer.run() == {(1, True, False): 1.0}
    assert explorer.num_paths == 1


def test_outcomes_have_the_probabilities_of_their_paths() -> None:
    def program(world: World) -> str:
        first = world.choose((1, 2, 1))
        return "b" if first == 1 and world.happens(0.25) else "a" if first == 0 else "c"

    explorer = Explorer(program)
    assert explorer.run() == pytest.approx({"a": 0.25, "b": 0.125, "c": 0.625}, abs=1e-15)
    assert explorer.num_paths == 4


def test_a_program_that_is_no_function_of_its_choices_is_noticed() -> None:
    runs: list[int] = []

    def program(world: World) -> int:
        runs.append(1)
        return world.choose((1, 1) if len(runs) == 1 else (1, 3))

    with pytest.raises(RuntimeError, match="add up to"):
        enumerate_outcomes(program)


def test_comparisons_with_one_number_agree() -> None:
    def program(world: World) -> tuple[bool, ...]:
        number = LazyUniform(world)
        return tuple(number < bound for bound in (0.5, 0.2, 0.7, 0.5, 0.0, 1.0))

    expected = {
        (True, True, True, True, False, True): 0.2,
        (True, False, True, True, False, True): 0.3,
        (False, False, True, False, False, True): 0.2,
        (False, False, False, False, False, True): 0.3,
    }
    assert enumerate_outcomes(program) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_draws_have_their_distribution(seed: int) -> None:
    row = random_table(str(seed), 4)(())
    outcomes = enumerate_outcomes(lambda world: draw(row, LazyUniform(world)))  # type: ignore[arg-type]
    assert max_difference(outcomes, {token: prob for token, prob in enumerate(row) if prob}) < EXACT


def test_two_draws_with_one_number_share_it() -> None:
    def program(world: World) -> tuple[int, int]:
        number = LazyUniform(world)
        return draw((0.5, 0.5), number), draw((0.2, 0.8), number)  # type: ignore[arg-type]

    assert enumerate_outcomes(program) == pytest.approx({(0, 0): 0.2, (0, 1): 0.3, (1, 1): 0.5}, abs=1e-15)


def test_truncation_takes_the_lower_of_equal_ids() -> None:
    assert top((0.2, 0.3, 0.2, 0.3, 0.0), 3) == (1, 3, 0)
    assert top((0.0, 1.0), 2) == (1,)


# The pure verification.


def test_verify_by_hand() -> None:
    p_rows = [(0.5, 0.3, 0.2), (0.1, 0.1, 0.8)]
    q_rows = [{0: 0.8, 2: 0.2}, {1: 1.0}]
    noise = (1.0, 1.0, 1.0)
    assert verify((0, 1), q_rows, p_rows, 2, (0.62, 0.09), noise) == [0, 1, 2]
    assert verify((0, 1), q_rows, p_rows, 2, (0.62, 0.11), noise) == [0, 2]
    assert verify((0, 1), q_rows, p_rows, 2, (0.63, 0.09), noise) == [1]
    assert verify((), (), (), 2, (), noise) == [2]


def test_the_noise_decides_the_recovered_token() -> None:
    p, q = (0.5, 0.2, 0.3), {0: 1.0}
    assert verify((0,), (q,), (p,), 0, (0.9,), (0.01, 1.0, 1.0)) == [2]
    assert verify((0,), (q,), (p,), 0, (0.9,), (0.01, 0.5, 1.0)) == [1]
    assert verify((0,), (q,), (p,), 0, (0.9,), (0.01, 0.2, 0.3)) == [1]


def test_a_token_without_q_is_verified_as_one_hot() -> None:
    p = (0.5, 0.2, 0.3)
    assert verify((0,), (None,), (p,), 1, (0.49,), (1.0, 1.0, 1.0)) == [0, 1]
    assert verify((0,), (None,), (p,), 1, (0.51,), (1.0, 1.0, 1.0)) == [2]
    assert residual(p, None, 0) == residual(p, {0: 1.0}, 0) == [0.0, 0.2, 0.3]


def test_padding_and_tokens_outside_their_q_are_rejected() -> None:
    p = (0.2, 0.5, 0.3)
    assert verify((-1,), (None,), (p,), 0, (0.0,), (1.0, 1.0, 1.0)) == [1]
    assert verify((2,), ({1: 1.0},), (p,), 0, (0.0,), (1.0, 1.0, 1.0)) == [2]
    assert accept_probability(p, None, -1) == accept_probability(p, {1: 1.0}, 2) == 0.0


@pytest.mark.parametrize("seed", range(8))
def test_verify_accepts_as_the_enumeration_does(seed: int) -> None:
    """`verify` with uniform numbers, and `Generation.verified`, whose recovered and bonus tokens are one's own choice."""
    target, draft = random_table(f"target {seed}", 3), random_table(f"draft {seed}", 3)
    rules = Rules(horizon=4, gamma=3, top_m=2, waits=(0, 0, 0, 1))

    def chunk_of(world: World) -> Generation:
        return Generation(world, target, draft, rules)

    def pure(world: World) -> tuple[Prefix, int]:
        chunk = chunk_of(world).chain()
        numbers = [LazyUniform(world) for _ in chunk]
        rows = [target(drafted.prefix) for drafted in chunk]
        tokens = tuple(drafted.token for drafted in chunk)
        qs = [drafted.q for drafted in chunk]
        return tokens, len(verify(tokens, qs, rows, 0, numbers, (1.0, 1.0, 1.0)))  # type: ignore[arg-type]

    def enumerated(world: World) -> tuple[Prefix, int]:
        generation = chunk_of(world)
        chunk = generation.chain()
        return tuple(drafted.token for drafted in chunk), len(generation.verified(chunk))

    assert max_difference(enumerate_outcomes(pure), enumerate_outcomes(enumerated)) < EXACT


# The whole round.

NUM_BRANCHES = {"no branches": 0, "branches at the end": 2, "branches everywhere": 1}
EVENTS: dict[str, Callable[[Rules], Rules]] = {
    "misses go on empty": lambda rules: replace(rules, horizon=rules.horizon + 1),
    "misses wait for all": lambda rules: replace(rules, horizon=rules.horizon + 1, waits=steps(rules.gamma)),
    "waits": lambda rules: replace(rules, waits=any_steps(rules.gamma)),
    "confidence": lambda rules: replace(rules, stops=unsure, waits=none_or_all(rules.gamma)),
    "clock": lambda rules: replace(rules, stops=clock, waits=any_steps(rules.gamma)),
    "evictions": lambda rules: replace(rules, evictions=0.3, waits=steps(rules.gamma // 2)),
    "lost replies": lambda rules: replace(rules, lost_replies=0.4, waits=steps(rules.gamma // 2)),
    "trims": lambda rules: replace(rules, trims=0.5),
    "lost records": lambda rules: replace(rules, lost_records=0.4, waits=steps(rules.gamma)),
    "greedy": lambda rules: replace(rules, is_greedy=True, stops=unsure, waits=any_steps(rules.gamma)),
}
SHAPES = {  # gamma, vocabulary, horizon, top m
    "chunks of 1": (1, 2, 4, 2),
    "chunks of 1, three tokens": (1, 3, 3, 2),
    "chunks up to 2, three tokens": (2, 3, 3, 2),
    "chunks up to 3": (3, 2, 4, 2),
    "chunks up to 4": (4, 2, 4, 2),
}


def forked(rules: Rules, branches: str) -> Rules:
    """The rules with branches of one of the three kinds; one at every position, so that there are misses as well."""
    return replace(rules, num_branches=NUM_BRANCHES[branches], forks_everywhere=branches == "branches everywhere")


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("branches", NUM_BRANCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_has_the_targets_distribution(shape: str, branches: str, event: str) -> None:
    gamma, vocab_size, horizon, top_m = SHAPES[shape]
    seed = f"{shape}, {branches}, {event}"
    target, draft = random_table(f"target, {seed}", vocab_size), random_table(f"draft, {seed}", vocab_size)
    rules = EVENTS[event](forked(Rules(horizon, gamma, top_m), branches))
    assert difference(rules, target, draft) < EXACT


@pytest.mark.parametrize("branches", NUM_BRANCHES)
@pytest.mark.parametrize(
    ("gamma", "vocab_size", "horizon", "top_m"), [(2, 4, 2, 3), (3, 3, 3, 1), (3, 3, 3, 2), (4, 3, 4, 2)]
)
def test_truncated_drafts_are_verified_against_what_they_were_drawn_from(
    gamma: int, vocab_size: int, horizon: int, top_m: int, branches: str
) -> None:
    seed = f"{gamma} {vocab_size} {top_m} {branches}"
    target, draft = random_table(f"target, {seed}", vocab_size), random_table(f"draft, {seed}", vocab_size)
    rules = forked(Rules(horizon, gamma, top_m, waits=none_or_all(gamma)), branches)
    assert difference(rules, target, draft) < EXACT


EVERYTHING = Rules(
    horizon=3,
    gamma=2,
    top_m=2,
    stops=unsure,
    num_branches=1,
    waits=(0.3, 0.3, 0.4),
    evictions=0.3,
    lost_replies=0.3,
    trims=0.4,
    lost_records=0.2,
)


@pytest.mark.parametrize(
    ("seed", "rules"),
    [
        (0, EVERYTHING),
        (3, EVERYTHING),
        (1, replace(EVERYTHING, horizon=2)),
        (2, replace(EVERYTHING, trims=0.0, lost_records=0.0)),
    ],
)
def test_everything_at_once(seed: int, rules: Rules) -> None:
    target, draft = random_table(f"target {seed}", 2), random_table(f"draft {seed}", 2)
    assert difference(rules, target, draft) < EXACT


class Watched(Generation):
    """Notes what happens: chunk lengths with accepted tokens, hits, and tokens that are drawn again after an eviction."""

    seen: ClassVar[set[object]] = set()

    def commit(self, tokens: Sequence[int]) -> None:
        expected = (*self.output, *tokens) in self.nodes
        super().commit(tokens)
        self.seen.add("hit" if expected else "miss")

    def verified(self, chunk: Sequence[Drafted]) -> list[int]:
        tokens = super().verified(chunk)
        start = len(self.output)
        all_accepted = tokens[: len(chunk)] == [drafted.token for drafted in chunk]
        self.seen.add((len(chunk), len(chunk) if all_accepted else len(tokens) - 1))
        assert start + len(tokens) <= self.rules.horizon
        return tokens

    def forget_drafts(self) -> None:
        before = dict(self.tokens)
        super().forget_drafts()
        self.seen.update("redrawn" for prefix, token in before.items() if self.drawn(prefix) == token)
        self.seen.update("redrawn otherwise" for prefix, token in before.items() if self.drawn(prefix) != token)
        super().forget_drafts()


def test_the_enumeration_comes_by_every_chunk_and_every_outcome() -> None:
    target, draft = random_table("target, broad", 2), random_table("draft, broad", 2)
    rules = Rules(horizon=4, gamma=4, top_m=2, num_branches=1, waits=steps(4), evictions=0.1)
    Watched.seen.clear()
    assert difference(rules, target, draft, Watched) < EXACT
    rounds = {(length, accepted) for length in range(1, 5) for accepted in range(length + 1)}
    assert Watched.seen == {*rounds, "hit", "miss", "redrawn"}


WEIGHTS = st.sampled_from((0, 1, 1, 2, 3, 7, 500))
BEFALLEN: tuple[Callable[[Rules], Rules], ...] = (
    lambda rules: rules,
    lambda rules: replace(rules, evictions=0.5),
    lambda rules: replace(rules, lost_replies=0.5),
    lambda rules: replace(rules, trims=0.5),
    lambda rules: replace(rules, lost_records=0.5),
    lambda rules: replace(rules, evictions=0.2, lost_replies=0.6),
)


@st.composite
def systems(draw_one: st.DrawFn) -> tuple[Rules, Table, Table]:
    """Any rules, and tables for them."""
    vocab_size, gamma, horizon = draw_one(
        st.sampled_from([(2, 1, 3), (2, 2, 3), (2, 3, 3), (3, 2, 2), (3, 3, 3), (2, 4, 4)])
    )
    row = st.lists(WEIGHTS, min_size=vocab_size, max_size=vocab_size)
    target, draft = (numbered_table(draw_one(st.lists(row, min_size=7, max_size=7))) for _ in range(2))
    rules = Rules(
        horizon,
        gamma,
        top_m=draw_one(st.integers(1, vocab_size)),
        stops=draw_one(st.sampled_from((never_stops, unsure, clock))),
        num_branches=draw_one(st.integers(0, vocab_size)),
        forks_everywhere=draw_one(st.booleans()),
        waits=draw_one(st.sampled_from((steps(0), steps(1), none_or_all(gamma)))),
        is_greedy=draw_one(st.sampled_from((False, False, False, True))),
    )
    return draw_one(st.sampled_from(BEFALLEN))(rules), target, draft


@given(systems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_rules_and_tables(case: tuple[Rules, Table, Table]) -> None:
    assert difference(*case) < EXACT
