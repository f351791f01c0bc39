"""The three bugs of vLLM's sampling on a CPU without Triton, shown and mended on vLLM's own functions and
RejectionSampler.

The kernel overrides are registered before any patch is applied, which is the order in a real worker.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vllm_specbranch import patching
from vllm_specbranch.patches import rejection_sampler as expand_records
from vllm_specbranch.patches import topk_topp_sampler as top_k_records

VERSION = "0.32.0"
EXPAND, TOP_K = expand_records.PATCHES, top_k_records.PATCHES
VOCAB_SIZE = 8
# Chi-squared with 3 degrees of freedom: exceeded by chance once in 10,000.
CHI_SQUARED_BOUND = 21.1


@pytest.fixture(scope="module", autouse=True)
def cpu_kernels() -> None:
    from vllm.platforms import current_platform
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.sample import rejection_sampler

    if not isinstance(rejection_sampler.expand_kernel, KernelOverride):
        current_platform.register_triton_kernel_overrides()
    if not isinstance(rejection_sampler.expand_kernel, KernelOverride):
        pytest.skip("this machine runs vLLM's Triton kernels; the bugs are those of their CPU fallbacks")


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    there = [patch for patch in (*EXPAND, *TOP_K) if patching.is_applied(patch)]
    patching.revert(there)
    yield
    patching.revert((*EXPAND, *TOP_K))
    patching.apply(there, VERSION)


def expand(x: torch.Tensor, replace_from: int = 0, replace_to: int = 0) -> torch.Tensor:
    """Expand `x` `[3]` for 2, 0 and 3 draft tokens, with vLLM's function as its callers find it."""
    from vllm.v1.sample import rejection_sampler

    counts = torch.tensor([2, 2, 5], dtype=torch.int32)
    expanded: torch.Tensor = rejection_sampler.expand_batch_to_tokens(x, counts, 5, replace_from, replace_to)
    return expanded


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `new_empty` finds: not zeros, and not what a right result would be."""

    def new_poisoned(self: torch.Tensor, *size: int) -> torch.Tensor:
        return self.new_full(size, 77)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_poisoned)


VALUES = [
    pytest.param(torch.tensor([0.0, 9.5, 0.7], dtype=torch.float32), [1.0, 1.0, 0.7, 0.7, 0.7], id="float32"),
    pytest.param(torch.tensor([0.0, 9.5, 0.7], dtype=torch.float64), [1.0, 1.0, 0.7, 0.7, 0.7], id="float64"),
    pytest.param(torch.tensor([0.0, 9.5, 0.75], dtype=torch.bfloat16), [1.0, 1.0, 0.75, 0.75, 0.75], id="bfloat16"),
    pytest.param(torch.tensor([0, 9, 3], dtype=torch.int32), [1, 1, 3, 3, 3], id="int32"),
]


@pytest.mark.parametrize(("x", "expected"), VALUES)
def test_expand_is_broken_upstream(poisoned_memory: None, x: torch.Tensor, expected: list[float]) -> None:
    assert expand(x, 0, 1).tolist() == [77] * 5


@pytest.mark.parametrize(
    ("x", "expected"), [*VALUES, pytest.param(torch.tensor([0, 9, 3]), [1, 1, 3, 3, 3], id="int64")]
)
def test_expand_is_right_when_patched(poisoned_memory: None, x: torch.Tensor, expected: list[float]) -> None:
    before = x.clone()
    patching.apply(EXPAND, VERSION)
    expanded = expand(x, 0, 1)
    assert torch.equal(expanded, torch.tensor(expected, dtype=x.dtype))
    assert expanded.dtype == x.dtype
    assert torch.equal(expand(x), x[torch.tensor([0, 0, 2, 2, 2])])
    assert torch.equal(x, before)


def test_expand_takes_a_batch_without_tokens() -> None:
    from vllm.v1.sample import rejection_sampler

    patching.apply(EXPAND, VERSION)
    none = torch.zeros(2, dtype=torch.int32)
    assert rejection_sampler.expand_batch_to_tokens(torch.ones(2), none, 0).shape == (0,)


def top_k_of_nothing() -> torch.Tensor:
    from vllm.v1.sample.ops import topk_topp_sampler

    masked: torch.Tensor = topk_topp_sampler.apply_top_k_top_p(
        torch.empty(0, VOCAB_SIZE), torch.empty(0, dtype=torch.int32), None
    )
    return masked


def test_top_k_of_no_rows_raises_upstream_and_passes_when_patched() -> None:
    with pytest.raises(RuntimeError, match="max"):
        top_k_of_nothing()
    patching.apply(TOP_K, VERSION)
    assert top_k_of_nothing().shape == (0, VOCAB_SIZE)


def test_top_k_of_rows_stays_upstreams() -> None:
    from vllm.v1.sample.ops import topk_topp_sampler

    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(1))
    k = torch.tensor([1, 3, VOCAB_SIZE, 2], dtype=torch.int32)
    expected = topk_topp_sampler.apply_top_k_only(logits.clone(), k)
    patching.apply(TOP_K, VERSION)
    assert torch.equal(topk_topp_sampler.apply_top_k_only(logits.clone(), k), expected)
    assert torch.isfinite(expected).sum(1).tolist() == [1, 3, VOCAB_SIZE, 2]


def sampling_metadata(num_requests: int, temperature: float, top_k: int | None, top_p: float | None) -> Any:
    """Build the metadata as vLLM's input batch does: float32 temperature and top_p, int32 top_k."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    no_penalty = torch.zeros(num_requests)
    return SamplingMetadata(
        temperature=torch.full((num_requests,), temperature),
        all_greedy=False,
        all_random=True,
        top_p=None if top_p is None else torch.full((num_requests,), top_p),
        top_k=None if top_k is None else torch.full((num_requests,), top_k, dtype=torch.int32),
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=no_penalty,
        presence_penalties=no_penalty,
        repetition_penalties=no_penalty + 1,
        output_token_ids=[[] for _ in range(num_requests)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def verify(
    drafts: list[list[int]], draft_probs: torch.Tensor | None, logits: torch.Tensor, metadata: Any
) -> list[list[int]]:
    """Run vLLM's RejectionSampler. `logits`: `[VOCAB_SIZE]` for every position alike, or one row per draft and bonus token."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    spec_metadata = SpecDecodeMetadata.make_dummy(drafts, torch.device("cpu"))
    if logits.dim() == 1:
        logits = logits.expand(sum(map(len, drafts)) + len(drafts), -1)
    else:
        ends = list(itertools.accumulate(len(one) + 1 for one in drafts))
        targets = [row for row in range(ends[-1]) if row + 1 not in ends]
        spec_metadata.target_logits_indices = torch.tensor(targets)
        spec_metadata.bonus_logits_indices = torch.tensor(ends) - 1
    output = RejectionSampler(Sampler())(spec_metadata, draft_probs, logits, metadata)
    tokens, _ = RejectionSampler.parse_output(output.sampled_token_ids, VOCAB_SIZE)
    return [list(row) for row in tokens]


def truncated(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Return what sampling with these parameters means, written down anew."""
    probs = (logits.double() / temperature).softmax(0)
    ranked = sorted(range(VOCAB_SIZE), key=lambda token: -probs[token])[:top_k]
    total = sum(float(probs[token]) for token in ranked)
    kept: list[int] = []
    mass = 0.0
    for token in ranked:
        if mass >= top_p:
            break
        kept.append(token)
        mass += float(probs[token]) / total
    allowed = torch.zeros(VOCAB_SIZE, dtype=torch.double)
    allowed[kept] = probs[kept]
    return allowed / allowed.sum()


def chi_squared(tokens: list[int], expected: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB_SIZE).double()
    if counts[expected == 0].any():
        return math.inf
    wanted = expected * len(tokens)
    return float(((counts - wanted) ** 2 / wanted.clamp_min(1e-9))[expected > 0].sum())


@pytest.mark.parametrize("drawn_from", ["one-hot", "uniform"])
def test_the_first_token_follows_the_target_s_truncated_distribution(drawn_from: str) -> None:
    patching.apply((*EXPAND, *TOP_K), VERSION)
    torch.manual_seed(20)
    num_requests = 20_000
    logits = torch.tensor([1.4, 1.0, 0.7, 0.5, -0.2, -0.5, -1.0, -2.0])
    expected = truncated(logits, temperature=0.7, top_k=5, top_p=0.9)
    assert int((expected > 0).sum()) == 4
    if drawn_from == "one-hot":
        drafts, draft_probs = [[1] for _ in range(num_requests)], None
    else:
        drafts = torch.randint(0, VOCAB_SIZE, (num_requests, 1)).tolist()
        draft_probs = torch.full((num_requests, VOCAB_SIZE), 1 / VOCAB_SIZE)
    rows = verify(drafts, draft_probs, logits, sampling_metadata(num_requests, 0.7, 5, 0.9))
    assert chi_squared([row[0] for row in rows], expected) < CHI_SQUARED_BOUND
    bonus = [row[1] for row in rows if len(row) == 2]
    assert len(bonus) > 1_000
    assert chi_squared(bonus, expected) < CHI_SQUARED_BOUND


def test_without_the_patch_the_first_token_is_wrong(poisoned_memory: None) -> None:
    torch.manual_seed(20)
    logits = torch.tensor([1.4, 1.0, 0.7, 0.5, -0.2, -0.5, -1.0, -2.0])
    metadata = sampling_metadata(2_000, 0.7, None, 0.9)
    rows = verify([[1] for _ in range(2_000)], None, logits, metadata)
    assert chi_squared([row[0] for row in rows], truncated(logits, 0.7, VOCAB_SIZE, 0.9)) > 100


def test_a_step_without_drafts_and_with_top_k() -> None:
    logits = torch.tensor([0.0, 5.0, 4.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    metadata = sampling_metadata(3, 1.0, 2, None)
    with pytest.raises(RuntimeError, match="max"):
        verify([[], [], []], None, logits, metadata)
    patching.apply((*EXPAND, *TOP_K), VERSION)
    rows = verify([[], [], []], None, logits, metadata)
    assert [len(row) for row in rows] == [1, 1, 1]
    assert {row[0] for row in rows} <= {1, 2}


def padded_outcome(drawn_from: str, temperature: float) -> list[int]:
    """What a padded request gets: its own row says 7, every later one 2. A request with a draft comes before it."""
    sure = {token: torch.full((VOCAB_SIZE,), -30.0).index_fill_(0, torch.tensor([token]), 30.0) for token in (2, 7)}
    # One row per draft token and one for the bonus token, request by request.
    logits = torch.stack([sure[7], sure[2], sure[7], sure[7], sure[2]])
    draft_probs = None
    if drawn_from == "rows":
        draft_probs = torch.zeros(3, VOCAB_SIZE)
        draft_probs[0, 3] = 1.0
    metadata = sampling_metadata(2, temperature, None, None)
    if not temperature:
        metadata.all_greedy, metadata.all_random = True, False
    return verify([[3], [-1, -1]], draft_probs, logits, metadata)[1]


def test_padding_may_be_accepted_upstream() -> None:
    patching.apply(EXPAND[1:], VERSION)
    assert padded_outcome("one-hot", 1.0) == [2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("drawn_from", ["one-hot", "rows"])
def test_padding_is_rejected_when_patched(drawn_from: str, temperature: float) -> None:
    patching.apply(EXPAND, VERSION)
    assert padded_outcome(drawn_from, temperature) == [7]


def test_drafts_beside_padding_are_verified_as_ever() -> None:
    """Accepted where the target is sure of them, in a sampled batch with and without distributions."""
    patching.apply(EXPAND, VERSION)
    sure = torch.full((VOCAB_SIZE,), -30.0)
    sure[3] = 30.0
    for draft_probs in (None, torch.zeros(3, VOCAB_SIZE).index_fill_(1, torch.tensor([3]), 1.0)):
        rows = verify([[3], [-1, 3]], draft_probs, sure, sampling_metadata(2, 1.0, None, None))
        assert rows == [[3, 3], [3]]
