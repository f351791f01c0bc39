"""Sampled: the same distribution as plain vLLM, counted on real engines (the guarantee of the design's section 3).

Two samples of answers, one from plain vLLM and one from specbranch, are compared by the chi-squared test of homogeneity. Cells with
an expected count under 5 are merged. Each comparison is rejected below a p-value of 1e-4, so with the dozen comparisons here a
faultless implementation would be accused with probability 0.0012. How small a fault would be noticed is the first test's matter.
Every request has its own seed, and where `deterministic` is set the whole test says the same at every run.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import RunEngine
from tests.heads import make_head
from tests.tiny_pair import make_tiny_pair

NUM_SEQUENCES = 4096
LEAST_EXPECTED = 5.0
LEAST_P_VALUE = 1e-4
LEAST_SAMPLED_SHARE = 0.8
# A head that says anything keeps many chunks empty.
LEAST_SAMPLED_SHARE_WITH_HEAD = 0.1
PROMPT = [3, 7, 11, 2]
CASES: dict[str, dict[str, float]] = {
    "temperature 0.5": {"temperature": 0.5},
    "temperature 0.5, top_p 0.9": {"temperature": 0.5, "top_p": 0.9},
    "temperature 1.0": {"temperature": 1.0},
    "temperature 1.0, top_k 5": {"temperature": 1.0, "top_k": 5},
    "temperature 1.5": {"temperature": 1.5},
    "temperature 1.5, top_p 0.8, top_k 6": {"temperature": 1.5, "top_p": 0.8, "top_k": 6},
}
# One of each kind; the others are for `make test-long`.
QUICK_CASES = ("temperature 0.5, top_p 0.9", "temperature 1.0", "temperature 1.5, top_p 0.8, top_k 6")
OTHER_CASES = tuple(name for name in CASES if name not in QUICK_CASES)
HEAD_CASES = ("temperature 0.5", "temperature 1.5, top_p 0.8, top_k 6")


def p_value(first: Iterable[Hashable], second: Iterable[Hashable]) -> float:
    """Of the chi-squared test that two samples come from one distribution; small cells are merged into one."""
    import torch

    counts = (Counter(first), Counter(second))
    totals = [sum(count.values()) for count in counts]
    shares = [total / sum(totals) for total in totals]
    cells: list[tuple[int, int]] = []
    merged = [0, 0]
    for key in sorted(counts[0] | counts[1], key=repr):
        cell = (counts[0][key], counts[1][key])
        if min(shares) * sum(cell) < LEAST_EXPECTED:
            merged = [merged[0] + cell[0], merged[1] + cell[1]]
        else:
            cells.append(cell)
    if min(shares) * sum(merged) >= LEAST_EXPECTED:
        cells.append((merged[0], merged[1]))
    assert len(cells) > 1, "one cell compares nothing"
    statistic = sum(
        (cell[side] - shares[side] * sum(cell)) ** 2 / (shares[side] * sum(cell)) for cell in cells for side in (0, 1)
    )
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def test_the_test_itself() -> None:
    """It takes samples of one distribution for what they are, and notices 2% of the mass in the wrong one of 20 cells."""
    import random

    rng = random.Random(0)
    cells = range(20)
    values = [p_value(rng.choices(cells, k=NUM_SEQUENCES), rng.choices(cells, k=NUM_SEQUENCES)) for _ in range(200)]
    assert min(values) > LEAST_P_VALUE
    assert 0.4 < sum(values) / len(values) < 0.6, "p-values of faultless samples are uniform"
    shifted = [0.05] * 20
    shifted[0] += 0.02
    shifted[1] -= 0.02
    assert p_value(rng.choices(cells, k=NUM_SEQUENCES), rng.choices(cells, shifted, k=NUM_SEQUENCES)) < LEAST_P_VALUE


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_tiny_pair(Path(tmp_path_factory.mktemp("tiny_pair")))


def jobs(cases: Iterable[dict[str, Any]], prompt: Sequence[int], count: int, first_seed: int) -> list[dict[str, Any]]:
    return [
        {
            "prompts": [list(prompt)] * count,
            "max_tokens": 4,
            "batch_size": count,
            "sampling": [{**case, "seed": first_seed + index, "detokenize": False} for index in range(count)],
            "with_status": True,
        }
        for case in cases
    ]


def sampled_share(status: dict[str, Any], before: dict[str, Any] | None) -> float:
    """The share of a job's committed tokens, first tokens left out, that the verification of a sampled draft decided."""

    def count(name: str) -> int:
        return int(status["engine"][name]) - (int(before["engine"][name]) if before else 0)

    num_committed = count("num_accepted_tokens") + count("num_rounds") - NUM_SEQUENCES
    return count("num_sampled_outcomes") / num_committed


TINY_ENGINE: dict[str, Any] = {
    "max_model_len": 64,
    "max_num_seqs": 64,
    "skip_tokenizer_init": True,
}


def plain_samples(run_engine: RunEngine, target: str, cases: Sequence[str]) -> dict[str, list[list[int]]]:
    """Plain vLLM's answers by case."""
    wanted = jobs([CASES[name] for name in cases], PROMPT, NUM_SEQUENCES, 1)
    done = run_engine([{**job, "with_status": False} for job in wanted], model=target, **TINY_ENGINE)["jobs"]
    return {name: job["answers"] for name, job in zip(cases, done, strict=True)}


@pytest.mark.parametrize(
    ("cases", "with_head"),
    [
        pytest.param(QUICK_CASES, False, id="no head"),
        pytest.param(OTHER_CASES, False, id="no head, other cases", marks=pytest.mark.long),
        pytest.param(HEAD_CASES, True, id="a head that says anything", marks=pytest.mark.long),
    ],
)
def test_joint_distribution_of_three_tokens(
    run_engine: RunEngine, tiny_pair: tuple[str, str], tmp_path: Path, cases: tuple[str, ...], with_head: bool
) -> None:
    target, draft = tiny_pair
    plain = plain_samples(run_engine, target, cases)
    speculative: dict[str, Any] = {
        "model": draft,
        "num_speculative_tokens": 3,
        "max_branches": 2,
        "stop_rule": "none",
        "on_miss": "wait:3",
        "draft_top_m": 8,
        "deterministic": True,
    }
    if with_head:
        sizes = {"hidden_size": 64, "num_target_layers": 2, "num_layers": 2}
        speculative["length_head"] = make_head(tmp_path / "head", "random", pair=tiny_pair, gamma=3, **sizes)
    sampled_jobs = jobs([CASES[name] for name in cases], PROMPT, NUM_SEQUENCES, 10**6)
    ours = run_engine(sampled_jobs, speculative=speculative, model=target, **TINY_ENGINE)
    before = None
    found = {}
    for name, done in zip(cases, ours["jobs"], strict=True):
        share = sampled_share(done["status"], before)
        before = done["status"]
        least = LEAST_SAMPLED_SHARE_WITH_HEAD if with_head else LEAST_SAMPLED_SHARE
        assert share >= least, f"{name}: only {share:.0%} verified a sampled draft"
        found[name] = p_value(
            (tuple(answer[1:]) for answer in plain[name]), (tuple(answer[1:]) for answer in done["answers"])
        )
        print(f"{name}: p = {found[name]:.4f}, {share:.0%} of the tokens verified a sampled draft")
    assert all(value > LEAST_P_VALUE for value in found.values()), found
    assert before is not None
    assert before["engine"]["num_unsound_distributions"] == 0
    assert before["engine"]["num_foreign_drafts"] == 0
    classes = [before["engine"][f"num_head_classes_{one}"] for one in range(3)]
    print(f"classes: {classes}")
    assert min(classes) > 0 if with_head else classes == [0, 0, 0]


@pytest.mark.long
def test_single_positions_of_the_shipped_pair(run_engine: RunEngine, prompts: list[list[int]]) -> None:
    """On a real vocabulary, as served: not deterministic, drafts whenever they are ready."""
    case = [{"temperature": 1.0}]
    engine: dict[str, Any] = {"max_num_seqs": 64, "max_model_len": 256, "in_process": False}
    prompt = prompts[0]
    plain = run_engine([{**jobs(case, prompt, NUM_SEQUENCES, 1)[0], "with_status": False}], **engine)
    ours = run_engine(jobs(case, prompt, NUM_SEQUENCES, 10**6), speculative={}, **engine)
    assert ours["jobs"][0]["status"]["engine"]["num_sampled_outcomes"] > NUM_SEQUENCES / 2
    for position in range(4):
        samples = [[answer[position] for answer in done["jobs"][0]["answers"]] for done in (plain, ours)]
        value = p_value(*samples)
        print(f"position {position}: p = {value:.4f}")
        assert value > LEAST_P_VALUE
