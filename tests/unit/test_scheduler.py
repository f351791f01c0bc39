"""What our scheduler adds to vLLM's: distributions that wait for their tokens. (Chunks cut to the room there is: test_reclaim.)"""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds

from vllm_specbranch import stat_logger
from vllm_specbranch.draft_distributions import ChunkDistributions, SampledDraftTokenIds
from vllm_specbranch.metrics import SchedulerCounters
from vllm_specbranch.scheduler import SpecBranchScheduler
from vllm_specbranch.snapshots import MetricsFeed, Sample, SnapshotMaker


def request(name: str, num_tokens: int) -> Any:
    return SimpleNamespace(request_id=name, num_tokens=num_tokens, spec_token_ids=[])


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ours, with vLLM's part replaced: `next_output` is what it schedules, updates do nothing."""
    ours: Any = SpecBranchScheduler.__new__(SpecBranchScheduler)
    ours._draft_distributions = {}
    ours._counters = SchedulerCounters()
    ours._reclaim_blocks = "on"
    ours._reclaimer = SimpleNamespace(make_room=lambda running: None, resend=lambda scheduled, requests: None)
    ours.requests = {}
    ours.running = []
    monkeypatch.setattr(Scheduler, "schedule", lambda self, throttle: self.next_output)
    monkeypatch.setattr(Scheduler, "update_draft_token_ids", lambda self, drafts: None)
    monkeypatch.setattr(Scheduler, "get_request_counts", lambda self: (len(self.running), 3))
    return ours


def step(
    scheduler: Any, scheduled: dict[str, list[int]], finished: set[str] | None = None, preempted: set[str] | None = None
) -> Any:
    scheduler.next_output = SchedulerOutput(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=CachedRequestData.make_empty(),
        num_scheduled_tokens={},
        total_num_scheduled_tokens=0,
        scheduled_spec_decode_tokens=scheduled,
        scheduled_encoder_inputs={},
        num_common_prefix_blocks=[],
        finished_req_ids=finished or set(),
        preempted_req_ids=preempted,
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


def test_each_step_reports_whether_blocks_are_reclaimed_and_what_was_counted(scheduler: Any) -> None:
    step(scheduler, {}, preempted={"a", "b"})
    status = step(scheduler, {}, preempted={"a"}).scheduler_status
    assert status == {"reclaim_blocks": "on"} | SchedulerCounters(num_preemptions=3).as_dict()


def test_news_of_the_metrics_ride_on_the_statistics_of_a_step(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 1}), SchedulerStats(), None]
    monkeypatch.setattr(Scheduler, "make_stats", lambda self, *given: made.pop(0))
    monkeypatch.setattr(Scheduler, "has_unfinished_requests", lambda self: bool(self.running))
    scheduler._snapshots = SnapshotMaker()
    scheduler._metrics_feed = MetricsFeed(scheduler._snapshots.make)
    scheduler.update_draft_token_ids(
        SampledDraftTokenIds([], [], sample=Sample({"num_replies": 5}, {"num_requests": 2}, None))
    )
    scheduler.update_draft_token_ids(SampledDraftTokenIds([], []))
    scheduler._counters.num_reclaimed_blocks = 3
    run(scheduler, request("a", 5))
    stats = scheduler.make_stats("as vLLM calls it")
    assert stat_logger.take(stats) == {
        "engine.num_replies": 5,
        "state.num_requests": 2,
        "scheduler.num_reclaimed_blocks": 3,
    }
    assert stats.num_kv_fetch_reqs_by_stage == {"in_progress": 1}
    run(scheduler)
    assert stat_logger.take(scheduler.make_stats()) == {"state.num_requests": 0}, "the last request is gone"
    assert scheduler.make_stats() is None, "statistics are off"
