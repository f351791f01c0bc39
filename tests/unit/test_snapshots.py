"""How counters travel: over the lives of a draft server, to the scheduler, and as differences to API servers."""

import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch import metrics
from vllm_specbranch.messages import Report
from vllm_specbranch.metrics import METRICS, UNPUBLISHED, DraftServerCounters, EngineCounters, SchedulerCounters
from vllm_specbranch.snapshots import FEED_PERIOD_S, MetricsFeed, Sample, ServerTotals, SnapshotMaker

COUNTERS = {one.key for one in METRICS if one.is_counter}


def report(life: int, **counters: int) -> Report:
    return Report(life, 3, 2, 5, 100, counters)


def snapshot(maker: SnapshotMaker, report: Report | None, **counters: float) -> dict[str, int]:
    maker.update(Sample(EngineCounters().as_dict() | counters, {"is_ready": True, "reply_timeout_s": 0.05}, report))
    return maker.make()


class Feed(MetricsFeed):
    """One whose snapshots are given."""

    def __init__(self) -> None:
        super().__init__(lambda: self.snapshot)
        self.snapshot: dict[str, int] = {}


# Over the lives of a draft server.


def test_a_restarted_server_goes_on_where_the_last_one_ended() -> None:
    totals = ServerTotals()
    for life, num_hits in ((1, 5), (1, 7), (2, 0), (2, 4), (3, 1)):
        totals.update(report(life, num_hits=num_hits))
    assert totals.as_dict() == {"num_hits": 12}


def test_a_restarted_server_that_has_already_more_is_not_taken_for_the_old_one() -> None:
    totals = ServerTotals()
    totals.update(report(1, num_hits=5))
    totals.update(report(2, num_hits=50))
    assert totals.as_dict() == {"num_hits": 55}


lives = st.lists(st.lists(st.integers(0, 100), min_size=1), min_size=1)


@given(lives)
def test_totals_never_go_down_and_end_as_the_sum_of_all_lives(growth: list[list[int]]) -> None:
    totals, seen = ServerTotals(), 0
    for life, steps in enumerate(growth):
        count = 0
        for step in steps:
            count += step
            totals.update(report(life, num_hits=count))
            assert totals.as_dict()["num_hits"] >= seen
            seen = totals.as_dict()["num_hits"]
    assert seen == sum(map(sum, growth))


# Of the worker's samples.


def test_a_snapshot_holds_whole_numbers_under_the_keys_of_the_metrics() -> None:
    maker = SnapshotMaker()
    full = report(1, **dict.fromkeys(DraftServerCounters().as_dict(), 7))
    made = snapshot(maker, full, num_server_starts=3, wait_s=0.25, num_replies=9)
    assert all(type(value) is int for value in made.values())
    assert made["engine.num_replies"] == 9
    assert made["engine.num_server_restarts"] == 2
    assert (made["engine.wait_s"], made["state.reply_timeout_s"]) == (250_000, 50_000), "microseconds"
    assert made["server.num_hits"] == 7
    assert [made[f"state.{name}"] for name in ("num_requests", "num_queued_rows", "num_blocks_held", "num_blocks")] == [
        3,
        2,
        5,
        100,
    ]
    assert made["state.is_ready"] == 1


def test_without_a_report_nothing_is_said_of_the_server() -> None:
    maker = SnapshotMaker()
    assert maker.make() == {}
    made = snapshot(maker, None)
    assert not [key for key in made if key.startswith("server.")]
    assert "state.num_blocks" not in made
    assert made["engine.num_server_restarts"] == 0


def test_what_the_server_reported_last_stays_when_a_step_has_no_reply() -> None:
    maker = SnapshotMaker()
    snapshot(maker, report(1, num_hits=5))
    made = snapshot(maker, None)
    assert (made["server.num_hits"], made["state.num_blocks"]) == (5, 100)
    assert snapshot(maker, report(2, num_hits=1))["server.num_hits"] == 6


def test_a_sample_survives_the_way_that_vllm_takes_between_worker_and_scheduler() -> None:
    sample = Sample(EngineCounters().as_dict(), {"is_ready": True}, report(1, num_hits=5))
    assert pickle.loads(pickle.dumps(sample)) == sample


# In the scheduler.


def test_counters_go_out_as_differences_and_gauges_as_they_are() -> None:
    feed = Feed()
    feed.snapshot = {"server.num_hits": 5, "state.num_requests": 3, "state.is_ready": 1}
    assert feed.take(0.0, {}, is_idle=False) == {"server.num_hits": 5, "state.num_requests": 3, "state.is_ready": 1}
    feed.snapshot = {"server.num_hits": 9, "state.num_requests": 2, "state.is_ready": 0}
    assert feed.take(FEED_PERIOD_S, {}, is_idle=False) == {
        "server.num_hits": 4,
        "state.num_requests": 2,
        "state.is_ready": 0,
    }


def test_the_scheduler_s_own_counters_go_with_them() -> None:
    feed = Feed()
    feed.snapshot = {"server.num_hits": 5}
    assert feed.take(0.0, {"num_reclaimed_blocks": 4}, is_idle=False)["scheduler.num_reclaimed_blocks"] == 4
    assert feed.take(1.0, {"num_reclaimed_blocks": 6}, is_idle=False)["scheduler.num_reclaimed_blocks"] == 2


def test_what_vllm_publishes_itself_does_not_travel() -> None:
    feed = Feed()
    feed.snapshot = {"server.num_hits": 5, "engine.num_draft_tokens": 7}
    assert feed.take(0.0, {"num_preemptions": 2}, is_idle=False) == {"server.num_hits": 5}


def test_between_two_periods_nothing_goes_out_but_what_is_last() -> None:
    feed = Feed()
    assert feed.take(0.0, {}, is_idle=True) == {}, "before the first step there is nothing to say"
    feed.snapshot = {"server.num_hits": 5, "state.num_requests": 3, "state.num_blocks": 100}
    feed.take(10.0, {}, is_idle=False)
    feed.snapshot = {"server.num_hits": 6, "state.num_requests": 3, "state.num_blocks": 100}
    assert feed.take(10.0 + FEED_PERIOD_S / 2, {}, is_idle=False) == {}
    assert feed.take(10.0 + FEED_PERIOD_S / 2, {}, is_idle=True) == {
        "server.num_hits": 1,
        "state.num_requests": 0,
        "state.num_blocks": 100,
    }, "without a request the server holds nothing for this engine; no reply is to come that says so"


events = st.lists(
    st.tuples(st.dictionaries(st.sampled_from(sorted(COUNTERS)), st.integers(0, 9)), st.floats(0, 1), st.booleans())
)


@given(events)
def test_what_api_servers_were_told_adds_up_to_the_counters(steps: list[tuple[dict[str, int], float, bool]]) -> None:
    """Whichever of them was told when, and none is ever told to take something back."""
    feed, counted, told, now_s = Feed(), Counter[str](), Counter[str](), 0.0
    for growth, passed_s, is_idle in [*steps, ({}, 0.0, True)]:
        now_s += passed_s
        counted.update(growth)
        feed.snapshot = dict(counted)
        news = feed.take(now_s, {}, is_idle=is_idle)
        assert all(value > 0 for value in news.values())
        told.update(news)
    assert +told == +counted


# Names.


def test_every_counter_is_published_or_vllm_publishes_it() -> None:
    sides = {
        "server": DraftServerCounters().as_dict(),
        "engine": EngineCounters().as_dict(),
        "scheduler": SchedulerCounters().as_dict(),
    }
    counted = {f"{side}.{name}" for side, counters in sides.items() for name in counters}
    published = {one.key for one in METRICS}
    assert counted - published == UNPUBLISHED
    derived = {"engine.num_server_restarts"}
    assert {key for key in published - counted if not key.startswith("state.")} == derived


def test_names_say_unit_and_kind() -> None:
    assert len({one.name for one in METRICS}) == len({one.key for one in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("vllm:specbranch_")
        assert ("_seconds" in metric.name) == (metric.unit == 1e-6) == metric.key.endswith("_s")
        assert metric.documentation.endswith(".")
        assert metric.is_counter == (not metric.key.startswith("state.") and metric.key != "engine.longest_wait_s")
        assert not (metric.is_counter and metric.is_of_requests)


def test_a_counter_that_the_table_does_not_know_gets_a_row_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metrics, "_DESCRIBED", [one for one in METRICS if one.key not in ("server.num_hits", "engine.head_s")]
    )
    made = {one.key: one for one in metrics._undescribed()}
    assert made.keys() == {"server.num_hits", "engine.head_s"}
    assert made["server.num_hits"].name == "vllm:specbranch_server_hits_total"
    assert (made["engine.head_s"].name, made["engine.head_s"].unit) == (
        "vllm:specbranch_engine_head_seconds_total",
        1e-6,
    )


def test_the_readme_lists_every_metric() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert [one.suffix for one in metrics._DESCRIBED if f"`{one.suffix}`" not in text] == []
