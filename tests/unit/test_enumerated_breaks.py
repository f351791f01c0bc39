"""The enumeration of the real draft server rejects broken code: one method at a time is replaced, and the difference shows.

Owns the breaks; the cases of the right code are in `test_enumerated_server`. Each break has a case in which it shows, and the right
code is run on that case too.
"""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import pytest

from tests.enumerated_server import Engine, Serving
from tests.reference_round import Rules
from tests.unit.test_enumerated_server import (
    ADAEDL,
    BEST_FIRST,
    CASES,
    EXACT,
    LONG,
    NO_RULE,
    NONE,
    SHORT,
    TWO_STEPS,
    Case,
    run,
)
from vllm_specbranch.branching import Branching
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_sampling import draw
from vllm_specbranch.draft_server import DraftServer
from vllm_specbranch.draft_work import StepTimings
from vllm_specbranch.planner import Chunk, Planner
from vllm_specbranch.token_tree import Candidates, TokenTree

REJECTED = 1e-3


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


def best_of_all_lengths(self: Planner, tree: TokenTree, price: float = 0.0, length_class: int | None = None) -> Chunk:
    """`Planner.chunk` that ends before the least likely token of a chunk that is complete (rule 2)."""
    chunk = RIGHT_CHUNK(self, tree, price, length_class)
    if not chunk.is_complete or chunk.num_tokens < 2:
        return chunk
    parents = [tree.root, *tree.path(chunk.end)[:-1]]
    found = [tree.node(one) for one in parents]
    probs = [one.candidates.probs[one.candidates.token_ids.index(one.choice)] for one in found if one.candidates]
    length = probs.index(min(probs))
    return Chunk(parents[length], length, True, chunk.survival)


def without_what_was_unlikely(
    self: Planner, tree: TokenTree, price: float = 0.0, length_class: int | None = None
) -> Chunk:
    """`Planner.chunk` where class 2 is class 0 if another token than the likeliest was drawn first (rule 2)."""
    root = tree.node(tree.root)
    if length_class == 2 and root.candidates is not None and root.choice != root.candidates.token_ids[0]:
        length_class = 0
    return RIGHT_CHUNK(self, tree, price, length_class)


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


def to_nothing(self: DraftRequest) -> None:
    """`DraftRequest.shorten` that drops what was drawn with its KV (rule 2), as above."""
    (sequence,) = self._owned.values()
    self.tree.rollback(self.tree.num_tokens)
    self.tree.node(self.tree.root).candidates = None
    self._kv.rollback(sequence, min(self._kv.num_tokens(sequence), self.tree.num_tokens - 1))
    self._owned = {self.tree.root: sequence}
    self.chunk_end = self.tree.root
    self.is_shortened = True


def whatever_came(self: Engine) -> bool:
    """`Engine.gives_up` after each late reply."""
    return True


@dataclass(frozen=True)
class Break:
    """A method of the real code (or of the engine's side here), what takes its place, and a case that shows it.

    Attributes:
        timings: measured times of the draft steps that are given instead.
        evicts: pressure evicts where it would shorten, with the right code too.
    """

    owner: type
    method: str
    broken: Callable[..., object]
    case: Case
    timings: Mapping[str, float] = field(default_factory=dict)
    evicts: bool = False


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
        evicts=True,
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
    "a class that looks at a drawn token": Break(
        Planner, "chunk", without_what_was_unlikely, CASES["a head that always says 2"]
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
    "shortening drops what was drawn": Break(
        DraftRequest,
        "shorten",
        to_nothing,
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
                num_blocks=5,
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
    if broken.evicts:
        monkeypatch.setattr(DraftRequest, "shorten", DraftRequest.evict)
    assert run(broken.case).difference < EXACT
    monkeypatch.setattr(broken.owner, broken.method, broken.broken)
    assert run(broken.case).difference > (REJECTED if not broken.timings else REJECTED / 10)


def test_the_price_of_a_branch_and_its_growth_are_guarded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either break alone shows nothing in the third case above: values that are all alike stop all branches alike."""
    monkeypatch.setattr(DraftServer, "_prices", lambda self, peer, commits: [0.5] * len(commits))
    monkeypatch.setattr(StepTimings, "row_cost", property(lambda self: 0.3))
    monkeypatch.setattr(Branching, "grow_extension", by_what_was_drawn)
    monkeypatch.setattr(Branching, "extensions", where_it_pays)
    serving = Serving(LONG, {**BEST_FIRST, "on_miss": "go"}, num_blocks=6, block_size=1)
    assert run(Case(serving, seed=5)).difference > REJECTED
