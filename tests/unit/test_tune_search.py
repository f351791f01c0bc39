"""The search for settings, and the verdict on what it found: which method is worth it, and what the reason says.

On made-up speeds.
"""

import json

import pytest

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.tune_search import KEYS, STARTS, VALUES, Found, Search, Settings, Speeds, judge


def hill(settings: Settings) -> float:
    """Best: specbranch, 12 tokens, threshold 0.2, 16 branches, and two tokens waited for after a miss."""
    speed = {"specbranch": 2.0, "best_first": 1.9, "fanout": 1.5, "pearl": 1.2}[str(settings["policy"])]
    bests = {"num_speculative_tokens": 12, "stop_threshold": 0.2, "max_branches": 16, "on_miss": "wait:2"}
    for key, best in bests.items():
        if key in settings:
            distance = abs(VALUES[key].index(settings[key]) - VALUES[key].index(best))
            speed -= 0.05 * distance
    return speed


@pytest.mark.parametrize("seed", range(5))
def test_the_search_finds_the_top(seed: int) -> None:
    tried: list[Settings] = []
    found = Search(hill, seed, lambda settings, _speed, _best: tried.append(settings)).run()
    assert found.settings == {
        "policy": "specbranch",
        "num_speculative_tokens": 12,
        "stop_threshold": 0.2,
        "max_branches": 16,
        "on_miss": "wait:2",
    }
    assert found.speed == 2.0
    assert found.num_tried == len(tried) == len({json.dumps(one, sort_keys=True) for one in tried}) < 40


def test_the_search_repeats_itself() -> None:
    def found(seed: int) -> tuple[Found, list[Settings]]:
        tried: list[Settings] = []
        return Search(hill, seed, lambda settings, *_: tried.append(settings)).run(), tried

    assert found(3) == found(3)


def test_small_gains_are_chance() -> None:
    def flat(settings: Settings) -> float:
        return 1.0 + 1e-4 * float(str(settings["num_speculative_tokens"]))

    assert Search(flat).run([STARTS[3]]).settings == STARTS[3]


def test_what_is_searched_are_settings() -> None:
    for start in STARTS:
        assert {*KEYS[str(start["policy"])], "policy"} == set(start)
        SpecBranchConfig.from_user({"model": "draft", **start})
        for key in KEYS[str(start["policy"])]:
            for value in VALUES[key]:
                SpecBranchConfig.from_user({"model": "draft", **start, key: value})


PLACES = {"runs_on": "core 0 + core 1", "alone_on": "core 0"}


@pytest.mark.parametrize(
    ("ours", "sequential", "c", "alpha", "method", "said"),
    [
        (1.02, 1.04, 10.0, 0.1, "plain", "only 10% of the draft's first choices"),
        (1.0, 0.5, 0.8, 0.9, "plain", "only 0.8 draft steps"),
        (1.0, 0.5, 8.0, 0.9, "plain", "overhead"),
        # Better than plain, but not by what a second device is asked for over draft_model, which is not worth a model itself.
        (1.07, 1.04, 8.0, 0.9, "plain", "specbranch 1.07 times plain decoding, draft_model 1.04 times"),
        (1.3, 1.5, 8.0, 0.9, "draft_model", "draft_model with 4 draft tokens is better"),
        (1.301, 1.3, 8.0, 0.9, "draft_model", "it runs on core 0 + core 1, draft_model on core 0"),
        (1.36, 1.3, 8.0, 0.9, "draft_model", "1.05 times as much"),
        (1.37, 1.3, 8.0, 0.9, "specbranch", "draft_model with 4 draft tokens 1.30 times"),
        (1.5, 1.3, 8.0, 0.9, "specbranch", "1.50 times"),
        (1.5, 0.7, 8.0, 0.9, "specbranch", "runs on core 0 + core 1, the other two on core 0"),
    ],
)
def test_the_verdict(ours: float, sequential: float, c: float, alpha: float, method: str, said: str) -> None:
    verdict = judge(Speeds(ours, sequential, 4), acceptance=alpha, c=c, **PLACES)
    assert verdict.method == method and said in verdict.reason


def test_the_verdict_says_what_it_stands_on() -> None:
    good = {"acceptance": 0.9, "c": 8.0, **PLACES}
    assert "should decode 1.50 times" in judge(Speeds(1.5, 1.2, 2), **good).reason
    measured = judge(Speeds(1.5, 1.2, 2, least=1.3), **good).reason
    assert "decoded 1.50 times" in measured and "median of these runs" in measured and "But" not in measured
    assert "But once it was 0.90 times" in judge(Speeds(1.5, 1.2, 2, least=0.9), **good).reason
    for ours, method in ((1.5, "specbranch"), (1.01, "plain")):
        verdict = judge(Speeds(ours, None, None, least=1.0), **good)
        assert verdict.method == method and "draft_model could not be run" in verdict.reason


def test_the_first_start_of_the_search_is_what_a_user_gets_who_says_nothing() -> None:
    default, first = SpecBranchConfig.from_user({"model": "m"}), SpecBranchConfig.from_user({"model": "m"} | STARTS[0])
    assert first == default
