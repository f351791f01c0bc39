"""Requests with every sampling parameter, made to fit what the shipped target says to some held-out prompts.

Stop strings, bad words and the like only mean something where the model would say them, so each case is made from the greedy answer
to its prompt (`Base`). Pure data: no engine, no vLLM.
"""

import re
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 48
NUM_BASES = 15
EOS = 1
GREEDY = {"temperature": 0.0}
# A temperature that takes vLLM's path for sampled requests, with a nucleus of one token: as deterministic as greedy.
PEAKED = {"temperature": 0.8, "top_p": 1e-6}
HOT = {"temperature": 1.0}

TOP_K, TOP_P, MIN_TOKENS = 5, 0.7, 20
WORD = re.compile(r"[A-Za-z]{4,}")
JSON_SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "minLength": 12, "maxLength": 30},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["config", "weight"]},
    },
    "required": ["text", "size", "kind"],
    "additionalProperties": False,
}
REGEX = r"[A-Za-z ,]{20,60}\."
GRAMMAR = 'root ::= line line\nline ::= [a-zA-Z0-9_ .,:=()#"]{4,40} "\\n"'
GRAMMAR_AS_REGEX = r'([a-zA-Z0-9_ .,:=()#"]{4,40}\n){2}'

Case = tuple["Base", dict[str, Any]]
Request = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """A prompt and the target's greedy answer to it.

    Attributes:
        prompt: `[num_prompt_tokens]` token ids.
        tokens: `[MAX_TOKENS]` token ids of the answer, which ignores the end of the sequence.
        pieces: `[MAX_TOKENS]` the text that each of them adds.
    """

    prompt: list[int]
    tokens: list[int]
    pieces: list[str]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def new_token(self, least: int) -> int:
        """Index of the first token, at or after `least`, that did not come before."""
        return next(i for i in range(least, len(self.tokens)) if self.tokens[i] not in self.tokens[:i])

    def phrase(self, least: int) -> str:
        """Seven characters from the `least`th on or later that did not come before: within, across or beyond tokens."""
        starts = range(least, len(self.text) - 7)
        return next(self.text[i : i + 7] for i in starts if self.text.find(self.text[i : i + 7]) == i)


def request(base: Base, params: dict[str, Any], adapter: str | None = None) -> Request:
    return {"prompt": base.prompt, "params": {"max_tokens": MAX_TOKENS} | params, "lora": adapter}


def deterministic(bases: list[Base]) -> dict[str, Request]:
    """Every case whose answer is determined, once greedy and once on the path of sampled requests."""
    cases: dict[str, Case] = {f"nothing {i}": (bases[i], {}) for i in (0, 6, 9, 12)}
    cases |= with_penalties(bases) | with_masks(bases) | with_ends(bases) | with_logprobs(bases) | with_grammars(bases)
    cases |= with_min_tokens("A", bases[6], 24) | with_min_tokens("B", bases[7], 30)
    ways = {"greedy": GREEDY, "peaked": PEAKED}
    requests = {f"{name}, {way}": request(*with_more(case, ways[way])) for name, case in cases.items() for way in ways}
    top_1 = {"temperature": 1.5, "top_k": 1}
    return requests | {
        "three outputs, peaked": request(bases[1], PEAKED | {"n": 3}),
        "top_k 1": request(bases[3], top_1),
        "top_k 1 and penalty": request(bases[8], top_1 | {"repetition_penalty": 1.3, "logprobs": 1}),
    }


def with_more(case: Case, params: dict[str, Any]) -> Case:
    return case[0], case[1] | params


def with_penalties(bases: list[Base]) -> dict[str, Case]:
    """Requests whose every token depends on all tokens before it, drafts under verification included."""
    # A small one turns a repetition over in the middle of a chunk, where the draft model does not expect it.
    small: dict[str, Case] = {
        f"small frequency penalty {i}": (bases[i], {"frequency_penalty": 0.2}) for i in (2, 11, 12, 14)
    }
    mixed = {"repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logprobs": 2}
    return small | {
        "repetition penalty": (bases[8], {"repetition_penalty": 1.3}),
        "repetition penalty below one": (bases[10], {"repetition_penalty": 0.8}),
        "presence penalty": (bases[9], {"presence_penalty": 1.5}),
        "frequency penalty": (bases[12], {"frequency_penalty": 0.7}),
        "negative frequency penalty": (bases[1], {"frequency_penalty": -0.5}),
        "all penalties": (bases[14], mixed),
    }


def with_masks(bases: list[Base]) -> dict[str, Case]:
    """Requests to which some tokens are forbidden, always or after certain others."""
    without_one = sorted(set(bases[5].tokens) - {bases[5].tokens[20]} | set(range(20, 40)))
    # Each of the few allowed tokens gets dearer by its use, so the end of the sequence comes at some time.
    ending = {"allowed_token_ids": [EOS, *bases[10].tokens[:6]], "frequency_penalty": 1.9}
    two_words = WORD.findall(bases[7].text)[3:5]
    # Of well-known text the draft model proposes long chunks, with both words of a phrase in one.
    phrases: dict[str, Case] = {
        f"bad phrase {phrase!r} {i}": (bases[i], {"bad_words": [phrase]})
        for i, phrase in ((6, "or agreed"), (6, "on an"), (7, "on an"), (7, "This file"))
    }
    return phrases | {
        "bad word": (bases[6], {"bad_words": [","]}),
        "bad words and penalty": (bases[7], {"bad_words": two_words, "frequency_penalty": 0.2}),
        "bad phrases": (bases[13], {"bad_words": ["please apply", "any change"]}),
        "allowed token ids": (bases[5], {"allowed_token_ids": without_one}),
        "allowed token ids and penalty": (
            bases[4],
            {"allowed_token_ids": sorted(set(bases[4].tokens)), "presence_penalty": 0.5},
        ),
        "end of sequence": (bases[10], ending),
        "end of sequence ignored": (bases[10], ending | {"ignore_eos": True}),
        "end of sequence after min_tokens": (bases[10], ending | {"min_tokens": 40}),
    }


def with_ends(bases: list[Base]) -> dict[str, Case]:
    """Requests that end in all ways there are."""
    later, sooner = bases[7].phrase(80), bases[7].phrase(70)
    looping = {"repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 4}}
    lengths: dict[str, Case] = {f"max_tokens {count}": (bases[count], {"max_tokens": count}) for count in (1, 2, 3, 7)}
    return lengths | {
        "stop token id": (bases[6], {"stop_token_ids": [bases[6].tokens[bases[6].new_token(20)]]}),
        "stop string": (bases[6], {"stop": [bases[6].phrase(60)]}),
        "stop string, kept": (bases[7], {"stop": bases[7].phrase(50), "include_stop_str_in_output": True}),
        "two stop strings": (bases[7], {"stop": [later, sooner], "logprobs": 1}),
        "stop string after min_tokens": (bases[13], {"stop": ["the", "is"], "min_tokens": MIN_TOKENS}),
        "repetition detection": (bases[12], looping),
        "without text": (bases[2], {"detokenize": False}),
    }


def with_min_tokens(label: str, base: Base, least: int) -> dict[str, Case]:
    """A stop token at an index from which it is allowed, from which it has been for up to eight tokens, or is not yet."""
    index = base.new_token(least)
    stop = [base.tokens[index]]
    return {
        f"min_tokens {label} {early} before the stop token": (
            base,
            {"stop_token_ids": stop, "min_tokens": index - early},
        )
        for early in range(-1, 9)
    }


def with_logprobs(bases: list[Base]) -> dict[str, Case]:
    """Requests that ask for log probabilities."""
    return {
        "logprobs": (bases[3], {"logprobs": 5}),
        "logprob of the token only": (bases[11], {"logprobs": 0}),
        "all logprobs": (bases[6], {"logprobs": -1, "max_tokens": 8}),
        "prompt logprobs": (bases[9], {"prompt_logprobs": 2}),
        "prompt logprobs of a long prompt": (bases[4], {"prompt_logprobs": 1}),
        "logprobs of both": (bases[5], {"prompt_logprobs": 0, "logprobs": 3, "repetition_penalty": 1.2}),
        "logprobs up to a stop string": (bases[13], {"logprobs": 2, "stop": [bases[13].phrase(50)]}),
    }


def with_grammars(bases: list[Base]) -> dict[str, Case]:
    """Requests with structured output in each form that vLLM takes; the draft knows the text, not the grammar."""
    choices = [bases[13].text[:60], bases[6].text[:60]]
    return {
        "json schema": (bases[13], {"structured_outputs": {"json": JSON_SCHEMA}}),
        "regex": (bases[13], {"structured_outputs": {"regex": REGEX}, "logprobs": 2}),
        "choice": (bases[13], {"structured_outputs": {"choice": choices}}),
        "choice and penalty": (bases[6], {"structured_outputs": {"choice": choices}, "repetition_penalty": 1.5}),
        "grammar": (bases[0], {"structured_outputs": {"grammar": GRAMMAR}}),
        "regex, min_tokens and stop": (
            bases[6],
            {"structured_outputs": {"regex": "[\\x20-\\x7e\\n]{20,60}"}, "min_tokens": 12, "stop": ["requ"]},
        ),
    }


def with_adapter(bases: list[Base], adapter: str) -> dict[str, Request]:
    """The same requests with a LoRA adapter on the target, and without."""
    # The seed is here because in the other plain engine, with its small budget, it would meet a bug of vLLM's CPU runner.
    penalty: dict[str, Any] = {"repetition_penalty": 1.2, "logprobs": 2, "seed": 7}
    cases: dict[str, Case] = {f"nothing {i}": (bases[i], {}) for i in (0, 3, 6, 9, 13)}
    cases |= {"penalty": (bases[8], penalty), "regex": (bases[13], {"structured_outputs": {"regex": REGEX}})}
    requests = {}
    for name, case in cases.items():
        for way, params in (("greedy", GREEDY), ("peaked", PEAKED)):
            requests[f"{name}, {way}"] = request(*with_more(case, params))
            requests[f"{name}, {way}, adapter"] = request(*with_more(case, params), adapter)
    return requests


def sampled(bases: list[Base]) -> dict[str, Request]:
    """Requests with real randomness; the names are what the tests look for."""
    base = bases[10]
    allowed = sorted({token for one in bases for token in one.tokens})
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    both = {"temperature": 1.5, "top_k": TOP_K, "top_p": 0.9, "logprobs": TOP_K}
    requests = {
        "cold": request(bases[4], {"temperature": 0.5, "logprobs": 1}),
        "hot": request(bases[5], {"temperature": 1.5, "logprobs": 0, "prompt_logprobs": 1}),
        "penalties": request(bases[9], HOT | penalties | {"logprobs": 2}),
        "three outputs": request(base, HOT | {"n": 3}),
        "three outputs, seed": request(base, HOT | {"n": 3, "seed": 11}),
        "seed 1": request(base, HOT | {"seed": 1}),
        "seed 2": request(base, HOT | {"seed": 2}),
        "allowed": request(bases[2], HOT | {"allowed_token_ids": allowed}),
        "bad words": request(bases[6], HOT | {"bad_words": ["WITHOUT", "the", "or", "applicable law"]}),
        "min_tokens": request(bases[6], HOT | {"stop_token_ids": allowed, "min_tokens": MIN_TOKENS}),
        "stop": request(bases[9], HOT | {"stop": [".", "("], "max_tokens": 100}),
        "max_tokens": request(bases[0], HOT | {"max_tokens": 31, "ignore_eos": True}),
    }
    for i in (0, 7, 9):
        requests[f"top_k {i}"] = request(bases[i], HOT | {"top_k": TOP_K, "logprobs": TOP_K})
        requests[f"top_k and top_p {i}"] = request(bases[i], both)
        requests[f"top_p {i}"] = request(bases[i], HOT | {"top_p": TOP_P, "logprobs": 20})
    return requests


def sampled_with_grammars(bases: list[Base]) -> dict[str, Request]:
    """Structured output at temperature 1: long enough to end, and each form several times."""
    cases = with_grammars(bases)
    forms = {name: cases[name][1]["structured_outputs"] for name in ("json schema", "regex", "choice", "grammar")}
    return {
        f"{name} {i}": request(bases[i], HOT | {"structured_outputs": form, "max_tokens": 200})
        for name, form in forms.items()
        for i in (0, 4, 6, 9, 13)
    }
