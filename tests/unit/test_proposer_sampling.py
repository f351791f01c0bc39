"""How the drafts of a request are drawn, as the proposer tells the server, and the distributions that come back with them.

With a scripted line in place of the draft server.
"""

from array import array
from dataclasses import replace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.proposer_bench import Bench, bench, reply
from vllm_specbranch import messages
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_distributions import ChunkDistributions, SampledDraftTokenIds, most_top_m
from vllm_specbranch.draft_sampling import seeded_key, unseeded_key

__all__ = ["bench"]


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
