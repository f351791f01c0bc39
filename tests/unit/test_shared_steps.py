"""Draft steps that several engines share: rows, turns, prefills and KV blocks. Fake model, clock that stands still."""

from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.draft_engine import BLOCK_SIZE, Clock
from tests.fakes import FakeDraftModel
from vllm_specbranch import draft_steps
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_server import Reply
from vllm_specbranch.draft_sessions import SILENT_S, Offer, SharedDraftServer
from vllm_specbranch.draft_steps import PREFILL_PATIENCE, Batch
from vllm_specbranch.draft_work import MAX_DECODE_TOKENS, Limits
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.messages import Commit, CommitBatch, DraftBatch, Hello, Open, StepBegin, Terms
from vllm_specbranch.metrics import DraftServerCounters

ONE, TWO, THREE = ENGINES = (b"one", b"two", b"three")


class Shared:
    """A shared server, and engines that say what they are told to."""

    def __init__(self, num_blocks: int = 400, limits: Limits | None = None, **keys: object) -> None:
        config = SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": 4, "max_branches": 4} | keys)
        self.clock = Clock()
        self.model = FakeDraftModel(num_blocks, BLOCK_SIZE, confidences=(0.6,))
        kv = KVBlocks(num_blocks, BLOCK_SIZE)
        offer = Offer("identity", "float32", 4)
        server = make_server(config, self.model, kv, limits or Limits(), self.clock, offer=offer)
        assert isinstance(server, SharedDraftServer)
        self.server = server
        self.round = 0
        for peer in ENGINES:
            server.handle(peer, Hello("s", 50, 500, False, Terms("identity", "float32", 4)))

    def open(self, peer: bytes, *names: str, num_tokens: int = 3, first: int = 0) -> None:
        tokens = [(first + index) % 50 for index in range(num_tokens)]
        self.server.handle(peer, StepBegin([Open(name, tokens, None) for name in names], []))

    def commit(self, peer: bytes, names: Collection[str], max_wait_ms: float = 0.0, token: int = 49) -> list[Reply]:
        """A token more for each request, by default one that is no branch's."""
        self.round += 1
        commits = []
        for name in names:
            position = self.server._requests[peer, name].tree.num_tokens
            commits.append(Commit(name, position, [token], 0, None))
        return self.server.handle(peer, CommitBatch(self.round, max_wait_ms, commits, None))

    def step(self, duration_s: float = 0.001) -> tuple[Batch, list[Reply]]:
        batch = self.server.begin_step()
        assert batch is not None
        self.clock.now_s += duration_s
        replies = self.server.finish_step(batch, self.server.run_forward(batch))
        self.server.check_integrity()
        return batch, replies


def engines_of(batch: Batch) -> Counter[bytes]:
    return Counter(one.request.engine for one in batch.work)


def test_an_engine_with_many_requests_leaves_the_others_their_rows() -> None:
    bench = Shared(limits=Limits(num_rows=8))
    bench.open(ONE, *(f"r{number}" for number in range(50)))
    bench.open(TWO, "a")
    bench.open(THREE, "a", first=20)
    for _ in range(20):
        wanted = {peer: len(rows) for peer, rows in bench.server._wishes(()).rows.items()}
        rows = engines_of(bench.step()[0])
        assert sum(rows.values()) == 8, "all rows are used"
        for peer in (TWO, THREE):
            assert rows[peer] >= min(wanted.get(peer, 0), 8 // 3)


def serve(
    bench: Shared, requests: dict[bytes, list[str]], num_steps: int = 400, round_steps: int = 12
) -> Counter[bytes]:
    """Rounds of all engines, one after the other a few steps apart; returns the rows that each got."""
    rows = Counter[bytes]()
    offsets = {peer: index * round_steps // len(requests) for index, peer in enumerate(requests)}
    for peer, names in requests.items():
        bench.open(peer, *names, first=ENGINES.index(peer))
    for number in range(num_steps):
        for peer, names in requests.items():
            if number % round_steps == offsets[peer]:
                bench.commit(peer, names, 3.0, token=number % 50)
        batch = bench.server.begin_step()
        bench.clock.now_s += 0.001
        if batch is not None:
            rows += engines_of(batch)
            bench.server.finish_step(batch, bench.server.run_forward(batch))
        else:
            bench.server.replies_due()
    bench.server.check_integrity()
    return rows


@pytest.mark.parametrize("policy", ["specbranch", "best_first"])
def test_engines_that_do_the_same_get_the_same_and_a_crowd_takes_nothing_from_them(policy: str) -> None:
    """Within the 20% that the issue allows: shares on a step of 12 rows, of which each alone could use all."""
    alike = serve(Shared(4000, Limits(num_rows=12), policy=policy), {peer: ["a", "b", "c"] for peer in ENGINES})
    mean = sum(alike.values()) / len(ENGINES)
    assert all(abs(count / mean - 1) <= 0.2 for count in alike.values()), alike
    crowd = {ONE: [f"r{number}" for number in range(100)], TWO: ["a", "b", "c"], THREE: ["a", "b", "c"]}
    crowded = serve(Shared(4000, Limits(num_rows=12), policy=policy), crowd)
    assert all(crowded[peer] >= 0.8 * alike[peer] for peer in (TWO, THREE)), crowded


def test_a_row_more_goes_to_another_engine_each_time() -> None:
    bench = Shared(limits=Limits(num_rows=1))
    for peer in ENGINES:
        bench.open(peer, "a", "b", "c")
    rows = Counter[bytes]()
    for _ in range(9):
        rows += engines_of(bench.step()[0])
    assert rows == dict.fromkeys(ENGINES, 3)


def test_many_rows_do_not_make_a_small_engines_steps_longer_than_its_share() -> None:
    """Rows cost half a step each here: beside one row of one engine, the other has two, for a step of twice the time."""
    bench = Shared(policy="pearl", max_branches=1)
    bench.open(ONE, *(f"r{number}" for number in range(30)))
    for num_rows in (30, 10, 20, 1) * 3:
        bench.server._timings.observe(num_rows, 0.001 * (1 + 0.5 * (num_rows - 1)))
    assert bench.server._timings.row_cost == pytest.approx(0.5, rel=0.01)
    assert engines_of(bench.step(0.0155)[0]) == {ONE: 30}, "alone it may have them all"
    bench.open(TWO, "a")
    for _ in range(3):
        assert engines_of(bench.step(0.002)[0]) == {ONE: 2, TWO: 1}


def test_replies_that_wait_do_not_starve_the_other_engines() -> None:
    bench = Shared(policy="specbranch", stop_rule="none", on_miss="wait:4")
    bench.open(ONE, "a", "b")
    bench.open(TWO, "a", "b", "c", "d")
    assert bench.commit(ONE, ("a", "b"), 1e4) == [], "the reply waits"
    served = Counter[bytes]()
    for _ in range(4):
        batch, replies = bench.step()
        rows = engines_of(batch)
        assert rows[ONE] == 2
        assert rows[TWO] == 2, "as many as has who waits"
        served += rows
    ((peer, reply),) = replies
    assert peer == ONE
    assert isinstance(reply, DraftBatch) and [len(one.tokens) for one in reply.drafts] == [4, 4]


def test_a_prefill_is_not_put_off_for_ever_by_replies_that_wait() -> None:
    bench = Shared(policy="specbranch", stop_rule="none", on_miss="wait:4")
    bench.open(ONE, "a")
    bench.step()
    bench.open(TWO, "long", num_tokens=200)
    has_prefill = []
    for _ in range(15):
        if bench.server._peers[ONE].pending is None:
            assert bench.commit(ONE, ("a",), 1e4) == []
        batch, _ = bench.step()
        assert engines_of(batch)[ONE] == 1
        has_prefill.append(any(one.num_tokens > MAX_DECODE_TOKENS for one in batch.work))
    first = has_prefill.index(True)
    assert first <= PREFILL_PATIENCE
    assert has_prefill[first : first + 10] == 2 * [True, *[False] * PREFILL_PATIENCE], "and puts the replies off seldom"


def test_prefills_take_turns_between_engines() -> None:
    bench = Shared(limits=Limits(prefill_tokens=20))
    bench.open(ONE, *(f"r{number}" for number in range(10)), num_tokens=60)
    bench.open(TWO, "a", num_tokens=60)
    prefilled = []
    for _ in range(6):
        batch, _ = bench.step()
        prefilled += [one.request.engine for one in batch.work if one.num_tokens > MAX_DECODE_TOKENS]
    assert prefilled == [ONE, TWO] * 3


def test_what_an_engine_leaves_of_its_chunk_of_prefills_the_next_one_takes() -> None:
    bench = Shared(limits=Limits(prefill_tokens=60))
    bench.open(ONE, "a", "b", "c", "d", num_tokens=25)
    bench.open(TWO, "a", num_tokens=50, first=20)
    chunks = []
    for _ in range(2):
        chunk = bench.server._chunk_of(bench.server._wishes(()).prefills)
        chunks.append([(one.request.engine, one.num_tokens) for one in chunk])
        batch, _ = bench.step()
        assert batch.work[-len(chunk) :] == chunk
    assert chunks == [[(ONE, 25), (ONE, 25), (ONE, 10)], [(TWO, 50), (ONE, 10)]]


def test_a_reply_does_not_wait_where_the_others_rows_would_make_it_late() -> None:
    """One row takes 1 ms, and each further row as much: beside two engines' rows there is no time for another step."""
    lengths = {}
    for peers in ((), (TWO, THREE)):
        bench = Shared(policy="specbranch", stop_rule="none", on_miss="wait:4")
        for num_rows in (1, 2, 3) * 5:
            bench.server._timings.observe(num_rows, 0.001 * num_rows)
        bench.open(ONE, "a")
        for peer in peers:
            bench.open(peer, "a", first=20)
        bench.step(0.001 * (1 + len(peers)))
        replies = bench.commit(ONE, ("a",), 2.5)
        while not replies:
            replies = bench.step(0.001)[1]
        assert isinstance(replies[0][1], DraftBatch)
        lengths[len(peers)] = len(replies[0][1].drafts[0].tokens)
    assert lengths == {0: 2, 2: 0}


def test_all_requests_are_drafted_for_though_not_all_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_steps, "MOST_IN_VIEW", 8)
    bench = Shared(num_blocks=2000, policy="pearl", max_branches=1)
    names = [f"r{number}" for number in range(30)]
    bench.open(ONE, *names)
    bench.open(TWO, "a")
    most = 0
    while (batch := bench.server.begin_step()) is not None:
        most = max(most, len(batch.work))
        bench.server.finish_step(batch, bench.server.run_forward(batch))
    assert most == 4 + 1
    for name in names:
        request = bench.server._requests[ONE, name]
        assert bench.server._planner.rows(request.tree) == [], "nothing is left to draft"
    bench.open(ONE, "late", first=20)
    batch = bench.server.begin_step()
    assert batch is not None, "those in view have nothing to draft, but another has"
    assert [one.request for one in batch.work] == [bench.server._requests[ONE, "late"]]


def held_by(server: SharedDraftServer) -> Counter[bytes]:
    held = Counter(dict.fromkeys({request.engine for request in server._requests.values()}, 0))
    for request in server._requests.values():
        held[request.engine] += len(request.block_ids())
    return held


def test_an_engine_below_its_share_keeps_its_blocks_however_many_another_wants() -> None:
    bench = Shared(num_blocks=40, policy="specbranch", stop_rule="none")
    bench.open(TWO, "a", num_tokens=15)
    while bench.server.step()[1]:
        pass
    before = held_by(bench.server)[TWO]
    bench.open(ONE, *(f"r{number}" for number in range(20)), num_tokens=15, first=7)
    for _ in range(200):
        if bench.server.begin_step() is None:
            break
        batch = bench.server._in_flight
        assert batch is not None
        bench.server.finish_step(batch, bench.server.run_forward(batch))
        bench.server.check_integrity()
    counters = bench.server.counters
    assert counters.num_narrowings + counters.num_shortenings + counters.num_evictions > 0, "blocks did run short"
    assert held_by(bench.server)[TWO] >= before
    assert not bench.server._requests[TWO, "a"].is_resting
    assert held_by(bench.server)[ONE] > 20, "what the other does not use is taken"


@pytest.mark.parametrize("silent_s", [0.0, SILENT_S + 1.0])
def test_an_engine_that_may_be_gone_gives_before_those_that_are_there(silent_s: float) -> None:
    """An engine that was cut off is two for a while, and must not be kept from blocks by what it was."""
    bench = Shared(num_blocks=40, policy="specbranch", stop_rule="none")
    bench.open(TWO, "a", num_tokens=30)
    while bench.server.step()[1]:
        pass
    before = held_by(bench.server)[TWO]
    bench.clock.now_s += silent_s
    bench.open(ONE, *(f"r{number}" for number in range(20)), num_tokens=15, first=7)
    for _ in range(200):
        if not bench.server.step()[1]:
            break
        bench.server.check_integrity()
    held, counters = held_by(bench.server), bench.server.counters
    assert counters.num_narrowings + counters.num_shortenings + counters.num_evictions > 0, "blocks did run short"
    if silent_s:
        assert held[TWO] == 0 and held[ONE] > 40 - before
    else:
        assert held[TWO] >= before
    bench.commit(TWO, ["a"])
    assert not bench.server._requests[TWO, "a"].is_resting, "one that is there after all is drafted for again"


class Pressed(RuleBasedStateMachine):
    """Three engines on a pool for a few requests. Whoever gives blocks holds, with what it is about to take, the most."""

    @initialize(num_blocks=st.integers(12, 40), policy=st.sampled_from(["specbranch", "best_first"]))
    def begin(self, num_blocks: int, policy: str) -> None:
        self.bench = Shared(num_blocks, Limits(8, 64, 20), policy=policy, on_miss="wait:2")
        self.names: dict[bytes, list[str]] = {peer: [] for peer in ENGINES}
        self.number = 0
        server = self.bench.server
        original = draft_steps.relieve

        def checked(requests: list[DraftRequest], needed: set[int], counters: DraftServerCounters) -> bool:
            (engine,) = {request.engine for request in requests}
            held = held_by(server)
            new = {
                peer: sum(server._num_new_blocks([one]) for one in self.work if one.request.engine == peer)
                for peer in held
            }
            assert held[engine] + new[engine] == max(held[peer] + new[peer] for peer in held)
            before = dict(held)
            freed = original(requests, needed, counters)
            assert all(held_by(server)[peer] == before[peer] for peer in held if peer != engine), "nobody else gives"
            return freed

        self.work: list[Any] = []
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(draft_steps, "relieve", checked)

        who_gives = server._who_gives

        def seen(work: list[Any]) -> bytes:
            self.work = list(work)
            return who_gives(work)

        self.patch.setattr(server, "_who_gives", seen)

    @rule(peer=st.sampled_from(ENGINES), num_tokens=st.integers(1, 40), first=st.integers(0, 49))
    def open(self, peer: bytes, num_tokens: int, first: int) -> None:
        if len(self.names[peer]) < 4:
            self.number += 1
            self.names[peer].append(f"r{self.number}")
            self.bench.open(peer, f"r{self.number}", num_tokens=num_tokens, first=first)

    @rule(peer=st.sampled_from(ENGINES), token=st.integers(0, 49), max_wait_ms=st.sampled_from([0.0, 5.0]))
    def commit(self, peer: bytes, token: int, max_wait_ms: float) -> None:
        if self.names[peer]:
            self.bench.commit(peer, self.names[peer], max_wait_ms, token)

    @rule(peer=st.sampled_from(ENGINES))
    def close(self, peer: bytes) -> None:
        if self.names[peer]:
            self.bench.server.handle(peer, StepBegin([], [self.names[peer].pop(0)]))

    @rule(count=st.integers(1, 10))
    def draft(self, count: int) -> None:
        for _ in range(count):
            batch = self.bench.server.begin_step()
            if batch is None:
                break
            self.bench.clock.now_s += 0.001
            self.bench.server.finish_step(batch, self.bench.server.run_forward(batch))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.bench.server.check_integrity()

    def teardown(self) -> None:
        self.patch.undo()


TestPressed = Pressed.TestCase
TestPressed.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
