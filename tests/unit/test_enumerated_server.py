"""The real draft server is lossless: run inside the enumeration, it gives the target's distribution exactly.

Owns the cases, and the breaks of the real code that the same enumeration rejects. The reference of one round in plain Python, which
needs no server, is in `test_reference_round`. Probabilities of drafts are multiples of 1/16, exact in the float32 in which they
travel, so distributions are compared at 1e-9.

What is small: one request of 3 or 4 tokens, or two of 2 or 3; an output vocabulary of 2, or of 3 with 3 tokens; chunks of at most 3
(4 in two breaks). Two branches of so few tokens need a `max_branches` of 4 or 8, since their first choice is likely.
"""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from tests.enumerated_server import Engine, Result, Serving, enumerate_server, exact_table
from tests.reference_round import Rules
from vllm_specbranch.branching import Branching
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_sampling import draw
from vllm_specbranch.draft_server import DraftServer
from vllm_specbranch.draft_work import Limits, StepTimings
from vllm_specbranch.planner import Chunk, Planner
from vllm_specbranch.token_tree import Candidates, TokenTree

EXACT = 1e-9
REJECTED = 1e-3

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
NARROWED = ("num_narrowings", "2 draft tokens")
LATE = ("late replies", "2 draft tokens")

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
    "lost records": Case(Serving(replace(SHORT, lost_records=0.4), CONFIDENT)),
    "what was sent ahead is used": Case(Serving(LONG, PATIENT, patience=TWO_STEPS), LATE),
    "replies late or not": Case(Serving(SHORT, PATIENT, patience=SOME_STEPS), LATE),
    "no wait": Case(Serving(LONG, PATIENT, max_wait_ms=0.0), seed=2),
    "narrowed": Case(Serving(LONG, CONFIDENT, num_blocks=6, block_size=1), NARROWED),
    "narrowed, lost replies": Case(
        Serving(replace(LONG, lost_replies=0.4), CONFIDENT, num_blocks=6, block_size=1), NARROWED, seed=2
    ),
    "evicted": Case(Serving(LONG, PATIENT, num_blocks=4, block_size=1), EVICTED),
    "evicted, larger blocks": Case(Serving(LONG, PATIENT, num_blocks=3), (*EVICTED, *NARROWED)),
    "evicted, lost replies": Case(
        Serving(replace(SHORT, lost_replies=0.4), PATIENT, num_blocks=3, block_size=1), EVICTED
    ),
    "evicted, late replies": Case(
        Serving(LONG, PATIENT, num_blocks=4, block_size=1, patience=TWO_STEPS), (*EVICTED, *LATE), seed=2
    ),
    "evicted, a long prefill": Case(
        Serving(LONG, PATIENT, num_prompt_tokens=17, num_blocks=20, block_size=1, free_steps=TWO_STEPS),
        ("num_evictions", "num_prefill_tokens", "3 draft tokens"),
    ),
    "evicted, three tokens": Case(Serving(SHORT, CONFIDENT, num_blocks=5, block_size=1), EVICTED, vocab_size=3),
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


def test_the_price_of_a_branch_and_its_growth_are_guarded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either break alone shows nothing in the third case above: values that are all alike stop all branches alike."""
    monkeypatch.setattr(DraftServer, "_prices", lambda self, peer, commits: [0.5] * len(commits))
    monkeypatch.setattr(StepTimings, "row_cost", property(lambda self: 0.3))
    monkeypatch.setattr(Branching, "grow_extension", by_what_was_drawn)
    monkeypatch.setattr(Branching, "extensions", where_it_pays)
    serving = Serving(LONG, {**BEST_FIRST, "on_miss": "go"}, num_blocks=6, block_size=1)
    assert run(Case(serving, seed=5)).difference > REJECTED


# Breaks of the real code. Each takes the place of one method of the draft server.


def with_a_number_per_position(
    self: DraftRequest, leaf: int, candidates: Candidates, score: float, accepted: float
) -> None:
    """`DraftRequest.fed` for a stream that all chains share.

    An eviction costs the request its KV, and no chunk waits for so long a prefill. Whether the losing chain grew until the request
    was evicted depends on a token of it that was drawn with the number which the new chain starts with.
    """
    assert self.sampling is not None
    node = self.tree.node(leaf)
    node.candidates, node.score, node.accepted = candidates, score, accepted
    node.choice = candidates.token_ids[draw(candidates.probs, self._random_number(self.sampling.key, node.position))]


def with_the_likelier_of_two(
    self: DraftRequest, leaf: int, candidates: Candidates, score: float, accepted: float
) -> None:
    """`DraftRequest.fed` that draws twice (rule 3)."""
    assert self.sampling is not None
    node = self.tree.node(leaf)
    node.candidates, node.score, node.accepted = candidates, score, accepted
    numbers = (self._random_number(self.sampling.key + stream, node.prefix) for stream in (0, 1))
    # The candidates are in the order of their probabilities.
    node.choice = candidates.token_ids[min(draw(candidates.probs, number) for number in numbers)]


def with_the_score_of_the_choice(
    self: DraftRequest, leaf: int, candidates: Candidates, score: float, accepted: float
) -> None:
    """`DraftRequest.fed` whose stop rule looks at the drawn token's probability (rule 2)."""
    RIGHT_FED(self, leaf, candidates, score, accepted)
    node = self.tree.node(leaf)
    node.score = candidates.probs[candidates.token_ids.index(node.choice)]


RIGHT_FED = DraftRequest.fed


def of_the_root(self: DraftRequest, end: int) -> tuple[bytes, bytes]:
    """`DraftRequest._distributions` that sends the root's q for every token (rule 1)."""
    num_tokens = len(self.tree.path(end))
    candidates = self.tree.node(self.tree.root).candidates
    if candidates is None or not num_tokens:
        return b"", b""
    return array("i", candidates.token_ids * num_tokens).tobytes(), array("f", candidates.probs * num_tokens).tobytes()


def one_hot_for_first_choices(self: DraftRequest, end: int) -> tuple[bytes, bytes]:
    """`DraftRequest._distributions` that leaves out the q of a token that is the first candidate too (rule 1)."""
    packed_ids, packed_probs = RIGHT_DISTRIBUTIONS(self, end)
    ids, probs = array("i", packed_ids), array("f", packed_probs)
    path = self.tree.path(end)
    width = len(ids) // max(1, len(path))
    for row, node_id in enumerate(path):
        first = row * width
        if ids[first] == self.tree.node(node_id).token:
            probs[first : first + width] = array("f", [1.0, *[0.0] * (width - 1)])
    return packed_ids, probs.tobytes()


RIGHT_DISTRIBUTIONS = DraftRequest._distributions


def unless_there_are_branches(self: DraftServer, request: DraftRequest) -> Chunk:
    """`DraftServer._open_chunk` that appends the choice to a leaf only, so that elsewhere it enters if it is a branch (rule 2)."""
    chunk = self._planner.chunk(request.tree)
    return chunk if request.tree.node(chunk.end).children else RIGHT_OPEN_CHUNK(self, request)


RIGHT_OPEN_CHUNK = DraftServer._open_chunk


def best_of_all_lengths(self: Planner, tree: TokenTree, price: float = 0.0) -> Chunk:
    """`Planner.chunk` that ends before the least likely token of a chunk that is complete (rule 2)."""
    chunk = RIGHT_CHUNK(self, tree, price)
    if not chunk.is_complete or chunk.num_tokens < 2:
        return chunk
    parents = [tree.root, *tree.path(chunk.end)[:-1]]
    found = [tree.node(one) for one in parents]
    probs = [one.candidates.probs[one.candidates.token_ids.index(one.choice)] for one in found if one.candidates]
    length = probs.index(min(probs))
    return Chunk(parents[length], length, True, chunk.survival)


RIGHT_CHUNK = Planner.chunk


def by_what_was_drawn(self: Branching, tree: TokenTree, leaf: int, child_id: int, *, is_sampled: bool) -> None:
    """`Branching.grow_extension` as for a greedy request (rule 2, by way of the pressure that a longer branch makes)."""
    RIGHT_GROW_EXTENSION(self, tree, leaf, child_id, is_sampled=False)


RIGHT_GROW_EXTENSION = Branching.grow_extension


def where_it_pays(
    self: Branching, tree: TokenTree, end: int, *, is_sampled: bool, price: float = 0.0
) -> list[tuple[int, int]]:
    """`Branching.extensions` with the price of a greedy request (rule 2, by the same way)."""
    return RIGHT_EXTENSIONS(self, tree, end, is_sampled=False, price=price)


RIGHT_EXTENSIONS = Branching.extensions


def nothing(*_: object) -> list[object]:
    """`DraftServer._send_ahead`: a late reply is dropped whole."""
    return []


def with_its_drafts(self: DraftRequest) -> None:
    """`DraftRequest.evict` that drops what was drawn with its KV (rule 2).

    A chunk that grows while its reply waits is evicted at some length, and one that the stop rule ends before that is not.
    """
    for sequence in self._owned.values():
        self._kv.free(sequence)
    self._owned.clear()
    self.tree.rollback(self.tree.num_tokens)
    self.tree.node(self.tree.root).candidates = None
    self.chunk_end = self.tree.root


def whatever_came(self: Engine) -> bool:
    """`Engine.gives_up` after each late reply."""
    return True


@dataclass(frozen=True)
class Break:
    """A method of the real code (or of the engine's side here), what takes its place, and a case that shows it.

    Attributes:
        timings: measured times of the draft steps that are given instead.
    """

    owner: type
    method: str
    broken: Callable[..., object]
    case: Case
    timings: Mapping[str, float] = field(default_factory=dict)


ONE_BRANCH = {"max_branches": 1, "stop_threshold": 0.6}
BREAKS = {
    "a number per position": Break(
        DraftRequest,
        "fed",
        with_a_number_per_position,
        Case(
            Serving(
                replace(LONG, gamma=4),
                {**ONE_BRANCH, "on_miss": "wait:4"},
                num_prompt_tokens=17,
                num_blocks=21,
                block_size=1,
                free_steps=(0.0, 1.0),
            ),
            seed=56,
        ),
    ),
    "the likelier of two draws": Break(DraftRequest, "fed", with_the_likelier_of_two, CASES["pearl"]),
    "a look at the drawn token's probability": Break(
        DraftRequest, "fed", with_the_score_of_the_choice, CASES["confidence"]
    ),
    "q from the wrong node": Break(DraftRequest, "_distributions", of_the_root, CASES["pearl"]),
    "q depends on the token": Break(DraftRequest, "_distributions", one_hot_for_first_choices, CASES["pearl"]),
    "the choice enters where it is a branch": Break(
        DraftServer,
        "_open_chunk",
        unless_there_are_branches,
        Case(Serving(replace(SHORT, gamma=1, lost_replies=0.5), {**NO_RULE, "on_miss": "go"}), seed=0),
    ),
    "a branch grows by the worth of what is drawn in it": Break(
        Branching,
        "grow_extension",
        by_what_was_drawn,
        Case(Serving(LONG, {**BEST_FIRST, "on_miss": "go"}, num_blocks=6, block_size=1), seed=1),
        {"row_cost": 0.3},
    ),
    "the best of all lengths": Break(Planner, "chunk", best_of_all_lengths, CASES["pearl"]),
    "a late reply drops the whole chunk": Break(
        DraftServer,
        "_send_ahead",
        nothing,
        Case(Serving(LONG, {**ONE_BRANCH, "on_miss": "wait:3"}, free_steps=(0.0, 1.0), patience=TWO_STEPS), seed=6),
    ),
    "a late reply costs the next round its drafts": Break(
        Engine,
        "gives_up",
        whatever_came,
        Case(
            Serving(
                Rules(horizon=4, gamma=4, top_m=2, trims=0.5),
                {**ONE_BRANCH, "on_miss": "wait:4"},
                free_steps=(0.0, 1.0),
                patience=(0.0, 0.0, 0.0, 1.0),
            ),
            seed=23,
        ),
    ),
    "an eviction drops what was drawn": Break(
        DraftRequest,
        "evict",
        with_its_drafts,
        Case(
            Serving(
                replace(SHORT, gamma=3),
                {**ONE_BRANCH, "on_miss": "wait:3"},
                num_blocks=3,
                block_size=1,
                free_steps=NONE,
            )
        ),
    ),
    "an eviction drops what was drawn, two requests": Break(
        DraftRequest,
        "evict",
        with_its_drafts,
        Case(
            Serving(
                replace(SHORT, gamma=3),
                {**ADAEDL, "max_branches": 1, "on_miss": "wait:3"},
                num_requests=2,
                num_blocks=7,
                block_size=1,
                free_steps=NONE,
            ),
            seed=12,
        ),
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_code_is_rejected_and_the_right_one_is_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = BREAKS[name]
    for key, value in broken.timings.items():
        monkeypatch.setattr(StepTimings, key, property(lambda self, value=value: value))
    assert run(broken.case).difference < EXACT
    monkeypatch.setattr(broken.owner, broken.method, broken.broken)
    assert run(broken.case).difference > (REJECTED if not broken.timings else REJECTED / 10)
