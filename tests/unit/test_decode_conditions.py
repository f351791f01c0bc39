"""Conditions of the decode benchmark, and the prompts that each of them works on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.decode_conditions import (
    LEAST_TOKENS,
    SHIPPED_SETS,
    Condition,
    conditions,
    parse_emulation,
    read_prompt_sets,
    work_of,
)
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.measure_messages import Emulation


def test_every_combination_is_a_condition_once() -> None:
    sets = read_prompt_sets(["humaneval", "gsm8k", "humaneval"], 2)
    assert [one.name for one in sets] == ["humaneval", "gsm8k"]
    fast = Emulation(20.0, 4.0)
    made = conditions(sets, [1, 4], [None, fast, None])
    assert len(made) == 8 == len(set(made))
    assert made[0] == Condition("humaneval", 1) and made[-1] == Condition("gsm8k", 4, fast)
    assert made[0].label == "humaneval, batch 1, real devices"
    assert made[-1].label == "gsm8k, batch 4, emulated: target 20 ms, draft step 4 ms (+2% per further row)"


@pytest.mark.parametrize("name", SHIPPED_SETS)
def test_shipped_sets_can_be_read(name: str) -> None:
    (one,) = read_prompt_sets([name], 3)
    assert len(one.prompts) == 3


def test_an_unknown_set_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"--prompts='human'.*humaneval, gsm8k, mt_bench, python_holdout"):
        read_prompt_sets(["human"], 1)


def test_emulation() -> None:
    assert parse_emulation("none", "--emulate") is None
    assert parse_emulation("20:4", "--emulate") == Emulation(20.0, 4.0)
    assert parse_emulation("20:2:0.1", "--emulate") == Emulation(20.0, 2.0, draft_token_cost=0.1)


@pytest.mark.parametrize(
    "text", ["", "20", "20:", "20:4:1:1", "0:4", "-1:4", "20:nan", "20:inf", "20:4:-1", "20:4:nan", "a:b"]
)
def test_bad_emulations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_emulation(text, "--emulate")
    assert caught.value.field == "--emulate" and "20:4:0.02" in caught.value.allowed


prompts = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=60), min_size=1, max_size=6)


@settings(deadline=None)
@given(prompts, st.integers(1, 80))
def test_work_is_different_beginnings_of_the_prompts(token_ids: list[list[int]], num_prompts: int) -> None:
    try:
        work = work_of(token_ids, num_prompts)
    except ConfigError as error:
        assert error.field == "--prompts"
        return
    assert len(work) == num_prompts == len({tuple(one) for one in work})
    for one in work:
        assert one in token_ids or (len(one) >= LEAST_TOKENS and any(ids[: len(one)] == one for ids in token_ids))


@settings(deadline=None)
@given(prompts)
def test_prompts_are_used_whole_first(token_ids: list[list[int]]) -> None:
    different = list(dict.fromkeys(map(tuple, token_ids)))
    assert work_of(token_ids, len(different)) == [list(one) for one in different]


def test_eight_long_prompts_are_enough_for_64_requests() -> None:
    assert len(work_of([[index, *range(100)] for index in range(8)], 64)) == 64
