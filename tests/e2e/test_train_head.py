"""`train-head` with a real engine: what it records is what transformers says of the same text, and the head that it writes fits."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from benchmarks.head_classes import features_along
from tests.model_paths import DRAFT, TARGET, holdout_prompts
from vllm_specbranch import cli, train_head
from vllm_specbranch.head_data import Rounds, read_rounds
from vllm_specbranch.length_head import load_head
from vllm_specbranch.replay import Recording

GAMMA = 4
NUM_PROMPTS = 12
NUM_TOKENS = 24
# Of so many prompts every greedy round is computed again.
NUM_COMPARED = 4


@dataclass(frozen=True)
class Outcome:
    """What the command left behind."""

    folder: Path
    words: list[str]
    prompts: list[str]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("train-head")
    prompts = [text[:120] for text in holdout_prompts(NUM_PROMPTS)]
    file = folder / "prompts.json"
    file.write_text(json.dumps(prompts))
    words = ["train-head", "--target", TARGET, "--draft", DRAFT, "--prompts", str(file), "--out", str(folder / "out")]
    words += [
        "--num-speculative-tokens",
        str(GAMMA),
        "--max-tokens",
        str(NUM_TOKENS),
        "--rounds",
        "250",
        "--epochs",
        "1",
    ]
    words += ["--dtype", "float32", "--kv-cache-gib", "0.1", "--enforce-eager"]
    assert cli.main(words) == 0
    return Outcome(folder / "out", words, prompts)


@pytest.fixture(scope="module")
def rounds(outcome: Outcome) -> Rounds:
    return read_rounds(outcome.folder / "rounds")


def test_greedy_rounds_are_what_transformers_says(outcome: Outcome, rounds: Rounds) -> None:
    """Features, outcome and confidences of every recorded round, and no round in the middle of a request is missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, draft = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in (TARGET, DRAFT))
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    greedy = rounds.select(rounds.temperatures == 0)
    num_seen = 0
    for index, text in enumerate(outcome.prompts[:NUM_COMPARED]):
        ids = tokenizer.encode(text)
        # The last round may verify tokens beyond those that are generated.
        output = _greedy(target, ids, NUM_TOKENS + GAMMA + 1)
        along = features_along(target, (3, 4, 5, 6), Recording(tuple(ids), tuple(output), len(output)))
        ours = greedy.select(greedy.prompts == index)
        place: int | None = None
        for features, top_probs, accepted in zip(ours.features, ours.top_probs, ours.accepted.tolist(), strict=True):
            if place is None:
                # The first round may come before the draft server has read the prompt; then nothing was drafted for it.
                place = next(one for one in (0, 1) if torch.allclose(features, along[one], atol=1e-3))
            assert torch.allclose(features, along[place], atol=1e-3)
            chain, confidences = _chain(draft, ids + output[: place + 1])
            assert top_probs.tolist() == pytest.approx(confidences, abs=1e-4)
            expected = [ahead == said for ahead, said in zip(output[place + 1 :], chain, strict=False)]
            assert accepted == (expected.index(False) if False in expected else GAMMA)
            place += accepted + 1
            num_seen += 1
        assert place is not None and place >= NUM_TOKENS - 1
    assert num_seen == int((greedy.prompts < NUM_COMPARED).sum()) > 15


def _greedy(model: Any, ids: list[int], num_tokens: int) -> list[int]:
    found = list(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def _chain(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """The draft's own next tokens, and how sure it is of each."""
    chain: list[int] = []
    confidences: list[float] = []
    with torch.inference_mode():
        for _ in range(GAMMA):
            probs = model(torch.tensor([ids + chain])).logits[0, -1].softmax(-1)
            confidences.append(float(probs.max()))
            chain.append(int(probs.argmax()))
    return chain, confidences


def test_sampled_rounds_are_there(rounds: Rounds) -> None:
    sampled = rounds.select(rounds.temperatures > 0)
    assert len(torch.unique(sampled.prompts)) == NUM_PROMPTS
    assert len(sampled) > 40
    assert int(sampled.accepted.max()) <= GAMMA and bool((sampled.top_probs > 0).all())


def test_the_head_fits_and_all_is_kept(outcome: Outcome, rounds: Rounds, monkeypatch: pytest.MonkeyPatch) -> None:
    head, spec = load_head(outcome.folder)
    assert spec.num_features == rounds.features.shape[1] == 5 * 256
    assert set(head.classes(rounds.features)) <= {0, 1, 2}
    report = json.loads((outcome.folder / "report.json").read_text())
    assert report["figures"]["num_rounds"]["held_out"] > 0
    # A second start needs no engine.
    monkeypatch.setattr(train_head, "Engine", None)
    before = (outcome.folder / "head.safetensors").read_bytes()
    assert cli.main(outcome.words) == 0
    assert (outcome.folder / "head.safetensors").read_bytes() == before
