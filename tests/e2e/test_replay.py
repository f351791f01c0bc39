"""The replay beside the real engine: a deterministic engine takes just the rounds that its replay says."""

import pytest

pytest.importorskip("vllm")

from tests.model_paths import DRAFT, TARGET, holdout_prompts
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_model import DraftModel, DraftModelSettings
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure import running
from vllm_specbranch.measure_messages import RunResult
from vllm_specbranch.provenance import available_cores
from vllm_specbranch.replay import Recording, Times, replay
from vllm_specbranch.replay_study import TOKENS_BEYOND, Study, recordings_of

NUM_TOKENS = 48
POLICIES = ("best_first", "specbranch")
COUNTED = ("num_rounds", "num_hits", "num_kept_tokens")
Runs = tuple[list[Recording], dict[str, RunResult]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """What plain vLLM writes, and runs of deterministic engines over the same prompts."""
    places = place(available_cores(), 0)
    lineup = Lineup(TARGET, DRAFT, places, kv_cache_bytes=64 << 20, enforce_eager=True, max_num_seqs=1, num_engines=3)
    ours = [lineup.specbranch(6, policy, policy=policy, deterministic=True) for policy in POLICIES]
    with running([lineup.plain(), *ours], at_once=2) as engines:
        prompts = engines[0].encode(holdout_prompts(6))
        recorded = engines[0].run(prompts, NUM_TOKENS + TOKENS_BEYOND)
        results = {engine.spec.name: engine.run(prompts, NUM_TOKENS) for engine in engines[1:]}
    return recordings_of(prompts, recorded, NUM_TOKENS), results


@pytest.fixture(scope="module")
def model() -> DraftModel:
    return DraftModel.load(DraftModelSettings(DRAFT, 1024, dtype="float32", enforce_eager=True))


@pytest.fixture(scope="module")
def study(runs: Runs, model: DraftModel) -> Study:
    return Study(model, model.num_blocks, model.block_size, runs[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_deterministic_engine_counts_as_its_replay(policy: str, runs: Runs, study: Study) -> None:
    recordings, results = runs
    run = results[policy]
    assert [one.token_ids for one in run.requests] == [list(one.tokens[:NUM_TOKENS]) for one in recordings]
    settings = {"policy": policy, "num_speculative_tokens": 6, "deterministic": True}
    replayed = study.run(settings, Times(10.0, 1.0))
    for name in COUNTED:
        assert run.server_counters[name] == pytest.approx(replayed.server[name], rel=0.02), name


def test_remembering_changes_nothing_with_a_real_model(runs: Runs, model: DraftModel, study: Study) -> None:
    recordings, _ = runs
    settings = {"policy": "specbranch", "num_speculative_tokens": 6}
    config = SpecBranchConfig.from_user({"model": DRAFT, **settings})
    kv = KVBlocks(model.num_blocks, model.block_size)
    bare = replay(config, model, kv, recordings, Times(10.0, 1.0))
    remembered = study.run(settings, Times(10.0, 1.0))
    again = study.run(settings, Times(10.0, 1.0))
    assert again == remembered
    # Batches of other shapes round differently, which may turn a near tie.
    assert remembered.num_rounds == pytest.approx(bare.num_rounds, rel=0.02)
    assert remembered.server["num_hits"] == pytest.approx(bare.server["num_hits"], rel=0.02)
