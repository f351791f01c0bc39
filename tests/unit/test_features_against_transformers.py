"""The rows of the length head against transformers' hidden states, without an engine: steps laid out as vLLM lays them out.

The real engine is `tests/e2e/test_length_head.py`'s matter; this is the quick one, and it shows that the check sees a wrong row.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from tests.feature_reference import NUM_LAYERS, Record, check_features, reference
from tests.heads import HIDDEN_SIZE
from tests.model_paths import TARGET, holdout_prompts
from vllm_specbranch.head_features import HeadFeatures, sampled_rows

NUM_TOKENS = 100
PROMPT_LENGTHS = (20, 50, 70)
CHUNK = 32
MAX_DRAFTS = 4
Rule = Callable[[Sequence[str], dict[str, int], Sequence[int] | None, Sequence[Sequence[int]]], list[int]]


@dataclass
class Sequenced:
    """One request that will turn out to be `tokens`."""

    tokens: list[int]
    num_prompt: int
    num_computed: int = 0
    states: torch.Tensor = field(init=False)
    embeddings: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.states, self.embeddings = reference(self.tokens)

    @property
    def is_done(self) -> bool:
        return self.num_computed + MAX_DRAFTS + 2 > len(self.tokens)

    def step(self, rng: random.Random) -> tuple[torch.Tensor, int, list[int]]:
        """One step: hidden states `[num_layers, n, hidden_size]` of its n tokens, draft tokens, committed tokens."""
        start, left = self.num_computed, self.num_prompt - self.num_computed
        if left > 0:
            end = start + min(CHUNK, left)
            self.num_computed = end
            return self.states[:, start:end], 0, self.tokens[end : end + 1] if end == self.num_prompt else []
        num_drafts = rng.randint(0, MAX_DRAFTS)
        num_accepted = rng.randint(0, num_drafts)
        end = start + 1 + num_accepted
        self.num_computed = end
        # What the target says at a rejected draft token is nothing of this text.
        rejected = torch.randn(NUM_LAYERS, num_drafts - num_accepted, HIDDEN_SIZE)
        return torch.cat([self.states[:, start:end], rejected], dim=1), num_drafts, self.tokens[start + 1 : end + 1]


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    return [tokenizer.encode(text)[:NUM_TOKENS] for text in holdout_prompts(len(PROMPT_LENGTHS), 400)]


def record(texts: list[list[int]], rule: Rule) -> list[Record]:
    """Run all requests through mixed steps; what the head would have seen with a rule for the rows."""
    rng = random.Random(0)
    torch.manual_seed(0)
    requests = {
        f"r{index}": Sequenced(tokens, num_prompt)
        for index, (tokens, num_prompt) in enumerate(zip(texts, PROMPT_LENGTHS, strict=True))
    }
    features = HeadFeatures(lambda ids: ids, NUM_LAYERS, torch.device("cpu"))
    records: list[Record] = []
    while names := [name for name, one in requests.items() if not one.is_done]:
        steps = [requests[name].step(rng) for name in names]
        hidden_states = torch.cat([states for states, _, _ in steps], dim=1)
        num_drafts, sampled = [count for _, count, _ in steps], [tokens for _, _, tokens in steps]
        with_tokens = [name for name, tokens in zip(names, sampled, strict=True) if tokens]
        if not with_tokens:
            continue
        scheduled = {name: states.shape[1] for name, (states, _, _) in zip(names, steps, strict=True)}
        rows = rule(names, scheduled, num_drafts if any(num_drafts) else None, sampled)
        newest = torch.stack([requests[name].embeddings[requests[name].num_computed] for name in with_tokens])
        z = features.assemble(list(hidden_states), rows, newest)
        for name, row in zip(with_tokens, z.tolist(), strict=True):
            tokens = requests[name].tokens[: requests[name].num_computed + 1]
            records.append((name, tokens, num_drafts[names.index(name)], row))
    return records


def test_every_row_is_the_one_that_the_newest_token_was_sampled_at(texts: list[list[int]]) -> None:
    found = check_features(record(texts, sampled_rows))
    assert min(found.values()) >= 3, found


def last_of_the_request(
    names: Sequence[str], scheduled: dict[str, int], _: Sequence[int] | None, sampled: Sequence[Sequence[int]]
) -> list[int]:
    """The row of its last token, a rejected draft token perhaps."""
    return sampled_rows(names, scheduled, None, [tokens[:1] for tokens in sampled])


def last_committed_before_the_step(
    names: Sequence[str], scheduled: dict[str, int], num_drafts: Sequence[int] | None, sampled: Sequence[Sequence[int]]
) -> list[int]:
    """The row that the first new token was sampled at."""
    return sampled_rows(names, scheduled, num_drafts, [tokens[:1] for tokens in sampled])


def another_request_s(
    names: Sequence[str], scheduled: dict[str, int], num_drafts: Sequence[int] | None, sampled: Sequence[Sequence[int]]
) -> list[int]:
    """The right rows in the wrong order."""
    return sampled_rows(names, scheduled, num_drafts, sampled)[::-1]


@pytest.mark.parametrize("rule", [last_of_the_request, last_committed_before_the_step, another_request_s])
def test_a_wrong_row_is_seen(texts: list[list[int]], rule: Rule) -> None:
    with pytest.raises(AssertionError, match="nearest row is"):
        check_features(record(texts, rule))
