"""The draft server with too little of something: a step's tokens or rows, the draft's context, the pool, or worth in drafting.

In memory, with a fake model.
"""

from collections.abc import Sequence
from typing import Any

from tests.draft_engine import make_engine
from vllm_specbranch import messages
from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.token_tree import Candidates


def test_a_long_prompt_delays_other_drafts_by_one_chunk_at_most() -> None:
    engine = make_engine(limits=Limits(prefill_tokens=32))
    engine.open("short", [1, 2, 3])
    engine.run(100)
    engine.open("long", list(range(50)) * 8)
    engine.commit({"short": engine.follow("short", 0)})
    counters = engine.server.counters
    while counters.num_prefill_tokens < 384:
        before = counters.num_prefill_tokens
        _, worked = engine.server.step()
        assert worked
        assert counters.num_prefill_tokens - before <= 32


def test_a_request_at_the_end_of_the_draft_context_gets_no_drafts_and_holds_no_blocks() -> None:
    engine = make_engine()
    engine.server._model.max_model_len = 12
    engine.model.max_model_len = 12
    engine.open("a", [1, 2, 3, 4, 5])
    for _ in range(12):
        engine.run(50)
        engine.commit({"a": engine.follow("a", min(1, len(engine.drafts["a"])))})
    assert engine.drafts["a"] == []
    assert engine.server.kv.num_held == 0


def test_a_request_too_large_for_the_pool_is_left_alone() -> None:
    engine = make_engine(num_blocks=8)
    engine.open("big", list(range(40)))
    engine.open("small", [1, 2, 3])
    engine.run(200)
    engine.commit({"big": engine.follow("big", 0), "small": engine.follow("small", 0)})
    engine.run(200)
    engine.commit({"big": engine.follow("big", 0), "small": engine.follow("small", 0)})
    assert engine.drafts["big"] == []
    assert engine.server.counters.num_evictions > 0


def test_more_requests_than_rows_all_get_their_turn() -> None:
    engine = make_engine(policy="pearl", limits=Limits(num_rows=4))
    for number in range(12):
        engine.open(f"r{number}", [number, 1, 2])
    engine.run(200)
    for _ in range(6):
        engine.commit({name: engine.follow(name, len(engine.drafts[name])) for name in engine.sequences})
        for _ in range(3 * 4):
            engine.server.step()
    lengths = [len(engine.sequences[name]) for name in engine.sequences]
    assert min(lengths) >= 0.6 * max(lengths), lengths


def test_a_price_above_all_worth_ends_drafting_and_scouts_go_on() -> None:
    """Where verification costs more than it can gain, nothing is submitted, awaited or drafted, but for a scout now and then."""
    engine = make_engine(policy="best_first")
    for name in ("a", "b"):
        engine.open(name, [1, 2, 3])
    engine.run(100)
    # A token more makes a round longer by 8 ms, in which the batch commits more than one token anyway.
    for index in range(60):
        pace = messages.Pace(2 + index % 3, 1e3 * (2.0 + 8.0 * (index % 3)), 0.0)
        engine.commit({name: engine.follow(name, 0) for name in ("a", "b")}, pace=pace, round_s=0.01)
        engine.run(20)
    assert next(iter(engine.server._peers.values())).price > 1.0
    submitted, steps = [], []
    for _ in range(256):
        before = engine.server.counters.num_steps
        engine.commit({name: engine.follow(name, 0) for name in ("a", "b")}, pace=pace, round_s=0.01)
        engine.run(20)
        steps.append(engine.server.counters.num_steps > before)
        submitted.append(sum(bool(draft) for draft in engine.drafts.values()))
    assert 0 < sum(submitted) <= 2 * 8
    assert sum(steps) <= 2 * 9


def test_what_a_row_costs_is_learned_anew_after_a_bad_start() -> None:
    """Where rows seem dear only one is fed, and then nothing shows that they are cheap: now and then all are."""
    engine = make_engine(policy="best_first", max_branches=32)
    engine.model.confidences = (0.4,)
    forward = engine.model.forward

    def timed(rows: Sequence[Row], *args: Any) -> list[Candidates]:
        slow = 5.0 if engine.model.num_forwards < 12 else 0.02
        engine.clock.now_s += 1e-3 * (1.0 + slow * (len(rows) - 1))
        return forward(rows, *args)

    engine.model.forward = timed  # type: ignore[method-assign]
    engine.open("a", [1, 2, 3])
    for _ in range(150):
        engine.run(8)
        engine.commit({"a": engine.follow("a", min(1, len(engine.drafts["a"])))})
        if len(engine.sequences["a"]) > 300:
            engine.close("a")
            engine.open("a", [1, 2, 3])
    assert engine.server._timings.row_cost < 0.1
    assert sum(engine.model.rows_per_forward[-200:]) > 400
