"""Made-up recordings whose tokens a fake draft model agrees with where told to, and their replays. No engine is started."""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st

from tests.fakes import FakeDraftModel
from vllm_specbranch import messages, replay
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.replay import Recording, Replayed, Times
from vllm_specbranch.token_tree import Candidates

BLOCK_SIZE = 4
# Other work on the machine must not fail an example.
patient = settings(deadline=None, max_examples=50)
NUM_BLOCKS = 400
POLICIES: list[dict[str, object]] = [
    {"policy": "pearl"},
    {"policy": "specbranch", "on_miss": "go"},
    {"policy": "specbranch", "on_miss": "wait:2", "stop_threshold": 0.5},
    {"policy": "specbranch", "max_branches": 3, "stop_rule": "none"},
    {"policy": "specbranch", "stop_rule": "adaedl"},
    {"policy": "fanout"},
    {"policy": "best_first", "max_branches": 8},
]


class SteadyModel(FakeDraftModel):
    """Its first candidates are the same however many are asked for, as those of a model are."""

    def predict(self, context: Sequence[int], top_k: int, sampling: messages.Sampling | None = None) -> Candidates:
        found = super().predict(context, self.vocab_size, sampling)
        return Candidates(found.token_ids[:top_k], found.probs[:top_k])


def fake(num_blocks: int = NUM_BLOCKS) -> tuple[SteadyModel, KVBlocks]:
    return SteadyModel(num_blocks, BLOCK_SIZE), KVBlocks(num_blocks, BLOCK_SIZE)


def recordings_of(agrees: Sequence[Sequence[bool]], num_beyond: int = 0, num_prompt_tokens: int = 3) -> list[Recording]:
    """Recordings whose tokens are the draft's first choice where `agrees` says so, else its second."""
    model, _ = fake()
    made = []
    for index, choices in enumerate(agrees):
        prompt = [index, *range(1, num_prompt_tokens)]
        tokens: list[int] = []
        for agree in choices:
            tokens.append(model.predict([*prompt, *tokens], 2).token_ids[0 if agree else 1])
        made.append(Recording(tuple(prompt), tuple(tokens), len(tokens) - num_beyond))
    return made


def config(gamma: int = 4, **keys: object) -> SpecBranchConfig:
    return SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": gamma, **keys})


def run(chosen: SpecBranchConfig, recordings: Sequence[Recording], times: Times, batch_size: int = 1) -> Replayed:
    model, kv = fake()
    result = replay.replay(chosen, model, kv, recordings, times, batch_size)
    assert kv.num_held == 0 and kv.num_tables == 0
    return result


# Durations are multiples of 1/16 s, so that sums are exact and what ends at the same time really does.
draft_step_ms = 125.0
agree_lists = st.lists(st.lists(st.booleans(), min_size=1, max_size=24), min_size=1, max_size=3)
gammas = st.integers(1, 6)
ratios = st.integers(1, 24).map(lambda halves: halves / 2)
