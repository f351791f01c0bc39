"""What tuning makes of runs: the times of a pair from its forwards, and each alternative beside plain decoding.

On made-up runs. No engine is started.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch import tune_check
from vllm_specbranch.lineup import Lineup, Placement
from vllm_specbranch.measure import MeasureError
from vllm_specbranch.measure_messages import EngineSpec, Forward, RequestTrace, RunResult
from vllm_specbranch.replay import Times
from vllm_specbranch.tune_check import sequential_name
from vllm_specbranch.tune_measure import fit, measure, medians_ms
from vllm_specbranch.tune_report import AS_IT_COMES
from vllm_specbranch.tune_search import STARTS


def test_a_line_through_forward_times() -> None:
    line = fit({1: 10.0, 3: 12.0, 5: 14.0})
    assert (line.base_ms, line.token_cost) == (pytest.approx(10.0), pytest.approx(0.1))
    assert fit({1: 7.0}).token_cost == 0.0
    assert fit({9: 7.0}).base_ms == 7.0


@given(st.dictionaries(st.integers(1, 64), st.floats(0.01, 1e3), min_size=1, max_size=10))
def test_a_line_never_falls_and_starts_above_nothing(times_ms: dict[int, float]) -> None:
    line = fit(times_ms)
    assert line.base_ms > 0.0 and line.token_cost >= 0.0


def forwards(gap_ms: float, duration_ms: float, sizes: Sequence[int]) -> list[Forward]:
    step_s = (gap_ms + duration_ms) / 1e3
    return [Forward(index * step_s, index * step_s + duration_ms / 1e3, size) for index, size in enumerate(sizes)]


def result(gap_ms: float, **keys: Any) -> RunResult:
    """A run with an output every `gap_ms`."""
    times = [gap_ms * (index + 1) / 1e3 for index in range(10)]
    return RunResult(times[-1], 10, [RequestTrace(0.0, times, [1] * 10, list(range(10)), "")], **keys)


def test_rare_sizes_and_prefills_say_nothing() -> None:
    assert medians_ms(forwards(1.0, 5.0, [1, 1, 1, 4, 4, 10, 10, 10]), 9) == {1: pytest.approx(5.0)}


def test_sizes_that_are_alike_count_as_one() -> None:
    found = medians_ms(
        [*forwards(1.0, 5.0, [57, 60, 64]), *forwards(1.0, 6.0, [65, 66, 67]), *forwards(1.0, 9.0, [80])], 576, 8
    )
    assert found == {60: pytest.approx(5.0), 66: pytest.approx(6.0)}


@pytest.mark.parametrize("batch_size", [16, 64])
def test_what_further_tokens_cost_is_seen_in_large_batches_too(batch_size: int) -> None:
    """Forwards with drafts have several times the batch in tokens, and hardly two of them as many: 2% of a forward each."""
    randoms = random.Random(0)
    sizes = [batch_size + randoms.randrange(batch_size * 8) for _ in range(60)]
    times = Times(50.0, 2.0, 0.02)
    drafted = [Forward(index, index + times.forward_ms(size) / 1e3, size) for index, size in enumerate(sizes)]
    plain_ms = times.forward_ms(batch_size)
    plain = result(plain_ms, target_forwards=forwards(0.0, plain_ms, [batch_size] * 10))
    ours = result(plain_ms, target_forwards=drafted, draft_forwards=forwards(0.0, 2.0, [batch_size] * 5))
    measured = measure(plain, ours, batch_size, 8)
    assert measured.is_observed and len(measured.target_ms) > 5
    assert measured.ours.target_token_cost == pytest.approx(0.02, rel=0.1)
    assert measured.plain.forward_ms(batch_size) == pytest.approx(plain_ms)
    assert measured.ours.forward_ms(4 * batch_size) == pytest.approx(times.forward_ms(4 * batch_size), rel=0.05)


def test_contention_is_no_price_of_further_tokens() -> None:
    """Beside a draft server every forward takes half as long again; tokens are free."""
    plain = result(12.0, target_forwards=forwards(2.0, 10.0, [1] * 10))
    ours = result(
        19.0,
        target_forwards=forwards(4.0, 15.0, [1, 3, 5, 9] * 5),
        draft_forwards=forwards(0.0, 2.0, [1] * 5),
    )
    measured = measure(plain, ours, 1, 8)
    assert measured.ours.target_token_cost == measured.plain.target_token_cost == pytest.approx(0.0)
    assert measured.ours.target_forward_ms == pytest.approx(15.0)
    assert measured.plain.target_forward_ms == pytest.approx(10.0)
    assert measured.plain.overhead_ms == pytest.approx(2.0) and measured.ours.overhead_ms == pytest.approx(4.0)


def test_times_of_an_observed_pair() -> None:
    plain = result(12.0, target_forwards=forwards(2.0, 10.0, [1] * 10))
    counters = {"wait_s": 10 * 0.5e-3, "propose_s": 0.0}
    ours = result(
        14.0,
        target_forwards=forwards(4.0, 10.0, [1] * 10),
        draft_forwards=forwards(0.0, 2.0, [1] * 5) + forwards(0.0, 3.0, [6] * 5),
        engine_counters=counters,
    )
    measured = measure(plain, ours, 1, 8)
    assert measured.is_observed
    assert measured.plain.overhead_ms == pytest.approx(2.0)
    assert measured.ours.overhead_ms == pytest.approx(3.5)
    assert measured.ours.target_forward_ms == pytest.approx(10.0)
    assert (measured.ours.draft_step_ms, measured.ours.draft_token_cost) == (pytest.approx(2.0), pytest.approx(0.1))
    assert measured.ours.c == pytest.approx(6.75)


def test_times_of_a_pair_that_cannot_be_observed() -> None:
    timings = {"step_1_rows": 1000.0, "step_3_rows": 1400.0, "peer_0_token": 5.0}
    measured = measure(result(12.0), result(9.0, server_timings_us=timings, engine_counters={"propose_s": 0.01}), 1, 8)
    assert not measured.is_observed
    assert measured.plain.round_ms(1) == pytest.approx(12.0)
    assert measured.ours.round_ms(9) == pytest.approx(13.0)
    assert (measured.ours.draft_step_ms, measured.ours.draft_token_cost) == (pytest.approx(1.0), pytest.approx(0.2))


class Stand:
    """In the place of an engine: decodes at a given pace, and writes down when it was asked."""

    def __init__(self, spec: EngineSpec, asked: list[str]) -> None:
        self.spec, self._asked = spec, asked

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1]] * len(texts)

    def run(self, prompts: Sequence[Sequence[int]], *_: int) -> RunResult:
        self._asked.append(f"{self.spec.name} {len(prompts)}")
        speculative = self.spec.speculative or {}
        gap_ms = {None: 20.0, "draft_model": 16.0, "specbranch": 10.0}[speculative.get("method")]
        is_alone = speculative.get("policy") == "fanout"
        counted = {"num_rounds": 0.0 if is_alone else 9.0} if speculative.get("policy") else {}
        found = result(gap_ms, server_counters=counted)
        if speculative.get("policy") == "pearl":
            found.requests[0].token_ids[3] = -1
        return found


def test_each_alternative_is_run_beside_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    specs: list[EngineSpec] = []
    said: list[str] = []

    @contextmanager
    def running(given: Sequence[EngineSpec]) -> Iterator[list[Stand]]:
        if given[1].name == sequential_name(4):
            raise MeasureError("no memory")
        specs.extend(given)
        yield [Stand(spec, asked) for spec in given]

    monkeypatch.setattr(tune_check, "running", running)
    lineup = Lineup("target", "draft", Placement((0,), (1,)), observe=True)
    candidates = {AS_IT_COMES: STARTS[0], "other": STARTS[3], "alone": STARTS[2]}
    ratios = tune_check.check(lineup, ["a", "b", "c"], (3, 4), candidates, 9, 2, said.append)
    times = tune_check.NUM_REPETITIONS
    assert {name: list(map(pytest.approx, one)) for name, one in ratios.items()} == {
        sequential_name(3): [1.25] * times,
        AS_IT_COMES: [2.0] * times,
        "other": [2.0] * times,
    }
    own = sequential_name(3)
    in_turn = (["plain 3", f"{own} 3", f"{own} 3", "plain 3"] * times)[: 2 * times]
    assert asked[: 2 + 2 * times] == ["plain 2", f"{own} 2", *in_turn]
    assert not any(spec.observe for spec in specs)
    lines = "".join(said).splitlines()
    assert any("no memory" in line for line in lines) and any("without drafts" in line for line in lines)
    assert any(AS_IT_COMES in line and "identical" in line for line in lines)
    assert any("other" in line and f"{times} of {times} answers differ" in line for line in lines)
