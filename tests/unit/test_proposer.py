"""The proposer's messages, step by step, with a scripted line in place of the draft server.

How drafts are drawn: test_proposer_sampling; numbers for metrics: test_proposer_metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from tests.proposer_bench import Bench, Line, bench, reply
from vllm_specbranch import messages, proposer

__all__ = ["bench"]


def test_a_request_from_open_to_close(bench: Bench) -> None:
    bench.begin({"a": [1, 2, 3]})
    assert bench.line.take() == [messages.StepBegin([messages.Open("a", [1, 2, 3], None)], [])]
    assert bench.propose({"a": [4]}) == [[]], "drafts come later"
    (batch,) = bench.line.take()
    assert isinstance(batch, messages.CommitBatch)
    assert batch.commits == [messages.Commit("a", 3, [4], 0, None)]
    bench.line.replies = [reply(batch.round, {"a": (4, [5, 6])})]
    drafts = bench.proposer.take_draft_token_ids()
    assert drafts is not None
    assert (drafts.req_ids, drafts.draft_token_ids) == (["a"], [[5, 6]])
    bench.begin(scheduled={"a": [5, 6]})
    bench.propose({"a": [5, 9]})
    (batch,) = bench.line.take()
    assert isinstance(batch, messages.CommitBatch)
    assert batch.commits == [messages.Commit("a", 4, [5, 9], 2, None)]
    counters = bench.proposer.counters
    assert (counters.num_draft_tokens, counters.num_accepted_tokens) == (2, 1)
    bench.begin(finished=["a"])
    assert bench.line.take() == [messages.StepBegin([], ["a"])]


@dataclass
class ScriptedHead:
    """A `TargetHead` that says what it is told to."""

    says: dict[str, int]
    line: Line
    breaks: bool = False

    def classes(
        self, request_ids: Sequence[str], sampled: Sequence[Sequence[int]], num_tokens: Sequence[int], observer: Any
    ) -> dict[str, int]:
        if self.breaks:
            raise RuntimeError("a bug of ours")
        assert not any(isinstance(one, messages.CommitBatch) for one in self.line.sent), "before the commits go out"
        if observer is not None:
            observer(list(request_ids), [int(one) for one in num_tokens], None)
        return self.says


def test_the_class_of_a_request_rides_on_its_commit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.proposer, "_head", ScriptedHead({"a": 2, "c": 0}, bench.line))
    seen: list[Any] = []
    bench.proposer.feature_observer = lambda *given: seen.append(given)
    bench.begin({"a": [1, 2, 3], "b": [1], "c": [2]})
    bench.propose({"a": [4], "b": [5], "c": [6]})
    batch = bench.line.take()[-1]
    assert isinstance(batch, messages.CommitBatch)
    assert [(one.request_id, one.head_class) for one in batch.commits] == [("a", 2), ("b", None), ("c", 0)]
    assert seen == [(["a", "b", "c"], [4, 2, 2], None)]


def test_a_head_that_fails_ends_drafting_not_the_engine(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.proposer, "_head", ScriptedHead({}, bench.line, breaks=True))
    bench.begin({"a": [1, 2, 3]})
    assert bench.propose({"a": [4]}) == [[]]
    assert bench.line.is_closed


def test_each_draft_is_shown_to_who_watches(bench: Bench) -> None:
    seen: list[messages.Draft] = []
    bench.proposer.draft_observer = seen.append
    bench.begin({"a": [1], "b": [2]})
    bench.propose({"a": [4], "b": [4]})
    shown = messages.Draft("a", 2, [6, 8], True, b"", b"", [0.5, 0.25])
    stale = messages.Draft("b", 1, [6], True, b"", b"", [0.5])
    bench.line.replies = [messages.DraftBatch(1, True, [shown, stale], [])]
    bench.proposer.take_draft_token_ids()
    assert seen == [shown], "only what goes to the scheduler"


def test_what_the_server_has_no_place_for_is_opened_again_when_places_are_free(bench: Bench) -> None:
    prompts = {"a": [1], "b": [1, 2], "c": [1, 2, 3], "d": [1, 2, 3, 4]}
    bench.begin(prompts)
    bench.propose({name: [4] for name in prompts})
    bench.line.replies = [messages.DraftBatch(1, True, [], ["b", "c", "d"], None, True)]
    bench.proposer.take_draft_token_ids()
    bench.line.take()
    bench.begin()
    bench.propose({name: [5] for name in prompts})
    (batch,) = bench.line.take()
    assert isinstance(batch, messages.CommitBatch), "nothing is opened while the server is full"
    assert [one.request_id for one in batch.commits] == ["a"]
    bench.begin(finished=["a", "c"])
    bench.line.take()
    bench.propose({"b": [6], "d": [6]})
    (begun,) = bench.line.take()
    assert begun == messages.StepBegin([messages.Open("b", [1, 2, 4, 5, 6], None)], []), "one was closed there"
    bench.line.generation += 1
    bench.begin()
    bench.propose({"b": [7], "d": [7]})
    (begun,) = bench.line.take()
    assert isinstance(begun, messages.StepBegin)
    assert [one.request_id for one in begun.opens] == ["b", "d"], "another server, or session, may have more places"


def test_drafts_for_another_position_request_or_vocabulary_are_dropped_and_long_ones_cut(bench: Bench) -> None:
    bench.begin({"a": [1], "b": [1, 2], "c": [1, 2, 3]})
    bench.propose({"a": [4], "b": [4], "c": [4]})
    bench.line.replies = [reply(1, {"a": (3, [5]), "b": (3, [1, 2, 3, 4, 5, 6]), "c": (4, [50]), "d": (1, [5])})]
    drafts = bench.proposer.take_draft_token_ids()
    assert drafts is not None
    assert (drafts.req_ids, drafts.draft_token_ids) == (["b"], [[1, 2, 3, 4]])


def test_no_reply_means_no_drafts(bench: Bench) -> None:
    bench.begin({"a": [1]})
    bench.propose({"a": [4]})
    bench.line.replies = [None]
    assert bench.proposer.take_draft_token_ids() is None
    assert bench.proposer.take_draft_token_ids() is None, "a reply is collected once"


def test_an_unfinished_prefill_sends_nothing_and_nothing_waits_for_it(bench: Bench) -> None:
    bench.begin({"a": [1], "b": [2]})
    bench.line.take()
    bench.propose({"a": [], "b": [3]})
    (batch,) = bench.line.take()
    assert isinstance(batch, messages.CommitBatch)
    assert [commit.request_id for commit in batch.commits] == ["b"]
    assert batch.max_wait_ms == 0.0


def test_a_step_waits_only_when_no_prompt_does(bench: Bench) -> None:
    waits = []
    for num_waiting in (0, 3):
        bench.begin({f"r{num_waiting}": [1]}, num_waiting_requests=num_waiting)
        bench.propose({f"r{num_waiting}": [2]})
        batch = bench.line.take()[-1]
        assert isinstance(batch, messages.CommitBatch)
        waits.append(batch.max_wait_ms)
    assert waits[0] > 0.0
    assert waits[1] == 0.0


def test_a_new_generation_opens_running_requests_from_their_history(bench: Bench) -> None:
    bench.begin({"a": [1, 2, 3]})
    bench.propose({"a": [4]})
    bench.line.take()
    bench.line.generation = 2
    bench.begin()
    bench.propose({"a": [5, 6]})
    assert bench.line.take() == [messages.StepBegin([messages.Open("a", [1, 2, 3, 4, 5, 6], None)], [])]
    bench.begin()
    bench.propose({"a": [7]})
    (batch,) = bench.line.take()
    assert isinstance(batch, messages.CommitBatch)
    assert batch.commits == [messages.Commit("a", 6, [7], 0, None)]


def test_a_request_that_the_server_does_not_know_is_opened_again(bench: Bench) -> None:
    bench.begin({"a": [1]})
    bench.propose({"a": [2]})
    bench.line.replies = [reply(1, {}, ["a"])]
    bench.proposer.take_draft_token_ids()
    bench.line.take()
    bench.begin()
    bench.propose({"a": [3]})
    assert bench.line.take() == [messages.StepBegin([messages.Open("a", [1, 2, 3], None)], [])]


def test_requests_that_cannot_be_drafted_for_never_are(bench: Bench) -> None:
    long_id = "x" * 300
    bench.begin({long_id: [1], "beyond": [1] * 100, "near": [1] * 98})
    (step,) = bench.line.take()
    assert isinstance(step, messages.StepBegin)
    assert [one.request_id for one in step.opens] == ["near"]
    bench.propose({long_id: [2], "beyond": [2], "near": [2]})
    (batch,) = bench.line.take()
    assert isinstance(batch, messages.CommitBatch)
    assert [one.request_id for one in batch.commits] == ["near"]
    bench.propose({"near": [3]})
    assert bench.line.take() == [], "at the end of the draft model's context"


def test_nothing_is_sent_or_awaited_while_the_line_is_down(bench: Bench) -> None:
    bench.line.is_up = False
    bench.begin({"a": [1]})
    bench.propose({"a": [2]})
    assert bench.proposer.take_draft_token_ids() is None
    assert bench.line.sent == []
    assert bench.line.timeouts_ms == []


def test_a_failed_send_is_not_waited_for(bench: Bench) -> None:
    bench.begin({"a": [1]})
    bench.line.accepts = False
    bench.propose({"a": [2]})
    assert bench.proposer.take_draft_token_ids() is None
    assert bench.line.timeouts_ms == []


def test_large_histories_travel_in_several_messages(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposer, "MAX_TOKENS_PER_MESSAGE", 10)
    bench.begin({f"r{number}": [1] * 4 for number in range(7)}, finished=["gone"])
    steps = bench.line.take()
    assert len(steps) > 2
    names = [one.request_id for step in steps if isinstance(step, messages.StepBegin) for one in step.opens]
    assert names == [f"r{number}" for number in range(7)]


@pytest.mark.parametrize("step", ["begin", "propose", "take"])
def test_a_failure_of_ours_ends_drafting_not_the_engine(
    bench: Bench, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    if step != "begin":
        bench.begin({"a": [1]})
    if step == "take":
        bench.propose({"a": [2]})
    bench.line.breaks = True
    if step == "begin":
        bench.begin({"a": [1]})
    if step == "propose":
        assert bench.propose({"a": [2]}) == [[]]
    assert bench.proposer.take_draft_token_ids() is None
    assert bench.line.is_closed
    bench.begin({"b": [1]})
    assert bench.propose({"a": [3], "b": []}) == [[], []]
    assert bench.proposer.take_draft_token_ids() is None
    assert sum("goes on without drafts" in record.message for record in caplog.records) == 1
