"""What our scheduler adds to vLLM's: distributions that wait for their tokens, and chunks cut to the room there is."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import DraftTokenIds

from vllm_specbranch.draft_distributions import ChunkDistributions, SampledDraftTokenIds
from vllm_specbranch.scheduler import SpecBranchScheduler

BLOCK_SIZE = 16


def request(name: str, num_tokens: int, drafts: list[int] | None = None, num_blocks: int = 1) -> Any:
    return SimpleNamespace(request_id=name, num_tokens=num_tokens, spec_token_ids=drafts or [], num_blocks=num_blocks)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ours, with vLLM's part replaced: `next_output` is what it schedules, updates do nothing."""
    ours: Any = SpecBranchScheduler.__new__(SpecBranchScheduler)
    ours._draft_distributions = {}
    ours.requests = {}
    ours.running = []
    ours.num_spec_tokens = 8
    ours.num_lookahead_tokens = 0
    ours.kv_cache_config = SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=BLOCK_SIZE))]
    )
    ours.kv_cache_manager = SimpleNamespace(
        get_blocks=lambda name: SimpleNamespace(blocks=([0] * ours.requests[name].num_blocks,)),
        block_pool=SimpleNamespace(get_num_free_blocks=lambda: ours.num_free),
    )
    ours.num_free = 100
    monkeypatch.setattr(Scheduler, "schedule", lambda self, throttle: self.next_output)
    monkeypatch.setattr(Scheduler, "update_draft_token_ids", lambda self, drafts: None)
    monkeypatch.setattr(Scheduler, "get_request_counts", lambda self: (len(self.running), 3))
    return ours


def step(scheduler: Any, scheduled: dict[str, list[int]], finished: set[str] | None = None) -> Any:
    scheduler.next_output = SchedulerOutput(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=CachedRequestData.make_empty(),
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        scheduled_spec_decode_tokens=scheduled,
        scheduled_encoder_inputs={},
        num_common_prefix_blocks=[],
        finished_req_ids=finished or set(),
        free_encoder_mm_hashes=[],
    )
    return scheduler.schedule()


def known(position: int, *tokens: int) -> ChunkDistributions:
    return ChunkDistributions(position, tokens, b"ids", b"probs")


def update(scheduler: Any, drafts: dict[str, list[int]], distributions: dict[str, ChunkDistributions]) -> None:
    scheduler.update_draft_token_ids(SampledDraftTokenIds(list(drafts), list(drafts.values()), distributions))


def run(scheduler: Any, *requests: Any) -> None:
    scheduler.running = list(requests)
    scheduler.requests = {one.request_id: one for one in requests}


def test_a_distribution_waits_for_its_tokens_and_goes_with_them_once(scheduler: Any) -> None:
    run(scheduler, request("a", 5), request("b", 9))
    update(scheduler, {"a": [1, 2], "b": [3]}, {"a": known(5, 1, 2)})
    assert step(scheduler, {}).draft_distributions == {}, "not scheduled in this step"
    output = step(scheduler, {"a": [1], "b": [3]})
    assert output.draft_distributions == {"a": known(5, 1, 2)}, "also for a chunk that was cut"
    assert output.num_waiting_requests == 3
    assert step(scheduler, {"a": [1]}).draft_distributions == {}, "vLLM never schedules a draft token twice"


def test_a_distribution_of_other_tokens_or_of_another_place_is_not_used(scheduler: Any) -> None:
    run(scheduler, request("a", 5), request("b", 9))
    update(scheduler, {"a": [1], "b": [3]}, {"a": known(5, 1), "b": known(8, 3)})
    assert step(scheduler, {"a": [7], "b": [3]}).draft_distributions == {}


def test_newer_drafts_without_a_distribution_take_the_old_one_away(scheduler: Any) -> None:
    run(scheduler, request("a", 5))
    update(scheduler, {"a": [1]}, {"a": known(5, 1)})
    update(scheduler, {"a": [1]}, {})
    assert step(scheduler, {"a": [1]}).draft_distributions == {}


def test_finished_requests_leave_nothing_behind(scheduler: Any) -> None:
    run(scheduler, request("a", 5), request("b", 5))
    update(scheduler, {"a": [1], "gone": [1]}, {"a": known(5, 1), "gone": known(5, 1)})
    assert set(scheduler._draft_distributions) == {"a"}
    step(scheduler, {}, finished={"a"})
    assert scheduler._draft_distributions == {}


def test_drafts_of_vllm_s_own_kind_pass_through(scheduler: Any) -> None:
    run(scheduler, request("a", 5))
    scheduler.update_draft_token_ids(DraftTokenIds(["a"], [[1]]))
    assert step(scheduler, {"a": [1]}).draft_distributions == {}


def test_with_blocks_to_spare_chunks_are_left_alone(scheduler: Any) -> None:
    one = request("a", 15, [1, 2, 3, 4])
    run(scheduler, one)
    scheduler.num_free = 1
    step(scheduler, {})
    assert one.spec_token_ids == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("num_tokens", "num_blocks", "room"), [(15, 1, 1), (16, 1, 0), (17, 1, 0), (10, 1, 6), (17, 2, 15)]
)
def test_without_chunks_are_cut_to_the_slots_that_their_request_holds(
    scheduler: Any, num_tokens: int, num_blocks: int, room: int
) -> None:
    """Whatever their own length: condition and room do not look at it (rule 2)."""
    for length in range(1, 9):
        one = request("a", num_tokens, list(range(length)), num_blocks)
        # Another request, without drafts now, could need a block as well.
        run(scheduler, one, request("b", 16, None, 1))
        scheduler.num_free = 0
        step(scheduler, {})
        assert one.spec_token_ids == list(range(min(length, room)))


def test_every_kv_cache_group_counts(scheduler: Any) -> None:
    small = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=4))
    scheduler.kv_cache_config.kv_cache_groups.append(small)
    scheduler.kv_cache_manager.get_blocks = lambda name: SimpleNamespace(blocks=([0], [0, 0, 0]))
    one = request("a", 10, [1, 2, 3, 4])
    run(scheduler, one)
    scheduler.num_free = 2
    step(scheduler, {})
    assert one.spec_token_ids == [1, 2], "12 slots in the smaller group"
