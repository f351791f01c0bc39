"""The trials under load: speculation that costs is paused, one that pays is not, each size of the batch for itself."""

import random

import pytest

from tests.draft_engine import Engine, make_engine
from vllm_specbranch import messages
from vllm_specbranch.load_gate import FIRST_REST_ROUNDS, OF_SPECULATION, LoadGate

BLOCK = OF_SPECULATION.block_rounds + OF_SPECULATION.settling_rounds
# As long as a trial can be, with the rest before it in batches of 64.
WARM_UP = (2 * OF_SPECULATION.max_pairs + 1) * BLOCK


def played(gate: LoadGate, num_rounds: int, speed: float, seed: int, size: int = 64, noise: float = 0.1) -> float:
    """Share of rounds with speculation, which makes them so many times as fast as those without."""
    rng = random.Random(seed)
    on = 0
    for _ in range(num_rounds):
        on += gate.is_on
        duration_s = rng.uniform(1.0 - noise, 1.0 + noise) / (speed if gate.is_on else 1.0)
        gate.observe_round(size, duration_s, size)
    return on / num_rounds


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("speed", [0.5, 0.8, 0.9, 0.95])
def test_what_costs_is_paused(speed: float, seed: int) -> None:
    gate = LoadGate()
    played(gate, WARM_UP, speed, seed)
    assert gate.num_trials
    assert played(gate, 15_000, speed, seed + 100) < 0.05


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("speed", [1.1, 1.3, 2.0])
def test_what_pays_goes_on(speed: float, seed: int) -> None:
    gate = LoadGate()
    played(gate, WARM_UP, speed, seed)
    assert gate.num_trials
    assert played(gate, 15_000, speed, seed + 100) > 0.95


def test_a_request_alone_is_drafted_for_from_the_start() -> None:
    gate = LoadGate()
    assert gate.is_on
    assert played(gate, FIRST_REST_ROUNDS, 0.5, 1, size=1) == 1.0


def test_each_size_of_the_batch_is_tried_for_itself() -> None:
    gate = LoadGate()
    played(gate, 4 * WARM_UP, 0.7, 1, size=64)
    played(gate, 4 * WARM_UP, 1.5, 2, size=16)
    assert played(gate, 500, 0.7, 3, size=100) < 0.2, "64 to 127 are alike"
    assert played(gate, 500, 1.5, 4, size=16) > 0.8
    # A batch that changes its size at every round completes no block; nothing is concluded, and nothing breaks.
    trials = gate.num_trials
    for _ in range(100):
        played(gate, 1, 0.7, 5, size=64)
        played(gate, 1, 1.5, 6, size=16)
    assert gate.num_trials == trials


def test_when_the_load_changes_its_nature_the_verdict_follows() -> None:
    gate = LoadGate()
    played(gate, 3000, 0.7, 1)
    assert not gate.is_on
    played(gate, 30_000, 1.5, 2)
    assert played(gate, 5000, 1.5, 3) > 0.9


def rounds(engine: Engine, num_rounds: int, names: list[str], extra_s: float) -> float:
    """Share of rounds in which something was drafted; a round lasts so much longer for each request with drafts."""
    drafted = 0
    for _ in range(num_rounds):
        with_drafts = sum(bool(engine.drafts.get(name)) for name in names)
        drafted += with_drafts > 0
        pace = messages.Pace(8, 1e4, 0.0)
        engine.commit({name: engine.follow(name, 0) for name in names}, pace=pace, round_s=0.01 + extra_s * with_drafts)
        engine.run(8)
    return drafted / num_rounds


@pytest.mark.parametrize("policy", ["specbranch", "fanout", "best_first"])
def test_a_server_stops_drafting_where_that_is_faster(policy: str) -> None:
    """No draft is ever accepted, and each costs: after the trials hardly one is made; the requests stay known."""
    engine = make_engine(policy=policy, on_miss="go")
    names = [f"request {index}" for index in range(16)]
    for name in names:
        engine.open(name, [1, 2, 3])
    assert rounds(engine, 32, names, 1e-3) > 0.5, "at first it is tried"
    rounds(engine, 4 * BLOCK * OF_SPECULATION.min_pairs, names, 1e-3)
    assert rounds(engine, 512, names, 1e-3) < 0.1
    counters = engine.server.counters
    assert counters.num_paused_rounds > 400
    assert counters.num_unknown_requests == 0
    steps = counters.num_steps
    rounds(engine, 16, names, 1e-3)
    assert counters.num_steps == steps, "the draft model rests"
    engine.server.check_integrity()


def test_drafting_comes_back_at_once_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 requests, each some tokens behind: their rows are fed together, after a short pause and after a long one."""
    is_on = True
    monkeypatch.setattr(LoadGate, "is_on", property(lambda _: is_on))
    engine = make_engine(policy="best_first", on_miss="go", num_blocks=4096)
    names = [f"request {index}" for index in range(64)]
    for name in names:
        engine.open(name, [1, 2, 3])
    engine.run(200)
    for pause in (OF_SPECULATION.block_rounds + OF_SPECULATION.settling_rounds, 40):
        is_on = True
        assert rounds(engine, 4, names, 0.0) > 0.0
        is_on = False
        rounds(engine, 1, names, 0.0)
        assert rounds(engine, pause, names, 0.0) == 0.0
        is_on = True
        steps = engine.server.counters.num_steps
        while not all(engine.drafts.get(name) for name in names):
            rounds(engine, 1, names, 0.0)
        assert engine.server.counters.num_steps - steps < 32, "not one request a step"


def test_what_is_read_of_a_pause_counts_for_nothing_but_holds_nothing_up() -> None:
    gate = LoadGate()
    for _ in range(WARM_UP):
        gate.observe_round(64, 1.0 if gate.is_on else 0.5, 64, is_catching_up=True)
    assert gate.num_trials == 0
    for _ in range(50 * WARM_UP):
        gate.observe_round(64, 1.0 if gate.is_on else 0.5, 64, is_catching_up=True)
    assert gate.num_trials and not gate.is_on


@pytest.mark.parametrize("settings", [{"policy": "pearl"}, {"policy": "best_first", "deterministic": True}])
def test_some_policies_know_no_load(settings: dict[str, object]) -> None:
    engine = make_engine(on_miss="go", **settings)
    names = [f"request {index}" for index in range(16)]
    for name in names:
        engine.open(name, [1, 2, 3])
    rounds(engine, 400, names, 1e-3)
    assert engine.server.counters.num_paused_rounds == 0
