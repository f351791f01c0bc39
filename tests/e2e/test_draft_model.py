"""The draft model in real vLLM: the greedy token of transformers after any history of forks, commits and rollbacks."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from transformers import AutoModelForCausalLM

from tests.architectures import VOCAB_SIZE, make_pair
from tests.model_paths import DRAFT
from vllm_specbranch.draft_model import DraftModel, DraftModelSettings, Row
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks
from vllm_specbranch.messages import Sampling
from vllm_specbranch.token_tree import Candidates

TOP_K = 8
MAX_GAP = 1e-5
"""Top-two logit gap under which float32 runs may disagree on the greedy token."""


def settings(**changes: Any) -> DraftModelSettings:
    base: dict[str, Any] = {"model": DRAFT, "max_model_len": 1024, "dtype": "float32", "kv_cache_bytes": 16 << 20}
    return DraftModelSettings(**(base | changes))


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32).eval()


@pytest.fixture(scope="module", params=[False, True], ids=["compiled", "eager"])
def model(request: pytest.FixtureRequest) -> DraftModel:
    return DraftModel.load(settings(enforce_eager=request.param))


class Driver:
    """Feeds sequences through a draft model and checks every answer against transformers."""

    def __init__(self, model: DraftModel, reference: Any) -> None:
        self.model = model
        self.reference = reference
        self.kv = KVBlocks(model.num_blocks, model.block_size)
        self.tokens: dict[int, list[int]] = {}
        self.num_seqs = 0

    def open(self) -> int:
        seq, self.num_seqs = self.num_seqs, self.num_seqs + 1
        self.kv.allocate(seq)
        self.tokens[seq] = []
        return seq

    def fork(self, seq: int, num_tokens: int | None = None) -> int:
        new, self.num_seqs = self.num_seqs, self.num_seqs + 1
        length = len(self.tokens[seq]) if num_tokens is None else num_tokens
        self.kv.fork(seq, new, length)
        self.tokens[new] = self.tokens[seq][:length]
        return new

    def rollback(self, seq: int, num_tokens: int) -> None:
        self.kv.rollback(seq, num_tokens)
        del self.tokens[seq][num_tokens:]

    def commit(self, winner: int, losers: Sequence[int]) -> None:
        self.kv.commit(winner, losers)
        for loser in losers:
            del self.tokens[loser]

    def feed(self, batch: Mapping[int, Sequence[int]]) -> dict[int, int]:
        """One forward over the sequences of `batch`; returns each one's greedy next token."""
        rows, copies = [], list[BlockCopy]()
        for seq, tokens in batch.items():
            position = len(self.tokens[seq])
            copies += self.kv.append(seq, len(tokens))
            self.tokens[seq] += tokens
            rows.append(Row(list(tokens), position, self.kv.block_ids(seq)))
        answers = self.model.forward(rows, copies, TOP_K)
        self.kv.check_integrity()
        for seq, answer in zip(batch, answers, strict=True):
            self.check(self.tokens[seq], answer)
        return {seq: answer.token_ids[0] for seq, answer in zip(batch, answers, strict=True)}

    @torch.inference_mode()
    def check(self, tokens: Sequence[int], answer: Candidates) -> None:
        logits = self.reference(torch.tensor([list(tokens)])).logits[0, -1]
        best = logits.topk(2)
        assert len(answer.token_ids) == len(set(answer.token_ids)) == TOP_K
        if answer.token_ids[0] != int(logits.argmax()):
            gap = float(best.values[0] - best.values[1])
            assert gap < MAX_GAP, f"{len(tokens)} tokens: {answer.token_ids[0]} is not {best.indices[0]}, gap {gap}"
        expected = logits.softmax(-1)[list(answer.token_ids)]
        torch.testing.assert_close(torch.tensor(answer.probs), expected, rtol=2e-3, atol=1e-5)
        assert list(answer.probs) == sorted(answer.probs, reverse=True)


@pytest.fixture
def driver(model: DraftModel, reference: Any) -> Iterator[Driver]:
    yield Driver(model, reference)


def random_tokens(rng: random.Random, length: int, vocab_size: int = 4096) -> list[int]:
    return [rng.randrange(3, vocab_size) for _ in range(length)]


def test_plain_decode_equals_transformers_generate(driver: Driver) -> None:
    prompt = random_tokens(random.Random(1), 37)
    expected = driver.reference.generate(
        torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(prompt) :].tolist()
    seq = driver.open()
    token = driver.feed({seq: prompt})[seq]
    output = [token]
    while len(output) < len(expected):
        token = driver.feed({seq: [token]})[seq]
        output.append(token)
    assert output == expected


@pytest.mark.parametrize("chunk", [1, 31, 32, 33, 64, 200])
def test_chunked_prefill(driver: Driver, chunk: int) -> None:
    prompt, seq = random_tokens(random.Random(2), 200), driver.open()
    for start in range(0, len(prompt), chunk):
        token = driver.feed({seq: prompt[start : start + chunk]})[seq]
    for _ in range(4):
        token = driver.feed({seq: [token]})[seq]


def test_rows_of_many_requests_and_lengths_in_one_forward(driver: Driver) -> None:
    rng = random.Random(3)
    seqs = [driver.open() for _ in range(6)]
    driver.feed({seq: random_tokens(rng, 20 * index + 1) for index, seq in enumerate(seqs)})
    for _ in range(4):
        driver.feed({seq: random_tokens(rng, rng.choice([1, 1, 2, 5, 40])) for seq in rng.sample(seqs, 5)})
    driver.feed({seq: random_tokens(rng, 1) for seq in seqs})


@pytest.mark.parametrize("trunk_length", [31, 32, 33, 50])
def test_trunk_and_branches_after_forks(driver: Driver, trunk_length: int) -> None:
    """Branches fork before, at and after a block boundary, and none sees what another writes."""
    rng, trunk = random.Random(4), driver.open()
    driver.feed({trunk: random_tokens(rng, trunk_length)})
    branches = [driver.fork(trunk) for _ in range(3)]
    tokens = driver.feed({seq: random_tokens(rng, 1) for seq in [*branches, trunk]})
    twig = driver.fork(branches[0])
    tokens[twig] = random_tokens(rng, 1)[0]
    for _ in range(5):
        tokens = driver.feed({seq: [token] for seq, token in tokens.items()})
    driver.feed({trunk: random_tokens(rng, 3), branches[1]: random_tokens(rng, 1), twig: random_tokens(rng, 2)})


def test_commit_frees_losers_whose_blocks_are_used_again(driver: Driver) -> None:
    rng, trunk = random.Random(5), driver.open()
    driver.feed({trunk: random_tokens(rng, 40)})
    winner, loser = driver.fork(trunk), driver.fork(trunk)
    driver.feed({winner: random_tokens(rng, 2), loser: random_tokens(rng, 30)})
    driver.commit(winner, [trunk, loser])
    other = driver.open()
    tokens = driver.feed({other: random_tokens(rng, 90), winner: random_tokens(rng, 1)})
    for _ in range(3):
        tokens = driver.feed({seq: [token] for seq, token in tokens.items()})


@pytest.mark.parametrize("keep", [1, 31, 32, 33, 63])
def test_rollback_then_other_tokens(driver: Driver, keep: int) -> None:
    rng, seq = random.Random(6), driver.open()
    driver.feed({seq: random_tokens(rng, 64)})
    driver.rollback(seq, keep)
    token = driver.feed({seq: random_tokens(rng, 3)})[seq]
    driver.feed({seq: [token]})


def test_a_rollback_behind_a_sliding_window(tmp_path: Path) -> None:
    """Layers with a window of 32 tokens beside full ones: what has left the window is needed again after a rollback."""
    _, path = make_pair(tmp_path, "gemma3")
    model = DraftModel.load(settings(model=path, max_model_len=256, enforce_eager=True))
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    driver, rng = Driver(model, reference), random.Random(9)
    seq = driver.open()
    driver.feed({seq: random_tokens(rng, 100, VOCAB_SIZE)})
    driver.rollback(seq, 40)
    branch = driver.fork(seq)
    tokens = driver.feed({seq: random_tokens(rng, 3, VOCAB_SIZE), branch: random_tokens(rng, 30, VOCAB_SIZE)})
    for _ in range(4):
        tokens = driver.feed({one: [token] for one, token in tokens.items()})


def test_rollback_of_a_fork_leaves_the_trunk_alone(driver: Driver) -> None:
    rng, trunk = random.Random(7), driver.open()
    driver.feed({trunk: random_tokens(rng, 45)})
    branch = driver.fork(trunk, 40)
    driver.feed({branch: random_tokens(rng, 4)})
    driver.rollback(branch, 36)
    driver.feed({branch: random_tokens(rng, 2), trunk: random_tokens(rng, 1)})


def test_copies_may_chain_before_one_forward(driver: Driver) -> None:
    """A fork of a fork whose own tail copy has not been done yet gets the original block."""
    rng, trunk = random.Random(8), driver.open()
    driver.feed({trunk: random_tokens(rng, 20)})
    rows, copies = [], list[BlockCopy]()
    branch = driver.fork(trunk)
    twig_at = len(driver.tokens[trunk])
    copies += driver.kv.append(branch, 1)
    twig = driver.num_seqs
    driver.kv.fork(branch, twig, twig_at)
    copies += driver.kv.append(twig, 1)
    assert len(copies) == 2 and copies[0].destination == copies[1].source
    for seq in (branch, twig):
        token = random_tokens(rng, 1)
        driver.tokens[seq] = driver.tokens[trunk] + token
        rows.append(Row(token, twig_at, driver.kv.block_ids(seq)))
    for seq, answer in zip((branch, twig), driver.model.forward(rows, copies, TOP_K), strict=True):
        driver.check(driver.tokens[seq], answer)


@pytest.mark.parametrize("seed", range(3))
def test_random_histories(driver: Driver, seed: int) -> None:
    """Requests open, fork, roll back, commit and decode in random order, several rows per forward."""
    rng = random.Random(seed)
    for _ in range(40):
        seqs = list(driver.tokens)
        action = rng.choice(["open", "fork", "fork", "rollback", "commit", "feed", "feed", "feed"])
        if action == "open" and len(seqs) < 10:
            driver.feed({driver.open(): random_tokens(rng, rng.randint(1, 100))})
        elif action == "fork" and 0 < len(seqs) < 12:
            parent = rng.choice(seqs)
            length = len(driver.tokens[parent])
            child = driver.fork(parent, rng.choice([length, rng.randint(1, length)]))
            driver.feed({child: random_tokens(rng, 1)})
        elif action == "rollback" and seqs:
            seq = rng.choice(seqs)
            driver.rollback(seq, rng.randint(1, len(driver.tokens[seq])))
        elif action == "commit" and len(seqs) > 3:
            winner, *losers = rng.sample(seqs, 3)
            driver.commit(winner, losers)
        elif seqs:
            chosen = rng.sample(seqs, rng.randint(1, len(seqs)))
            driver.feed({seq: random_tokens(rng, rng.choice([1, 1, 1, 2, 7, 33])) for seq in chosen})


def test_one_row_too_many_or_too_few_blocks_is_refused(model: DraftModel) -> None:
    with pytest.raises(AssertionError):
        model.forward([], [], 1)
    with pytest.raises(AssertionError):
        model.forward([Row([5, 6], model.block_size - 1, [0])], [], 1)


def test_bfloat16_chooses_a_near_best_token(reference: Any) -> None:
    low = DraftModel.load(settings(dtype="bfloat16", enforce_eager=True))
    tokens = random_tokens(random.Random(9), 60)
    blocks = list(range(4))
    token = low.forward([Row(tokens, 0, blocks)], [], 1)[0].token_ids[0]
    for _ in range(16):
        tokens.append(token)
        (answer,) = low.forward([Row([token], len(tokens) - 1, blocks)], [], 1)
        token = answer.token_ids[0]
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, -1]
        assert float(logits.max() - logits[token]) < 0.25


def test_ties_give_the_lowest_id_first() -> None:
    from vllm_specbranch.draft_runtime import top_candidates

    logits = torch.zeros(3, 300, dtype=torch.bfloat16)
    logits[0, [250, 40, 111]] = 3.0
    logits[1, [7, 8]] = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    for top_k in (1, 2, 4, 300, 500):
        ids, probs = top_candidates(logits, top_k, [None] * 3)
        assert [row[0] for row in ids] == logits.argmax(-1).tolist() == [40, 8, 0]
        assert all(len(row) == len(set(row)) == min(top_k, 300) for row in ids)
        expected = logits.float().softmax(-1).gather(1, torch.tensor(ids))
        torch.testing.assert_close(torch.tensor(probs), expected)


def test_distributions_to_draw_from() -> None:
    """Temperature, truncation and renormalisation per row, beside rows that are not sampled."""
    from vllm_specbranch.draft_runtime import top_candidates

    torch.manual_seed(0)
    logits = torch.randn(5, 40) * 3
    samplings = [None, Sampling(0.5, 8, 1), Sampling(2.0, 3, 1), None, Sampling(1.0, 1000, 1)]
    for rows in ([0, 1, 2, 3, 4], [1, 2], [0, 3], [2, 0]):
        ids, probs = top_candidates(logits[rows], 4, [samplings[row] for row in rows])
        for row, row_ids, row_probs in zip(rows, ids, probs, strict=True):
            one = samplings[row]
            order = logits[row].argsort(descending=True).tolist()
            size = 4 if one is None else min(one.top_m, 40)
            assert row_ids == order[:size]
            whole = (
                logits[row].softmax(-1) if one is None else (logits[row][order[:size]] / one.temperature).softmax(-1)
            )
            expected = whole[order[:size]] if one is None else whole
            torch.testing.assert_close(torch.tensor(row_probs), expected)


def test_limits(model: DraftModel) -> None:
    assert (model.vocab_size, model.max_model_len, model.block_size) == (4096, 1024, 32)
    bytes_per_block = 2 * 2 * 32 * (2 * 32) * 4
    assert model.num_blocks == (16 << 20) // bytes_per_block


def test_a_missing_model_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="model="):
        DraftModel.load(settings(model="/no/such/model"))


def test_a_kv_cache_below_one_sequence_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="draft_kv_cache_bytes"):
        DraftModel.load(settings(kv_cache_bytes=1 << 19, enforce_eager=True))


def test_a_state_space_model_is_refused_before_its_weights_load(tmp_path: Path) -> None:
    config = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 64, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1, "state_size": 8}))
    with pytest.raises(ConfigError, match="full or sliding-window attention"):
        DraftModel.load(settings(model=str(tmp_path)))
