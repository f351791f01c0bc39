"""The numbers that the proposer sends along for metrics: with drafts, without any, and after it gave up.

From the scheduler to the page: test_metrics_travel.
"""

import msgspec
from vllm.v1.outputs import DraftTokenIds

from tests.proposer_bench import Bench, bench, reply
from vllm_specbranch import messages
from vllm_specbranch.draft_distributions import SampledDraftTokenIds
from vllm_specbranch.snapshots import Sample

__all__ = ["bench"]


def sample_of(bench: Bench, drafts: DraftTokenIds | None) -> Sample:
    ours = bench.proposer.with_sample(drafts)
    assert isinstance(ours, SampledDraftTokenIds)
    assert ours.sample is not None
    return ours.sample


def test_the_numbers_for_metrics_go_with_drafts_and_without_any(bench: Bench) -> None:
    bench.begin({"a": [1, 2, 3]})
    bench.propose({"a": [4]})
    report = messages.Report(1, 1, 0, 2, 64, {"num_hits": 5})
    bench.line.replies = [msgspec.structs.replace(reply(1, {"a": (4, [5, 6])}), report=report)]
    drafts = bench.proposer.take_draft_token_ids()
    seen = sample_of(bench, drafts)
    assert drafts is not None and drafts.draft_token_ids == [[5, 6]], "the drafts themselves stay as they are"
    assert seen.report == report
    assert (seen.counters["num_replies"], seen.state["is_ready"], seen.state["has_given_up"]) == (1, 1, 0)
    assert seen.state["reply_timeout_s"] > 0

    bench.begin()
    bench.line.is_up = False
    bench.propose({"a": [5]})
    assert bench.proposer.take_draft_token_ids() is None
    seen = sample_of(bench, None)
    assert (seen.report, seen.state["is_ready"]) == (None, 0), "an outage shows"


def test_an_engine_that_has_given_up_says_so(bench: Bench) -> None:
    bench.proposer.give_up()
    seen = sample_of(bench, None)
    assert [seen.state[name] for name in ("has_given_up", "is_alive", "is_ready")] == [1, 0, 0]


def test_ranks_that_draft_for_nobody_have_no_numbers(bench: Bench) -> None:
    bench.proposer._link = None
    assert bench.proposer.with_sample(None) is None
