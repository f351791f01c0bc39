"""Blocks that only rejected drafts had needed: who gives them up, when, and what the workers are told. On vLLM's real classes."""

import itertools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager

from tests.real_scheduler import Engine, make_config, make_scheduler
from vllm_specbranch.reclaim import SPARED_TOKENS, Giver, TargetBlocks, choose_givers, why_not

GAMMA = 8
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return make_config(BLOCK_SIZE, GAMMA, max_num_batched_tokens=64)


@pytest.fixture(scope="module")
def config_without() -> VllmConfig:
    return make_config(BLOCK_SIZE, GAMMA, max_num_batched_tokens=64, reclaim_blocks=False)


def engine_with(config: VllmConfig, *num_tokens: int, num_free: int = 0) -> Engine:
    """An engine whose running requests have so many committed tokens each, and whose pool has so many free blocks left."""
    engine = Engine(config, 20)
    for index, count in enumerate(num_tokens):
        engine.add([50 + index, *range(count - 2)], max_tokens=30)
    engine.step()
    assert [one.num_tokens for one in engine.scheduler.running] == list(num_tokens)
    hog(engine, num_free)
    return engine


def hog(engine: Engine, num_free: int) -> None:
    """Leave so many blocks in the pool; who has them does not matter here."""
    engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - num_free)


def rejected_drafts(engine: Engine, number: int = 0) -> Any:
    """A request has a full chunk verified, all of it in vain; returns it."""
    request = engine.scheduler.running[number]
    engine.draft({request.request_id: list(range(GAMMA))})
    assert len(engine.step().scheduled_spec_decode_tokens[request.request_id]) == GAMMA
    return request


def chunks(engine: Engine, *lengths: int) -> list[int]:
    """Drafts of such lengths come in; returns what a step would verify of them."""
    running = engine.scheduler.running
    engine.draft({one.request_id: list(range(length)) for one, length in zip(running, lengths, strict=True)})
    engine.scheduler._make_room()
    assert all(one.spec_token_ids == list(range(len(one.spec_token_ids))) for one in running), "the first ones stay"
    return [len(one.spec_token_ids) for one in running]


def status(engine: Engine) -> dict[str, int]:
    return engine.scheduler._counters.as_dict()


@pytest.mark.parametrize("length", range(GAMMA + 1))
@pytest.mark.parametrize(("num_tokens", "room"), [(15, 1), (16, 0), (10, 6), (4, GAMMA)])
def test_without_free_blocks_a_chunk_is_cut_to_the_room_there_is_whatever_its_own_length(
    config: VllmConfig, num_tokens: int, room: int, length: int
) -> None:
    """Rule 2 of the design: neither condition nor room look at drafts, of whichever request."""
    for other in (0, GAMMA):
        assert chunks(engine_with(config, num_tokens, 12), length, other)[0] == min(length, room)


def test_with_a_block_for_every_full_chunk_none_is_cut(config: VllmConfig) -> None:
    engine = engine_with(config, 15, 14, num_free=2)
    assert chunks(engine, GAMMA, GAMMA) == [GAMMA, GAMMA]
    assert status(engine)["num_short_steps"] == 0


def test_plenty_is_no_more_than_what_full_chunks_could_need(config: VllmConfig) -> None:
    """With that many free blocks nobody counts; with one fewer the count says the same."""
    engine = engine_with(config, 15, 14, 13, num_free=3)
    reclaimer = engine.scheduler._reclaimer
    assert reclaimer._has_plenty(engine.scheduler.running)
    needs = [reclaimer._blocks.num_missing(one, one.num_tokens + GAMMA) for one in engine.scheduler.running]
    assert sum(needs) == 3
    hog(engine, 2)
    assert not reclaimer._has_plenty(engine.scheduler.running)
    engine.add([60] * 40, 20)
    assert not reclaimer._has_plenty([*engine.scheduler.running, *engine.scheduler.waiting]), "a prompt needs more"


def test_a_block_for_the_next_token_has_room_for_drafts_and_is_not_given_away(config: VllmConfig) -> None:
    engine = engine_with(config, 16, 14, num_free=1)
    engine.step()
    assert [one.num_tokens for one in engine.scheduler.running] == [17, 15]
    assert chunks(engine, GAMMA, GAMMA) == [GAMMA, 1]


def test_spare_blocks_go_to_chunks_in_order_when_they_can_be_taken_back(config: VllmConfig) -> None:
    engine = engine_with(config, 15, 14, 13, num_free=2)
    assert chunks(engine, GAMMA, GAMMA, GAMMA) == [GAMMA, GAMMA, 3]
    assert (status(engine)["num_short_steps"], status(engine)["num_cut_draft_tokens"]) == (1, GAMMA - 3)


@pytest.mark.parametrize("num_free", range(4))
def test_who_gets_a_block_does_not_depend_on_anybody_s_chunk(config: VllmConfig, num_free: int) -> None:
    """Rule 2 of the design, also for blocks that are given: the room is what a full chunk would get."""
    rooms = chunks(engine_with(config, 15, 14, 13, num_free=num_free), GAMMA, GAMMA, GAMMA)
    for lengths in itertools.product((0, 1, 3, GAMMA), repeat=3):
        engine = engine_with(config, 15, 14, 13, num_free=num_free)
        assert chunks(engine, *lengths) == [min(pair) for pair in zip(lengths, rooms, strict=True)]


def test_without_reclamation_a_shortage_leaves_none_for_drafts(config_without: VllmConfig) -> None:
    engine = engine_with(config_without, 15, 14, 13, num_free=2)
    assert chunks(engine, GAMMA, GAMMA, GAMMA) == [1, 2, 3]


def shortage(config: VllmConfig, *others: int) -> tuple[Engine, Any, Any]:
    """An engine without a free block, a request with a surplus block, and one whose next token needs a block."""
    engine = engine_with(config, 11, 15, *others, num_free=2 + len(others))
    giver = rejected_drafts(engine)
    hog(engine, 0)
    engine.step()  # 16 tokens fit into a block, the 17th does not
    needy = engine.scheduler.running[1]
    assert (needy.num_tokens, len(engine.blocks(needy.request_id))) == (17, 1)
    assert (giver.num_tokens, len(engine.blocks(giver.request_id))) == (13, 2)
    return engine, giver.request_id, needy.request_id


def test_a_surplus_block_saves_another_request_from_preemption(config: VllmConfig) -> None:
    engine, giver, needy = shortage(config)
    block = engine.blocks(giver)[1]
    output = engine.step()
    assert not output.preempted_req_ids
    assert engine.blocks(needy)[1] == block
    cached = output.scheduled_cached_reqs
    assert cached.resumed_req_ids == {giver}
    assert cached.new_block_ids[cached.req_ids.index(giver)] == (engine.blocks(giver),)
    assert output.scheduler_status["reclaim_blocks"] == "on"
    assert (status(engine)["num_reclaimed_blocks"], status(engine)["num_reclaims"]) == (1, 1)
    assert engine.step().scheduled_cached_reqs.resumed_req_ids == set(), "once is enough"


def test_without_reclamation_it_is_preempted(config_without: VllmConfig) -> None:
    engine, _, needy = shortage(config_without)
    output = engine.step()
    assert output.preempted_req_ids == {needy}
    assert output.scheduler_status["reclaim_blocks"] == "off"
    assert (status(engine)["num_preemptions"], status(engine)["num_reclaims"]) == (1, 0)


def test_a_request_that_is_not_scheduled_is_sent_whole_when_it_is(config: VllmConfig) -> None:
    engine, giver, _ = shortage(config)
    engine.scheduler._make_room()
    engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not engine.step().num_scheduled_tokens
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert engine.step().scheduled_cached_reqs.resumed_req_ids == {giver}


def test_blocks_do_not_bounce(config: VllmConfig) -> None:
    """After a reclamation drafts get no new block until there is one for every full chunk."""
    engine, _giver, _needy = shortage(config, 12)
    engine.step()
    assert status(engine)["num_reclaims"] == 1
    assert [one.num_tokens for one in engine.scheduler.running] == [14, 18, 15]
    hogged = [block for block in engine.pool.blocks if block.ref_cnt and not block.is_null]
    held = [block for name in engine.scheduler.requests for block in engine.blocks(name)]
    spare = [block for block in hogged if block.block_id not in held]
    engine.pool.free_blocks(spare[:1])
    assert chunks(engine, GAMMA, GAMMA, GAMMA) == [2, GAMMA, 1], "one free block for two requests: nobody gets it"
    engine.pool.free_blocks(spare[1:2])
    assert chunks(engine, GAMMA, GAMMA, GAMMA) == [GAMMA, GAMMA, GAMMA]
    hog(engine, 1)
    assert chunks(engine, GAMMA, GAMMA, GAMMA) == [GAMMA, GAMMA, 1], "the shortage is over: the first one gets it"


@given(
    givers=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 31)), max_size=8),
    num_blocks=st.integers(1, 12),
)
def test_givers_are_enough_or_none_and_no_more_than_needed(givers: list[tuple[int, int]], num_blocks: int) -> None:
    known = {str(index): Giver(str(index), *one) for index, one in enumerate(givers)}
    able = {name: one for name, one in known.items() if one.num_blocks and one.num_tokens_to_spare >= SPARED_TOKENS}
    chosen = choose_givers(known.values(), num_blocks)
    assert len(set(chosen)) == len(chosen) and set(chosen) <= able.keys()
    if sum(one.num_blocks for one in able.values()) < num_blocks:
        assert chosen == []
        return
    given_up = [known[name].num_blocks for name in chosen]
    assert sum(given_up) >= num_blocks > sum(given_up[:-1])
    kept = [one.num_tokens_to_spare for name, one in able.items() if name not in chosen]
    assert all(known[name].num_tokens_to_spare >= spare for name in chosen for spare in kept)


def surplus_of(engine: Engine, request: Any) -> int:
    return TargetBlocks(engine.manager).num_surplus(request, request.num_tokens)


def test_what_is_no_surplus(config: VllmConfig) -> None:
    engine = engine_with(config, 11, num_free=5)
    request = rejected_drafts(engine)
    assert surplus_of(engine, request) == 1
    (manager,) = engine.manager.coordinator.single_type_managers
    table = manager.req_to_blocks[request.request_id]

    table[-1].ref_cnt += 1
    assert surplus_of(engine, request) == 0, "shared"
    table[-1].ref_cnt -= 1

    table[-1].set_block_hash(b"hash", num_tokens=32)
    assert surplus_of(engine, request) == 0, "in the prefix cache"
    table[-1].reset_hash()

    manager.num_cached_block[request.request_id] = 2
    assert surplus_of(engine, request) == 0, "below the cached count"
    manager.num_cached_block[request.request_id] = 0

    request.num_in_flight_tokens = 1
    assert surplus_of(engine, request) == 0, "a step is under way"
    request.num_in_flight_tokens = 0

    computed, request.num_computed_tokens = request.num_computed_tokens, 17
    assert surplus_of(engine, request) == 0, "computed"
    request.num_computed_tokens = computed
    assert surplus_of(engine, request) == 1


def test_every_kv_cache_group_counts(config: VllmConfig) -> None:
    scheduler = make_scheduler(config, 40, num_groups=2)
    blocks = TargetBlocks(scheduler.kv_cache_manager)
    first, second = scheduler.kv_cache_manager.coordinator.single_type_managers
    request: Any = SimpleNamespace(
        request_id="a", num_in_flight_tokens=0, num_output_placeholders=0, num_computed_tokens=10, num_tokens=11
    )
    first.req_to_blocks["a"] = blocks._pool.get_new_blocks(2)
    second.req_to_blocks["a"] = blocks._pool.get_new_blocks(3)
    assert blocks.num_slots(request, 11) == 2 * BLOCK_SIZE
    assert blocks.num_missing(request, 49) == 2 + 1
    assert blocks.num_surplus(request, 11) == 1 + 2
    num_free = blocks.num_free
    assert blocks.take_surplus(request, 11) == 3
    assert blocks.num_free == num_free + 3
    assert (len(first.req_to_blocks["a"]), len(second.req_to_blocks["a"])) == (1, 1)


def scheduler_like(**changes: Any) -> Any:
    made = SimpleNamespace(
        connector=None,
        aux_output_connector=None,
        vllm_config=SimpleNamespace(max_concurrent_batches=1),
        use_v2_model_runner=False,
        kv_cache_manager=SimpleNamespace(
            coordinator=SimpleNamespace(single_type_managers=[FullAttentionManager.__new__(FullAttentionManager)])
        ),
    )
    made.__dict__.update(changes)
    return made


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"connector": object()}, "KV connector"),
        ({"aux_output_connector": object()}, "auxiliary outputs"),
        ({"vllm_config": SimpleNamespace(max_concurrent_batches=2)}, "steps overlap"),
        ({"use_v2_model_runner": True}, "V2 model runner"),
    ],
)
def test_conditions_under_which_it_is_off(changes: dict[str, Any], reason: str) -> None:
    assert why_not(scheduler_like()) is None
    assert reason in str(why_not(scheduler_like(**changes)))


def test_with_a_kv_connector_it_is_off_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real one of vLLM's: the same shortage ends in a preemption, as without reclamation."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with caplog.at_level(logging.INFO, logger="vllm.specbranch"):
        engine, _, needy = shortage(make_config(BLOCK_SIZE, GAMMA, 64, kv_transfer_config=connector))
    assert "reclaim_blocks is off: a KV connector" in caplog.text
    output = engine.step()
    assert output.preempted_req_ids == {needy}
    assert str(output.scheduler_status["reclaim_blocks"]).startswith("off: a KV connector")


def test_it_is_off_with_other_kinds_of_attention() -> None:
    made = scheduler_like()
    made.kv_cache_manager.coordinator.single_type_managers.append(SlidingWindowManager.__new__(SlidingWindowManager))
    assert "SlidingWindowManager" in str(why_not(made))
