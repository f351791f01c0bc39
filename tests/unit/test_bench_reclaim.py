"""Preemptions without a model: the ways that are compared differ in what they are said to differ in."""

from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.bench_reclaim import virtual_table
from benchmarks.reclaim_virtual import WAYS, Load, VirtualScheduler, sweep
from vllm_specbranch import patching
from vllm_specbranch.patches import arg_utils
from vllm_specbranch.shipped_pair import draft_path, target_path

# Small blocks and short chunks: a next token often needs a block, and rejected tokens often leave one behind.
LOAD = Load(tuple(3 + 5 * index % 11 for index in range(24)), 30, 8, 8, 12, 0.6, 0.5)


@pytest.fixture(scope="module", autouse=True)
def hooks() -> Iterator[None]:
    there = [patch for patch in arg_utils.PATCHES if patching.is_applied(patch)]
    patching.apply(arg_utils.PATCHES, "0.32.0")
    yield
    patching.revert([patch for patch in arg_utils.PATCHES if patch not in there])


@pytest.fixture(scope="module")
def counted() -> dict[str, Counter[str]]:
    scheduler = VirtualScheduler(target_path(), draft_path())
    return {way: scheduler.run(LOAD, way, seed=0) for way in WAYS}


def test_each_way_does_what_it_is_named_for(counted: dict[str, Counter[str]]) -> None:
    assert [counted[way]["num_reclaimed_blocks"] > 0 for way in WAYS] == [False, True, False, True]
    assert [counted[way]["num_cut_draft_tokens"] > 0 for way in WAYS] == [False, False, True, True]
    assert counted["vllm"]["num_preemptions"] > counted["cut"]["num_preemptions"]


def test_reclamation_alone_is_not_what_vllm_does(counted: dict[str, Counter[str]]) -> None:
    assert counted["reclaim"] != counted["vllm"]
    assert counted["reclaim"]["num_reclaims"] <= counted["reclaim"]["num_reclaimed_blocks"]


def test_a_sweep_keeps_the_facts_of_its_load() -> None:
    rows = list(sweep(VirtualScheduler(target_path(), draft_path()), [LOAD], num_seeds=1))
    assert [row["way"] for row in rows] == list(WAYS)
    for row in rows:
        assert (row["num_draft_tokens"], row["num_requests"], row["acceptance"]) == (8, 24, 0.6)
        assert row["num_verified_tokens"] > row["num_accepted_tokens"] > 0
    assert "50%" in virtual_table(rows)
