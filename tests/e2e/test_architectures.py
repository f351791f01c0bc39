"""Other architectures than the shipped pair's on real engines: the same tokens as transformers, drafts that are accepted, and where
vLLM can return hidden states, the length head's features are transformers' too.
"""

import random
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import VOCAB_SIZE, WITH_HIDDEN_STATES, WITHOUT, make_pair
from tests.e2e.conftest import RunEngine
from tests.feature_reference import NUM_LAYERS, check_features

NUM_PROMPTS = 8
NUM_TOKENS = 40
# Top-2 gap of logits under which two implementations in float32 may differ.
NEAR_TIE = 1e-4


def accepts(answer: list[int], prompt: list[int], model: Any) -> int:
    """Assert that an answer is greedy by transformers; returns how many of its tokens were near-ties that went the other way."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    gaps = logits.amax(dim=1) - chosen
    assert gaps.max() < NEAR_TIE, f"token {int(gaps.argmax())} is {float(gaps.max())} below the best"
    return int((gaps > 0).sum())


@pytest.mark.parametrize(
    "architecture",
    [
        name if name == "gemma3" else pytest.param(name, marks=pytest.mark.long)
        for name in (*WITH_HIDDEN_STATES, *WITHOUT)
    ],
)
def test_greedy_answers_and_features(run_engine: RunEngine, tmp_path: Path, architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    target, draft = make_pair(tmp_path, architecture)
    rng = random.Random(0)
    prompts = [rng.choices(range(2, VOCAB_SIZE), k=5 + 9 * index) for index in range(NUM_PROMPTS)]
    speculative: dict[str, Any] = {"model": draft, "deterministic": True}
    with_features = architecture in WITH_HIDDEN_STATES
    if with_features:
        speculative["head_layers"] = NUM_LAYERS
    job = {"prompts": prompts, "max_tokens": NUM_TOKENS, "batch_size": NUM_PROMPTS // 2, "once_up": True}
    result = run_engine(
        [job | {"with_features": with_features}],
        speculative=speculative,
        model=target,
        max_model_len=192,
        max_num_batched_tokens=64,
        skip_tokenizer_init=True,
    )
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    (done,) = result["jobs"]
    num_ties = sum(accepts(answer, prompt, model) for answer, prompt in zip(done["answers"], prompts, strict=True))
    engine = result["status"]["engine"]
    print(f"{architecture}: {engine['num_accepted_tokens']} draft tokens accepted in {engine['num_rounds']} rounds")
    assert num_ties <= 1
    distinct = [len(set(answer)) for answer in done["answers"]]
    print(f"distinct tokens per answer: {distinct}")
    assert sorted(distinct)[NUM_PROMPTS // 2] > NUM_TOKENS // 8, "a model that repeats itself shows nothing"
    assert engine["num_accepted_tokens"] > engine["num_rounds"] / 3
    if with_features:
        (records,) = done["features"]
        found = check_features(records, target)
        print(f"rounds: {found}")
        assert all(found[kind] for kind in ("first", "none accepted", "all")), found
