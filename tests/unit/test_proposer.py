"""The proposer's messages, step by step, with a scripted line in place of the draft server."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.outputs import DraftTokenIds

from vllm_specbranch import messages, proposer
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_distributions import ChunkDistributions, SampledDraftTokenIds, most_top_m
from vllm_specbranch.draft_sampling import seeded_key, unseeded_key
from vllm_specbranch.proposer import Proposer
from vllm_specbranch.scheduler import SpecBranchSchedulerOutput
from vllm_specbranch.snapshots import Sample
from vllm_specbranch.speculative_config import SpecBranchSpeculativeConfig


@dataclass
class Line:
    """What the proposer sees of a `DraftLink`."""

    is_up: bool = True
    generation: int = 1
    draft_max_model_len: int = 100
    sent: list[messages.EngineMessage] = field(default_factory=list)
    replies: list[messages.DraftBatch | None] = field(default_factory=list)
    accepts: bool = True
    is_closed: bool = False
    breaks: bool = False
    timeouts_ms: list[float] = field(default_factory=list)

    def poll(self) -> None:
        if self.breaks:
            raise RuntimeError("a bug of ours")

    def state(self) -> dict[str, bool]:
        return {"is_alive": True, "is_ready": self.is_up, "is_breaker_open": False}

    def send(self, message: messages.EngineMessage) -> bool:
        if self.breaks:
            raise RuntimeError("a bug of ours")
        if self.accepts:
            self.sent.append(message)
        return self.accepts

    def receive(self, round_number: int, timeout_ms: float) -> messages.DraftBatch | None:
        if self.breaks:
            raise RuntimeError("a bug of ours")
        self.timeouts_ms.append(timeout_ms)
        return self.replies.pop(0)

    def receive_patiently(self, round_number: int) -> messages.DraftBatch | None:
        return self.receive(round_number, float("inf"))

    def close(self) -> None:
        self.is_closed = True

    def take(self) -> list[messages.EngineMessage]:
        sent, self.sent = self.sent, []
        return sent


@dataclass
class Bench:
    proposer: Proposer
    line: Line
    sequences: dict[str, list[int]] = field(default_factory=dict)

    def begin(
        self,
        new: dict[str, list[int]] | None = None,
        finished: Sequence[str] = (),
        params: dict[str, SamplingParams] | None = None,
        **fields: Any,
    ) -> None:
        self.sequences |= new or {}
        requests = [
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=list(tokens),
                prompt_embeds=None,
                mm_features=[],
                sampling_params=(params or {}).get(name),
            )
            for name, tokens in (new or {}).items()
        ]
        output = SpecBranchSchedulerOutput(
            scheduled_new_reqs=requests,  # type: ignore[arg-type]
            scheduled_cached_reqs=CachedRequestData.make_empty(),
            num_scheduled_tokens={},
            total_num_scheduled_tokens=1,
            scheduled_spec_decode_tokens=fields.pop("scheduled", {}),
            scheduled_encoder_inputs={},
            finished_req_ids=set(finished),
            free_encoder_mm_hashes=[],
            **fields,
        )
        self.proposer.begin_step(output)

    def propose(self, sampled: dict[str, list[int]]) -> list[list[int]]:
        names = list(sampled)
        self.proposer.attach(SimpleNamespace(input_batch=SimpleNamespace(req_ids=names)))  # type: ignore[arg-type]
        table = np.zeros((len(names), 200), np.int32)
        lengths = np.zeros(len(names), np.int32)
        for row, name in enumerate(names):
            self.sequences[name] = self.sequences[name] + sampled[name]
            lengths[row] = len(self.sequences[name])
            table[row, : lengths[row]] = self.sequences[name]
        return self.proposer.propose(list(sampled.values()), lengths, table)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    line = Line()
    monkeypatch.setattr(proposer, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(Proposer, "_open_link", lambda *_: line)
    speculative = SpecBranchSpeculativeConfig.__new__(SpecBranchSpeculativeConfig)
    speculative.specbranch = SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": 4})
    vllm_config = SimpleNamespace(
        speculative_config=speculative,
        model_config=SimpleNamespace(max_model_len=200, seed=0, get_vocab_size=lambda: 50),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        parallel_config=SimpleNamespace(data_parallel_index=1),
    )
    return Bench(Proposer(vllm_config), line)


def reply(
    round_number: int, drafts: dict[str, tuple[int, list[int]]], unknown: Sequence[str] = ()
) -> messages.DraftBatch:
    return messages.DraftBatch(
        round_number,
        True,
        [messages.Draft(name, *draft, True, b"", b"", []) for name, draft in drafts.items()],
        list(unknown),
    )


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


def opened(bench: Bench) -> messages.Open:
    (message,) = bench.line.take()
    assert isinstance(message, messages.StepBegin)
    (one,) = message.opens
    return one


def open_with(bench: Bench, name: str, **params: Any) -> messages.Sampling | None:
    bench.begin({name: [1, 2, 3]}, params={name: SamplingParams(**params)})
    return opened(bench).sampling


def test_how_the_drafts_of_a_request_are_drawn(bench: Bench) -> None:
    assert open_with(bench, "greedy", temperature=0.0) is None
    sampling = open_with(bench, "sampled", temperature=0.7)
    assert sampling is not None
    assert (sampling.temperature, sampling.top_m) == (0.7, 64)
    capped = open_with(bench, "top_k", temperature=0.7, top_k=5)
    assert capped is not None and capped.top_m == 5
    hot = open_with(bench, "hot", temperature=2.0)
    assert hot is not None
    messages.decode_for_server(messages.encode(messages.StepBegin([messages.Open("hot", [1], hot)], [])))


def test_structured_output_is_drafted_for_greedily(bench: Bench) -> None:
    """vLLM cuts its chunks by looking at the drawn tokens (rule 2)."""
    structured = StructuredOutputsParams(choice=["a", "b"])
    assert open_with(bench, "a", temperature=1.0, structured_outputs=structured) is None


def test_streams(bench: Bench) -> None:
    """By the seed where there is one, whatever the request is called; else by the order of arrival; never the seed itself."""

    def key(name: str, **params: Any) -> int:
        sampling = open_with(bench, name, temperature=1.0, **params)
        assert sampling is not None
        return sampling.key

    assert key("a", seed=3) == key("b", seed=3) == seeded_key(3) != 3
    assert key("c", seed=4) != seeded_key(3)
    assert key("d") == unseeded_key(0, 1, 4)
    assert key("e") == unseeded_key(0, 1, 5)


def test_a_request_is_opened_again_with_the_stream_it_had(bench: Bench) -> None:
    first = open_with(bench, "a", temperature=1.0)
    bench.line.generation = 2
    bench.begin()
    bench.propose({"a": [4]})
    assert opened(bench) == messages.Open("a", [1, 2, 3, 4], first)
    bench.begin(finished=["a"])
    assert bench.proposer._sampling == {}


def test_distributions_go_to_the_scheduler_with_their_drafts_and_unsound_ones_do_not(bench: Bench) -> None:
    bench.begin({"a": [1], "b": [1, 2], "c": [3]})
    bench.propose({"a": [4], "b": [4], "c": [4]})
    ids, probs = array("i", [5, 6, 7, 8]).tobytes(), array("f", [0.5, 0.5, 0.25, 0.75]).tobytes()
    bench.line.replies = [
        messages.DraftBatch(
            1,
            True,
            [
                messages.Draft("a", 2, [6, 8], True, ids, probs, []),
                messages.Draft("b", 3, [6, 9], True, ids, probs, []),
                messages.Draft("c", 2, [6], True, b"", b"", []),
            ],
            [],
        )
    ]
    drafts = bench.proposer.take_draft_token_ids()
    assert isinstance(drafts, SampledDraftTokenIds)
    assert drafts.draft_token_ids == [[6, 8], [6, 9], [6]], "all are verified, those without a distribution as one-hot"
    assert drafts.distributions == {"a": ChunkDistributions(2, (6, 8), ids, probs)}
    assert bench.proposer.counters.num_unsound_distributions == 1


def test_deterministic_drafting_waits_for_its_reply_and_greedy_drafting_draws_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.proposer, "_config", replace(bench.proposer._config, deterministic=True))
    bench.begin({"a": [1]})
    bench.propose({"a": [4]})
    bench.line.replies = [reply(1, {"a": (2, [5])})]
    drafts = bench.proposer.take_draft_token_ids()
    assert drafts is not None and drafts.draft_token_ids == [[5]]
    assert bench.line.timeouts_ms == [float("inf")]
    bench.line.take()
    monkeypatch.setattr(bench.proposer, "_config", replace(bench.proposer._config, draft_sample_method="greedy"))
    assert open_with(bench, "b", temperature=1.0) is None


@pytest.mark.parametrize(
    ("wanted", "gamma", "max_num_seqs", "expected"), [(64, 8, 256, 64), (1024, 8, 256, 512), (64, 64, 1024, 16)]
)
def test_a_full_batch_of_distributions_fits_into_one_message(
    wanted: int, gamma: int, max_num_seqs: int, expected: int
) -> None:
    config = SpecBranchConfig.from_user({"model": "m", "draft_top_m": wanted, "num_speculative_tokens": gamma})
    top_m = most_top_m(config, max_num_seqs)
    assert top_m == expected
    packed = b"x" * (4 * gamma * top_m)
    draft = messages.Draft("request-0123456789", 10**6, [10**6] * gamma, True, packed, packed, [])
    assert messages.encode(messages.DraftBatch(1, True, [draft] * max_num_seqs, []))


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
