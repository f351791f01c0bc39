"""The command line of `bench_decode`: its words, what each may be, and one clear line for a word that it may not be.

Owns parsing only. Runs in the process of the benchmark.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from benchmarks.decode_conditions import SHIPPED_SETS, parse_emulation
from benchmarks.decode_rows import DEFAULT_GROUPS, GROUPS, POLICIES
from vllm_specbranch import setting_values
from vllm_specbranch.demo import EXTRA_LAYERS, MLP_SIZE
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.shipped_pair import draft_path, target_path
from vllm_specbranch.weaken import WEAK_NOISE

_SETTINGS = 'JSON by policy, such as {"specbranch": {"stop_threshold": 0.1}}'
_T = TypeVar("_T")
_EMULATE = "TARGET_MS:DRAFT_MS[:ROW_COST]"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


class _Refused(Exception):
    """Carries a ConfigError through argparse, which would put words of its own in the place of a ValueError."""

    def __init__(self, reason: ConfigError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _told(convert: Callable[[str], _T]) -> Callable[[str], _T]:
    """The same conversion, its ConfigErrors carried."""

    def told(text: str) -> _T:
        try:
            return convert(text)
        except ConfigError as error:
            raise _Refused(error) from error

    return told


def parse_words(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: a value that cannot be used; the message names value, allowed values and option.
        SystemExit: an unknown or missing option, which has been said.
    """
    try:
        return _parser().parse_args(argv)
    except _Refused as refused:
        raise refused.reason from refused


def _whole(option: str, least: int) -> Callable[[str], int]:
    @_told
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise ConfigError(text, f"a whole number of at least {least}", option) from error
        if value < least:
            raise ConfigError(value, f"a whole number of at least {least}", option)
        return value

    return parse


def _wholes(option: str, least: int) -> Callable[[str], list[int]]:
    """Several, each once, in the order given."""
    whole = _whole(option, least)

    @_told
    def parse(text: str) -> list[int]:
        return list(dict.fromkeys(map(whole, text.split(","))))

    return parse


def _share(option: str) -> Callable[[str], float]:
    @_told
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigError(text, "a number of at least 0", option) from error
        if not 0 <= value < 100:
            raise ConfigError(value, "a number of at least 0", option)
        return value

    return parse


@_told
def _groups(text: str) -> list[str]:
    given = [part.strip() for part in text.split(",")]
    for one in given:
        if one not in (*GROUPS, "all"):
            raise ConfigError(one, ", ".join(GROUPS) + ", or all; several with commas between them", "--rows")
    return [one for one in GROUPS if one in given or "all" in given]


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _cores(option: str) -> Callable[[str], tuple[int, ...]]:
    return _told(lambda text: setting_values.cores(text, option))


@_told
def _settings(text: str) -> dict[str, dict[str, Any]]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ConfigError(text, f"{_SETTINGS} ({error})", "--settings") from error
    if not isinstance(parsed, dict) or not all(isinstance(one, dict) for one in parsed.values()):
        raise ConfigError(text, _SETTINGS, "--settings")
    for policy in parsed:
        if policy not in POLICIES:
            raise ConfigError(policy, "a policy: " + ", ".join(POLICIES), "--settings")
    return parsed


def _parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="bench_decode",
        description="Decoding speed of plain vLLM, its own methods, and this project's policies, all in one run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--out", type=Path, required=True, help="file for the JSON")
    _add_models(made)
    _add_rows(made)
    _add_conditions(made)
    _add_engine(made)
    return made


def _add_models(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("models").add_argument
    add("--target", type=Path, default=target_path(), help="folder of the target model")
    add("--draft", type=Path, default=draft_path(), help="folder of the draft model")
    add(
        "--target-layers",
        type=_whole("--target-layers", 0),
        default=EXTRA_LAYERS,
        help="layers to add to the target (same function, more cost)",
    )
    add(
        "--target-mlp",
        type=_whole("--target-mlp", 0),
        default=MLP_SIZE,
        help="MLP neurons of the target; 0 leaves them as they are",
    )
    add("--draft-layers", type=_whole("--draft-layers", 0), default=0, help="layers to add to the draft")
    add("--draft-mlp", type=_whole("--draft-mlp", 0), default=0, help="MLP neurons of the draft; 0: as they are")
    add(
        "--draft-noise",
        type=_share("--draft-noise"),
        default=0.0,
        help=f"weaken the draft by so much noise; {WEAK_NOISE} makes the shipped pair a poorly aligned one",
    )


def _add_rows(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("rows: what is compared").add_argument
    add(
        "--rows",
        type=_groups,
        default=list(DEFAULT_GROUPS),
        help="groups of engines: "
        + ", ".join(GROUPS)
        + ", or all; wide: plain and draft_model on target's and draft's cores",
    )
    add(
        "--gammas",
        type=_wholes("--gammas", 1),
        default=[2, 4, 8],
        help="draft tokens of draft_model, one engine each",
    )
    add(
        "--num-speculative-tokens",
        type=_whole("--num-speculative-tokens", 1),
        default=8,
        help="draft tokens of ngram and of our policies",
    )
    add("--settings", type=_settings, default={}, help="more keys of speculative_config, " + _SETTINGS)


def _add_conditions(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("conditions: each has a table of its own").add_argument
    add(
        "--prompts",
        type=_names,
        default=["python_holdout"],
        help="prompt sets, with commas between them: " + ", ".join(SHIPPED_SETS) + ", or files",
    )
    add(
        "--batch-sizes",
        type=_wholes("--batch-sizes", 1),
        default=[1],
        help="requests at the same time, with commas between them",
    )
    add(
        "--emulate",
        type=_told(lambda text: parse_emulation(text, "--emulate")),
        action="append",
        metavar=_EMULATE,
        help="stretch the forwards of both models to such durations; again for more, none for the real devices",
    )
    add(
        "--num-prompts",
        type=_whole("--num-prompts", 1),
        default=8,
        help="of each set, and at least the batch size",
    )
    add(
        "--prompt-tokens",
        type=_whole("--prompt-tokens", 1),
        default=128,
        help="the first so many of each prompt",
    )
    add("--max-tokens", type=_whole("--max-tokens", 2), default=96, help="new tokens per prompt")
    add("--repetitions", type=_whole("--repetitions", 1), default=5, help="of every row, after the warm-up")


def _add_engine(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("engines").add_argument
    add("--target-cores", type=_cores("--target-cores"), help="the first core if not given")
    add("--draft-cores", type=_cores("--draft-cores"), help="the next core if not given")
    add("--dtype", default="float32", help="of both models")
    add(
        "--max-model-len",
        type=_whole("--max-model-len", 16),
        default=512,
        help="longest prompt and output together",
    )
    add(
        "--kv-cache-mib",
        type=_whole("--kv-cache-mib", 0),
        default=0,
        help="of each target; 0 for what the largest batch takes",
    )
    add(
        "--seed",
        type=_whole("--seed", 0),
        default=0,
        help="of the engines, of the order of rows, of the intervals",
    )
    add("--enforce-eager", action="store_true", help="do not compile the models")
