"""The whole sampling surface, on real engines: the answers are plain vLLM's where they are determined, and what was asked for where
they are random; what vLLM refuses with speculative decoding is refused the same way.

Two engines answer everything but LoRA, which has two of its own: vLLM's CPU engine dies of `prompt_logprobs` with LoRA enabled.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import sampling_cases as cases
from tests.e2e.conftest import RunEngine
from tests.e2e.sampling_cases import MAX_TOKENS, MIN_TOKENS, NUM_BASES, TOP_K, TOP_P, Base
from tests.model_paths import TARGET

RUNNER = "tests.e2e.sampling"
# Neither slow replies nor the rules of load are what is tested here, and the latter stop drafting for so full a batch of so small a
# model: repeatable drafting has none of them. Per request vLLM itself counts the draft tokens.
OURS: dict[str, Any] = {"speculative": {"deterministic": True}, "per_request_spec_decode_metrics": "summary"}
# Less than the longest prompts and than a full batch of full chunks: prompts are cut, and so are chunks.
ENGINE: dict[str, Any] = {
    "runner": RUNNER,
    "max_num_batched_tokens": 128,
    "max_logprobs": -1,
    # Without whitespace at will, so that JSON ends.
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
NGRAM = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
REFUSED: list[dict[str, Any]] = [
    {"min_p": 0.1},
    {"min_p": 0.1, "top_p": 0.9},
    {"logit_bias": {"5": 1.0}},
    {"logit_bias": {"5": 1.0}, "temperature": 0.0},
    {"trace_decode_token_ids": [5]},
]
LOGPROB_TOLERANCE = 1e-4

Answers = dict[str, Any]


@pytest.fixture(scope="module")
def bases(prompts: list[list[int]]) -> list[Base]:
    """Prompts with their greedy answers, by transformers: they say what to ask the engines for."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts[:NUM_BASES]:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=cases.EOS,
        )
        tokens = output[0, len(prompt) :].tolist()
        texts = [tokenizer.decode(tokens[:count]) for count in range(MAX_TOKENS + 1)]
        pieces = [texts[count + 1][len(texts[count]) :] for count in range(MAX_TOKENS)]
        found.append(Base(prompt, tokens, pieces))
    return found


@pytest.fixture(scope="module")
def plain(run_engine: RunEngine, bases: list[Base]) -> dict[str, Any]:
    """Plain vLLM's answers, and how vLLM's front end refuses things without speculative decoding and with ngram."""
    jobs = [
        {"requests": cases.deterministic(bases)},
        {"refused_by": None, "params": REFUSED},
        {"refused_by": NGRAM, "params": REFUSED},
    ]
    return run_engine(jobs, **ENGINE)


@pytest.fixture(scope="module")
def ours(run_engine: RunEngine, bases: list[Base]) -> dict[str, Any]:
    """All jobs of one engine with our method; the last ones come after refused requests."""
    jobs = [
        {"requests": cases.deterministic(bases)},
        {"refused_by": None, "params": REFUSED},
        {"refused": REFUSED, "prompt": bases[0].prompt},
        {"requests": cases.sampled_with_grammars(bases)},
        {"requests": cases.sampled(bases)},
    ]
    return run_engine(jobs, in_process=False, **OURS, **ENGINE)


@pytest.fixture(scope="module")
def with_grammars(ours: dict[str, Any]) -> Answers:
    answers: Answers = ours["jobs"][3]["answers"]
    return answers


@pytest.fixture(scope="module")
def sampled(ours: dict[str, Any]) -> Answers:
    answers: Answers = ours["jobs"][4]["answers"]
    return answers


# --- determined answers -----------------------------------------------------------------------------------------------


def differences(expected: Answers, found: Answers) -> dict[str, list[str]]:
    """Per request what differs from plain vLLM; empty if nothing does."""
    assert list(expected) == list(found)
    different = {}
    for name, one in expected.items():
        other = found[name]
        parts = [] if same_logprobs(one["prompt_logprobs"], other["prompt_logprobs"]) else ["prompt_logprobs"]
        for mine, theirs in zip(one["outputs"], other["outputs"], strict=True):
            exact = ("token_ids", "text", "finish_reason", "stop_reason")
            parts += [part for part in exact if mine[part] != theirs[part]]
            if not same_logprobs(mine["logprobs"], theirs["logprobs"]):
                parts.append("logprobs")
            if not close(mine["cumulative_logprob"], theirs["cumulative_logprob"], MAX_TOKENS):
                parts.append("cumulative_logprob")
        if parts:
            different[name] = parts
    return different


def close(one: float | None, other: float | None, count: int = 1) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or abs(one - other) <= count * LOGPROB_TOLERANCE


def same_logprobs(expected: list[Any] | None, found: list[Any] | None) -> bool:
    """The same candidates with the same values and ranks; which of the forbidden tokens fill the list up is a matter of luck."""
    if expected is None or found is None:
        return expected is found
    return len(expected) == len(found) and all(
        same_position(one, other) for one, other in zip(expected, found, strict=True)
    )


def same_position(expected: dict[str, Any] | None, found: dict[str, Any] | None) -> bool:
    if expected is None or found is None:
        return expected is found
    allowed = [{token: one for token, one in each.items() if one[0] > -math.inf} for each in (expected, found)]
    return set(allowed[0]) == set(allowed[1]) and all(
        close(one[0], allowed[1][token][0]) and one[1:] == allowed[1][token][1:] for token, one in allowed[0].items()
    )


def assert_drafted(answers: Answers, share: float) -> None:
    """Draft tokens of (that share of) the requests were verified.

    Not counted are the shortest, for which no draft comes in time, and those that the front end ended at a stop string: of them
    vLLM does not tell.
    """
    counts = {
        f"{name} {index}": one["num_draft_tokens"]
        for name, answer in answers.items()
        for index, one in enumerate(answer["outputs"])
        if len(one["token_ids"]) >= 8 and not (one["finish_reason"] == "stop" and isinstance(one["stop_reason"], str))
    }
    assert len(counts) > len(answers) / 2
    without = [name for name, count in counts.items() if not count]
    assert len(without) <= (1.0 - share) * len(counts), without


def assert_sound(counters: dict[str, float]) -> None:
    assert counters["num_accepted_tokens"] > 0
    assert counters["num_foreign_drafts"] == 0
    assert counters["num_unsound_distributions"] == 0
    assert counters["num_server_deaths"] == 0


def test_what_is_asked_for_makes_a_difference(plain: dict[str, Any], bases: list[Base]) -> None:
    """Otherwise the comparison with plain vLLM would say little."""
    answers = plain["jobs"][0]["answers"]
    tokens = {name: answer["outputs"][0]["token_ids"] for name, answer in answers.items()}
    for i in (0, 6, 9, 12):
        assert tokens[f"nothing {i}, greedy"] == bases[i].tokens
    groups = (cases.with_penalties, cases.with_masks, cases.with_ends, cases.with_grammars)
    masked = {name: case for group in groups for name, case in group(bases).items() if name != "without text"}
    for name, (base, _) in masked.items():
        assert tokens[f"{name}, greedy"] != base.tokens, name
    for name in tokens:
        if name.endswith(", greedy"):
            assert tokens[name.replace("greedy", "peaked")] == tokens[name], "a nucleus of one token is greedy"
    reasons = {(one["finish_reason"], one["stop_reason"]) for answer in answers.values() for one in answer["outputs"]}
    assert {reason for reason, _ in reasons} == {"stop", "length", "repetition"}
    two = answers["two stop strings, greedy"]["outputs"][0]
    assert two["stop_reason"] == bases[7].phrase(70), "the one that comes first in the text, not in the list"
    assert tokens["end of sequence, greedy"].index(cases.EOS) < len(tokens["end of sequence ignored, greedy"]) - 1
    early = [
        len(tokens[f"min_tokens {label} {early} before the stop token, greedy"]) for label in "AB" for early in range(9)
    ]
    assert early == [bases[6].new_token(24) + 1] * 9 + [bases[7].new_token(30) + 1] * 9


def test_determined_answers_are_plain_vllm_s_in_mixed_batches(plain: dict[str, Any], ours: dict[str, Any]) -> None:
    job = ours["jobs"][0]
    assert differences(plain["jobs"][0]["answers"], job["answers"]) == {}
    assert_drafted(job["answers"], 0.95)
    assert_sound(job["counters"])
    assert job["counters"]["num_sampled_outcomes"] > 0
    assert 0 < job["counters"]["num_sampled_draft_tokens"] < job["counters"]["num_draft_tokens"]


# --- random answers ---------------------------------------------------------------------------------------------------


def outputs(answers: Answers, prefix: str) -> list[dict[str, Any]]:
    found = [one for name, answer in answers.items() if name.startswith(prefix) for one in answer["outputs"]]
    assert found
    return found


def test_random_answers_were_speculated_with_their_distributions(ours: dict[str, Any], sampled: Answers) -> None:
    counters = ours["jobs"][4]["counters"]
    assert_drafted(sampled, 0.8)
    assert_sound(counters)
    assert counters["num_sampled_outcomes"] > 0
    assert counters["num_sampled_draft_tokens"] == counters["num_draft_tokens"], "no distribution was lost on its way"


def test_every_sampled_token_comes_with_its_finite_log_probability(sampled: Answers, bases: list[Base]) -> None:
    lists = {name: answer for name, answer in sampled.items() if answer["outputs"][0]["logprobs"] is not None}
    wanted = {name: one["params"].get("logprobs") for name, one in cases.sampled(bases).items()}
    assert set(lists) == {name for name, count in wanted.items() if count is not None}
    for name, answer in lists.items():
        (one,) = answer["outputs"]
        assert len(one["logprobs"]) == len(one["token_ids"])
        for token, candidates in zip(one["token_ids"], one["logprobs"], strict=True):
            assert math.isfinite(candidates[str(token)][0])
            assert wanted[name] <= len(candidates) <= wanted[name] + 1
        total = sum(each[str(token)][0] for token, each in zip(one["token_ids"], one["logprobs"], strict=True))
        assert one["cumulative_logprob"] == pytest.approx(total, abs=1e-3)
    assert len(sampled["hot"]["prompt_logprobs"]) == len(bases[5].prompt)


@pytest.mark.parametrize("prefix", ["top_k ", "top_k and top_p"])
def test_top_k(sampled: Answers, prefix: str) -> None:
    ranks = [each[str(token)][1] for one in outputs(sampled, prefix) for token, each in ranked(one)]
    assert max(ranks) <= TOP_K
    assert max(ranks) > 1, "something was sampled"


def test_top_p(sampled: Answers) -> None:
    masses = []
    for one in outputs(sampled, "top_p"):
        for token, candidates in ranked(one):
            rank = candidates[str(token)][1]
            masses.append(sum(math.exp(other[0]) for other in candidates.values() if other[1] < rank))
    assert max(masses) < TOP_P + LOGPROB_TOLERANCE
    assert max(masses) > 0.2, "not only the likeliest tokens"


def ranked(output: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return list(zip(output["token_ids"], output["logprobs"], strict=True))


def test_several_outputs_and_seeds_differ(sampled: Answers) -> None:
    for name in ("three outputs", "three outputs, seed"):
        texts = [one["text"] for one in sampled[name]["outputs"]]
        assert len(texts) == len(set(texts)) == 3
    assert sampled["seed 1"]["outputs"][0]["text"] != sampled["seed 2"]["outputs"][0]["text"]


def test_forbidden_tokens_are_absent(sampled: Answers, bases: list[Base]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    requests = cases.sampled(bases)
    (allowed,) = outputs(sampled, "allowed")
    assert set(allowed["token_ids"]) <= set(requests["allowed"]["params"]["allowed_token_ids"])
    (one,) = outputs(sampled, "bad words")
    written = " ".join(map(str, one["token_ids"]))
    for word in requests["bad words"]["params"]["bad_words"]:
        bare, spaced = (tokenizer.encode(spelled, add_special_tokens=False) for spelled in (word, f" {word}"))
        # vLLM forbids a word behind a space only if it takes as many tokens as without.
        for bad in [bare, spaced] if len(bare) == len(spaced) else [bare]:
            assert f" {' '.join(map(str, bad))} " not in f" {written} "


def test_answers_end_where_they_may(sampled: Answers, bases: list[Base]) -> None:
    requests = cases.sampled(bases)
    (late,) = outputs(sampled, "min_tokens")
    stop_ids = set(requests["min_tokens"]["params"]["stop_token_ids"])
    assert not stop_ids & set(late["token_ids"][:MIN_TOKENS])
    assert (late["finish_reason"], late["stop_reason"]) == ("stop", late["token_ids"][-1])
    (stopped,) = outputs(sampled, "stop")
    stops = requests["stop"]["params"]["stop"]
    assert stopped["stop_reason"] in stops
    assert not any(stop in stopped["text"] for stop in stops)
    for name, answer in sampled.items():
        for one in answer["outputs"]:
            if one["finish_reason"] == "length":
                assert len(one["token_ids"]) == requests[name]["params"]["max_tokens"]
    assert sampled["max_tokens"]["outputs"][0]["finish_reason"] == "length"


def test_structured_output_fits_and_is_verified_as_one_hot(
    ours: dict[str, Any], with_grammars: Answers, bases: list[Base]
) -> None:
    """A grammar cuts chunks at what was drawn, so their drafts carry no distribution (rule 2 of the design, section 3)."""
    assert {one["finish_reason"] for answer in with_grammars.values() for one in answer["outputs"]} == {"stop"}
    for one in outputs(with_grammars, "json schema"):
        parsed = json.loads(one["text"])
        assert list(parsed) == ["text", "size", "kind"]
        assert 12 <= len(parsed["text"]) <= 30 and 0 <= parsed["size"] <= 99 and parsed["kind"] in ("config", "weight")
    assert all(re.fullmatch(cases.REGEX, one["text"]) for one in outputs(with_grammars, "regex"))
    assert all(re.fullmatch(cases.GRAMMAR_AS_REGEX, one["text"]) for one in outputs(with_grammars, "grammar"))
    choices = cases.with_grammars(bases)["choice"][1]["structured_outputs"]["choice"]
    assert all(one["text"] in choices for one in outputs(with_grammars, "choice"))
    counters = ours["jobs"][3]["counters"]
    assert_sound(counters)
    assert counters["num_sampled_draft_tokens"] == counters["num_sampled_outcomes"] == 0
    for form in ("json schema", "regex", "choice", "grammar"):
        assert sum(one["num_draft_tokens"] for one in outputs(with_grammars, form)) > 0, form


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_vllm_refuses_with_speculative_decoding_is_refused_the_same_way(
    plain: dict[str, Any], ours: dict[str, Any]
) -> None:
    without, ngram = plain["jobs"][1:]
    assert without["refusals"][:-1] == [None] * (len(REFUSED) - 1), (
        "it is speculative decoding that they are refused with"
    )
    assert None not in ngram["refusals"] and ngram["custom_logits_processors"] is not None
    assert without["custom_logits_processors"] != ngram["custom_logits_processors"]
    assert ours["jobs"][1] == ngram
    assert ours["jobs"][2]["refusals"] == ngram["refusals"], "asked by a request of the running engine"


def test_the_engine_goes_on_after_refusals(ours: dict[str, Any]) -> None:
    status = ours["status"]
    assert ours["jobs"][4]["counters"]["num_rounds"] > 0
    assert status["is_up"]
    assert status["num_requests"] == 0, "every request was closed"
    assert status["num_blocks_held"] == 0


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random LoRA adapter for the target, strong enough to change what it says."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("adapter")
    shape = json.loads((Path(TARGET) / "config.json").read_text())
    outs = {"q_proj": shape["num_attention_heads"], "v_proj": shape["num_key_value_heads"]}
    rank, generator = 8, torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return 0.05 * torch.randn(*size, generator=generator)

    tensors = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, num_heads in outs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = random(rank, shape["hidden_size"])
            tensors[f"{prefix}.lora_B.weight"] = random(num_heads * shape["head_dim"], rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "target_modules": sorted(outs), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.long
def test_a_lora_adapter_on_the_target(run_engine: RunEngine, bases: list[Base], adapter: str) -> None:
    """Requests with and without it in the same batches; the draft model has no adapter, and need not."""
    # Two, though one is used: vLLM's CPU operators give a request without an adapter the one in the last slot.
    engine: dict[str, Any] = {
        "runner": RUNNER,
        "enable_lora": True,
        "max_loras": 2,
        "structured_outputs_config": {"backend": "guidance"},
    }
    jobs = [{"requests": cases.with_adapter(bases, adapter)}]
    expected = run_engine(jobs, **engine)["jobs"][0]["answers"]
    tokens = {name: answer["outputs"][0]["token_ids"] for name, answer in expected.items()}
    for i in (0, 3, 6, 9, 13):
        assert tokens[f"nothing {i}, greedy"] == bases[i].tokens
    changed = [name for name in tokens if "adapter" not in name and tokens[name] != tokens[f"{name}, adapter"]]
    assert len(changed) > len(tokens) / 4
    job = run_engine(jobs, **OURS, **engine)["jobs"][0]
    assert differences(expected, job["answers"]) == {}
    assert_drafted(job["answers"], 0.95)
    assert_sound(job["counters"])
