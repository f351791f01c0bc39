"""The real draft server is lossless: run inside the enumeration, it gives the target's distribution exactly.

Owns the cases; the breaks of the real code that the same enumeration rejects are in `test_enumerated_breaks`. The reference of one
round in plain Python, which needs no server, is in `test_reference_round`. Probabilities of drafts are multiples of 1/16, exact in
the float32 in which they travel, so distributions are compared at 1e-9.

What is small: one request of 3 or 4 tokens, or two of 2 or 3; an output vocabulary of 2, or of 3 with 3 tokens; chunks of at most 3
(4 in two breaks). Two branches of so few tokens need a `max_branches` of 4 or 8, since their first choice is likely.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from tests.enumerated_server import Result, Serving, enumerate_server, exact_table
from tests.reference_round import Rules
from vllm_specbranch.benefit_gate import BenefitGate
from vllm_specbranch.draft_server import DraftServer
from vllm_specbranch.draft_work import Limits, StepTimings
from vllm_specbranch.load_gate import LoadGate
from vllm_specbranch.online_head import OnlineHead
from vllm_specbranch.token_tree import TokenTree

EXACT = 1e-9

PEARL: Mapping[str, object] = {"policy": "pearl"}
NO_RULE: Mapping[str, object] = {"max_branches": 4, "stop_rule": "none"}
CONFIDENT: Mapping[str, object] = {"max_branches": 4, "stop_threshold": 0.6}
ADAEDL: Mapping[str, object] = {"max_branches": 8, "stop_rule": "adaedl", "stop_threshold": 0.7}
PATIENT: Mapping[str, object] = {**CONFIDENT, "on_miss": "wait:3"}
HASTY: Mapping[str, object] = {**CONFIDENT, "on_miss": "go"}
FANOUT: Mapping[str, object] = {"policy": "fanout", "max_branches": 8}
BEST_FIRST: Mapping[str, object] = {"policy": "best_first", "max_branches": 8}
DETERMINISTIC: Mapping[str, object] = {**CONFIDENT, "deterministic": True}

SHORT = Rules(horizon=3, gamma=2, top_m=2)
LONG = Rules(horizon=4, gamma=3, top_m=2)


@dataclass(frozen=True)
class Case:
    """A server, the tables that it is run with, and what must have happened on some path (names of `Result.seen`)."""

    serving: Serving
    happens: tuple[str, ...] = ()
    seed: int = 1
    vocab_size: int = 2


def run(case: Case) -> Result:
    """Enumerate a case."""
    names = [f"{case.seed} {index}" for index in range(case.serving.num_requests)]
    targets = [exact_table(f"target {name}", case.vocab_size) for name in names]
    drafts = [exact_table(f"draft {name}", case.vocab_size, case.serving.rules.top_m) for name in names]
    return enumerate_server(case.serving, targets, drafts)


TWO_OR_NONE = (0.4, 0.0, 0.6)  # Free draft steps.
NONE = (1.0,)
SOME_STEPS = (0.3, 0.3, 0.4)  # That the engine waits for a reply.
TWO_STEPS = (0.0, 0.0, 1.0)
EVICTED = ("num_evictions", "2 draft tokens")
SHORTENED = ("num_shortenings", "2 draft tokens")
NARROWED = ("num_narrowings", "2 draft tokens")
LATE = ("late replies", "2 draft tokens")
ALWAYS_0 = (1.0, 0.0, 0.0)
ALWAYS_2 = (0.0, 0.0, 1.0)
RANDOM = (0.25, 0.25, 0.5)
HEAD_SEEN = ("class 0", "class 1", "class 2", "2 draft tokens")

CASES = {
    "pearl": Case(Serving(SHORT, PEARL), ("2 draft tokens", "num_hits", "num_misses")),
    "pearl, chunks of 1": Case(Serving(replace(LONG, gamma=1), PEARL), ("1 draft tokens",)),
    "pearl, chunks of 3": Case(Serving(LONG, PEARL), ("3 draft tokens",)),
    "pearl, free steps vary": Case(Serving(SHORT, PEARL, free_steps=TWO_OR_NONE)),
    "pearl, three tokens": Case(Serving(SHORT, PEARL), vocab_size=3),
    "no rule": Case(Serving(LONG, NO_RULE), ("3 draft tokens",)),
    "confidence": Case(Serving(SHORT, CONFIDENT), ("num_wait_steps", "2 draft tokens", "num_forks")),
    "confidence, chunks of 3": Case(Serving(LONG, CONFIDENT), ("2 draft tokens", "num_forks"), seed=0),
    "confidence, truncated": Case(Serving(SHORT, CONFIDENT), ("2 draft tokens",), vocab_size=3),
    "confidence, one branch": Case(Serving(LONG, {**CONFIDENT, "max_branches": 1}), ("3 draft tokens",), seed=1),
    "confidence, misses wait": Case(Serving(LONG, PATIENT), ("3 draft tokens",), seed=2),
    "confidence, misses go on": Case(Serving(LONG, HASTY), ("2 draft tokens",), seed=2),
    "confidence, free steps vary": Case(Serving(SHORT, PATIENT, free_steps=TWO_OR_NONE), ("2 draft tokens",)),
    "adaedl": Case(Serving(SHORT, ADAEDL), ("num_forks", "2 draft tokens")),
    "adaedl, chunks of 3": Case(Serving(LONG, ADAEDL), ("num_forks",), seed=0),
    "deterministic": Case(Serving(LONG, DETERMINISTIC), ("3 draft tokens",)),
    "deterministic, pearl": Case(Serving(LONG, {**PEARL, "deterministic": True})),
    "deterministic, three tokens": Case(Serving(replace(SHORT, top_m=3), DETERMINISTIC), ("num_forks",), vocab_size=3),
    "deterministic, free steps vary": Case(Serving(SHORT, DETERMINISTIC, free_steps=TWO_OR_NONE)),
    "fanout": Case(Serving(SHORT, FANOUT), ("2 draft tokens", "num_forks", "num_hits")),
    "fanout, chunks of 3": Case(Serving(LONG, FANOUT), ("3 draft tokens", "num_forks"), seed=1),
    "fanout, deterministic": Case(Serving(SHORT, {**FANOUT, "deterministic": True}), ("num_forks",)),
    "best first": Case(Serving(SHORT, BEST_FIRST), ("2 draft tokens", "num_forks", "num_hits")),
    "best first, chunks of 3": Case(Serving(LONG, BEST_FIRST), ("3 draft tokens", "num_forks"), seed=2),
    "best first, three tokens": Case(Serving(SHORT, BEST_FIRST), ("num_forks",), vocab_size=3),
    "best first, free steps vary": Case(Serving(SHORT, BEST_FIRST, free_steps=TWO_OR_NONE), ("1 draft tokens",)),
    "best first, misses wait": Case(
        Serving(SHORT, {**BEST_FIRST, "on_miss": "wait:3"}, patience=SOME_STEPS), LATE, seed=1
    ),
    "best first, lost replies": Case(Serving(replace(SHORT, lost_replies=0.4), BEST_FIRST), ("2 draft tokens",)),
    "best first, evicted": Case(
        Serving(LONG, {**BEST_FIRST, "on_miss": "wait:3"}, num_blocks=4, block_size=1), EVICTED
    ),
    "best first, deterministic": Case(Serving(LONG, {**BEST_FIRST, "deterministic": True}), ("3 draft tokens",)),
    "best first, two requests": Case(
        Serving(replace(SHORT, horizon=2), BEST_FIRST, num_requests=2, limits=Limits(3)), ("num_forks",)
    ),
    "a forward under way": Case(Serving(SHORT, PATIENT, in_flight=True), ("2 draft tokens", "num_hits")),
    "a forward under way, best first": Case(
        Serving(LONG, BEST_FIRST, in_flight=True, free_steps=TWO_OR_NONE), ("2 draft tokens", "num_hits"), seed=2
    ),
    "a forward under way, late replies": Case(Serving(SHORT, PATIENT, in_flight=True, patience=SOME_STEPS), LATE),
    "a forward under way, evicted": Case(Serving(LONG, PATIENT, num_blocks=4, block_size=1, in_flight=True), EVICTED),
    "lost replies": Case(Serving(replace(SHORT, lost_replies=0.4), CONFIDENT), ("2 draft tokens",)),
    "lost replies, chunks of 3": Case(Serving(replace(LONG, lost_replies=0.4), HASTY), seed=2),
    "lost replies, deterministic": Case(Serving(replace(LONG, lost_replies=0.4), DETERMINISTIC), ("3 draft tokens",)),
    "trims": Case(Serving(replace(SHORT, trims=0.5), CONFIDENT)),
    "trims, chunks of 3": Case(Serving(replace(LONG, trims=0.5), DETERMINISTIC)),
    "a head that always says 0": Case(Serving(LONG, CONFIDENT, head_classes=ALWAYS_0), ("num_forks", "num_hits")),
    "a head that always says 2": Case(Serving(LONG, CONFIDENT, head_classes=ALWAYS_2), ("3 draft tokens",), seed=0),
    "a head": Case(Serving(LONG, CONFIDENT, head_seed=3), (*HEAD_SEEN, "3 draft tokens")),
    "a head, late replies": Case(Serving(SHORT, PATIENT, head_seed=0, patience=SOME_STEPS), (*LATE, *HEAD_SEEN)),
    "a head, a forward under way": Case(Serving(SHORT, PATIENT, head_seed=0, in_flight=True), HEAD_SEEN),
    "a head, lost replies": Case(Serving(replace(SHORT, lost_replies=0.4), CONFIDENT, head_seed=0), HEAD_SEEN),
    "a head, fanout": Case(Serving(SHORT, FANOUT, head_seed=0), ("num_forks", *HEAD_SEEN)),
    "a head, best first": Case(Serving(SHORT, BEST_FIRST, head_seed=0), ("num_forks", *HEAD_SEEN)),
    "a random head": Case(Serving(SHORT, PATIENT, head_classes=RANDOM), HEAD_SEEN),
    "a random head, evicted": Case(
        Serving(SHORT, PATIENT, head_classes=RANDOM, num_blocks=4, block_size=1), (*EVICTED, *HEAD_SEEN)
    ),
    "a random head, adaedl": Case(Serving(SHORT, ADAEDL, head_classes=RANDOM), HEAD_SEEN),
    "a random head, deterministic": Case(Serving(SHORT, DETERMINISTIC, head_classes=RANDOM), HEAD_SEEN),
    "lost records": Case(Serving(replace(SHORT, lost_records=0.4), CONFIDENT)),
    "what was sent ahead is used": Case(Serving(LONG, PATIENT, patience=TWO_STEPS), LATE),
    "replies late or not": Case(Serving(SHORT, PATIENT, patience=SOME_STEPS), LATE),
    "no wait": Case(Serving(LONG, PATIENT, max_wait_ms=0.0), seed=2),
    "narrowed": Case(Serving(LONG, CONFIDENT, num_blocks=6, block_size=1), NARROWED),
    "narrowed, lost replies": Case(
        Serving(replace(LONG, lost_replies=0.4), CONFIDENT, num_blocks=6, block_size=1), NARROWED, seed=2
    ),
    "shortened": Case(Serving(LONG, PATIENT, num_blocks=4, block_size=1), SHORTENED),
    "evicted, larger blocks": Case(Serving(LONG, PATIENT, num_blocks=3), (*EVICTED, *NARROWED)),
    "evicted, lost replies": Case(
        Serving(replace(SHORT, lost_replies=0.4), PATIENT, num_blocks=3, block_size=1), EVICTED
    ),
    "evicted, late replies": Case(
        Serving(LONG, PATIENT, num_blocks=4, block_size=1, patience=TWO_STEPS), (*EVICTED, *LATE), seed=2
    ),
    "shortened, a long prefill": Case(
        Serving(LONG, PATIENT, num_prompt_tokens=17, num_blocks=20, block_size=1, free_steps=TWO_STEPS),
        ("num_shortenings", "num_prefill_tokens", "3 draft tokens"),
    ),
    "shortened, three tokens": Case(Serving(SHORT, CONFIDENT, num_blocks=5, block_size=1), SHORTENED, vocab_size=3),
    "two requests": Case(Serving(replace(SHORT, horizon=2), CONFIDENT, num_requests=2)),
    "two requests, one row a step": Case(Serving(SHORT, DETERMINISTIC, num_requests=2, limits=Limits(1)), seed=0),
    "two requests, evicted": Case(
        Serving(SHORT, DETERMINISTIC, num_requests=2, num_blocks=7, block_size=1), (*EVICTED, *NARROWED), seed=0
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_output_has_the_targets_distribution(name: str) -> None:
    case = CASES[name]
    result = run(case)
    assert result.difference < EXACT
    missing = [event for event in case.happens if not result.seen[event]]
    assert not missing, f"on none of {result.num_paths} paths: {missing}"


@pytest.mark.parametrize("settings", [PATIENT, BEST_FIRST], ids=["specbranch", "best_first"])
def test_a_head_that_learns_while_serving_looks_at_no_drawn_token(
    settings: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its classes follow from what was accepted before, and from the distribution at the root."""
    monkeypatch.setattr(BenefitGate, "is_on", property(lambda self: True, lambda self, value: None), raising=False)
    monkeypatch.setattr("vllm_specbranch.online_head.WARM_UP_LABELS", 0)
    monkeypatch.setattr("vllm_specbranch.online_head.LEARNING_RATE", 3.0)
    classes: set[int | None] = set()
    right = OnlineHead.length_class

    def noted(self: OnlineHead, tree: TokenTree, *, is_sampled: bool) -> int | None:
        found = right(self, tree, is_sampled=is_sampled)
        classes.add(found)
        return found

    monkeypatch.setattr(OnlineHead, "length_class", noted)
    case = Case(Serving(SHORT, {**settings, "length_head": "online"}))
    assert run(case).difference < EXACT
    assert classes >= {None, 0, 1}

    def of_the_chain(self: OnlineHead, tree: TokenTree, *, is_sampled: bool) -> int | None:
        found = [tree.node(one).candidates for one in (tree.root, *tree.path(tree.leaves()[0]))]
        return 0 if any(one.probs[0] < 0.7 for one in found if one is not None) else 2

    # As if the request were greedy: a class that is made of what was drawn.
    monkeypatch.setattr(OnlineHead, "length_class", of_the_chain)
    assert run(case).difference > 1e-3


@pytest.mark.parametrize("settings", [BEST_FIRST, CONFIDENT], ids=["best_first", "specbranch"])
@pytest.mark.parametrize("token_us", [1.0, 30.0])
def test_a_price_of_verification_looks_at_no_drawn_token(
    settings: Mapping[str, object], token_us: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are cut by measured times and by learned rates, both of which follow from what was drafted before."""
    monkeypatch.setattr("vllm_specbranch.costs.MIN_WEIGHT", 1.0)
    monkeypatch.setattr("vllm_specbranch.costs.MIN_VARIANCE", 0.0)
    prices = []
    right = DraftServer._prices

    def observed(self: DraftServer, *args: object) -> list[float]:
        prices.append(right(self, *args)[0])  # type: ignore[arg-type]
        return [prices[-1]]

    # The scouts of a young engine pay no price.
    monkeypatch.setattr("vllm_specbranch.draft_server.SCOUT_ROUNDS", 0)
    monkeypatch.setattr(DraftServer, "_prices", observed)
    result = run(Case(Serving(replace(SHORT, horizon=4), settings, round_us=(20.0, token_us)), seed=2))
    assert result.difference < EXACT
    assert len({round(price, 3) for price in prices}) > 2
    assert any(0.0 < price < 1.0 for price in prices) if token_us < 2.0 else any(price > 1.0 for price in prices)


@pytest.mark.parametrize(
    ("settings", "price", "row_cost", "seed"),
    [(BEST_FIRST, 0.0, 0.3, 1), (FANOUT, 0.5, 0.0, 3), (BEST_FIRST, 0.5, 0.3, 5)],
)
def test_how_far_a_branch_grows_depends_on_nothing_drawn_in_it(
    settings: Mapping[str, object], price: float, row_cost: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under pressure a branch is dropped with what was drawn, and its length decides whether there is pressure."""
    monkeypatch.setattr(DraftServer, "_prices", lambda self, peer, commits: [price] * len(commits))
    monkeypatch.setattr(StepTimings, "row_cost", property(lambda self: row_cost))
    serving = Serving(LONG, {**settings, "on_miss": "go"}, num_blocks=6, block_size=1)
    result = run(Case(serving, seed=seed))
    assert result.difference < EXACT
    assert result.seen["num_narrowings"] + result.seen["num_evictions"] > 0


@pytest.mark.parametrize("settings", [BEST_FIRST, CONFIDENT], ids=["best_first", "specbranch"])
@pytest.mark.parametrize("phase", [0, 1])
def test_pauses_under_load_look_at_no_drawn_token(
    settings: Mapping[str, object], phase: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has been drawn when a pause begins is not submitted; what is drawn after it follows what was committed."""
    right = LoadGate.observe_round
    seen = []

    def counted(self: LoadGate, *args: object, **keywords: object) -> None:
        vars(self)["rounds"] = vars(self).get("rounds", phase) + 1
        right(self, *args, **keywords)  # type: ignore[arg-type]

    def in_turns(self: LoadGate) -> bool:
        seen.append(vars(self).get("rounds", phase) % 2 == 0)
        return seen[-1]

    monkeypatch.setattr(LoadGate, "observe_round", counted)
    monkeypatch.setattr(LoadGate, "is_on", property(in_turns))
    result = run(Case(Serving(replace(SHORT, horizon=4), settings, round_us=(20.0, 1.0)), seed=2))
    assert result.difference < EXACT
    assert set(seen) == {True, False}
    assert result.seen["num_paused_rounds"] and result.seen["num_hits"]
