"""Tests of the two frontend hooks: what reaches us, and that all else reaches vLLM unchanged."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_specbranch import patching
from vllm_specbranch.patches import arg_utils

VERSION = "0.32.0"


@pytest.fixture(scope="module", autouse=True)
def hooks() -> Iterator[None]:
    there = [patch for patch in arg_utils.PATCHES if patching.is_applied(patch)]
    patching.apply(arg_utils.PATCHES, VERSION)
    yield
    patching.revert([patch for patch in arg_utils.PATCHES if patch not in there])


@pytest.fixture(scope="module")
def parser() -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["--speculative-config", "specbranch"], {"method": "specbranch"}),
        (["-sc", "specbranch"], {"method": "specbranch"}),
        (["--speculative-config=specbranch"], {"method": "specbranch"}),
        (["--speculative-config", '{"method": "specbranch", "model": "d"}'], {"method": "specbranch", "model": "d"}),
        (["--speculative-config", '{"method": "ngram"}'], {"method": "ngram"}),
        (
            ["--speculative-config.method", "specbranch", "--speculative-config.model", "d"],
            {"method": "specbranch", "model": "d"},
        ),
        (["--speculative-config", "None"], None),
        ([], None),
    ],
)
def test_what_is_typed(parser: Any, typed: list[str], expected: object) -> None:
    assert parser.parse_args(typed).speculative_config == expected


@pytest.mark.parametrize("word", ["specbranchs", "Specbranch", "ngram", "{"])
def test_other_words_stay_vllm_s_errors(parser: Any, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser.parse_args(["--speculative-config", word])
    assert "--speculative-config" in capsys.readouterr().err


def test_spec_method_allows_ours_beside_vllm_s(parser: Any) -> None:
    assert parser.parse_args(["--spec-method", "specbranch"]).spec_method == "specbranch"
    assert parser.parse_args(["--spec-method", "ngram"]).spec_method == "ngram"
    with pytest.raises(SystemExit):
        parser.parse_args(["--spec-method", "specbranchs"])


def engine_args(**given: object) -> SimpleNamespace:
    unset = {"speculative_config": None, "spec_method": None, "spec_model": None, "spec_tokens": None}
    return SimpleNamespace(**(unset | given))


@pytest.mark.parametrize(
    "given",
    [
        {"speculative_config": {"method": "specbranch", "model": "d"}},
        {"speculative_config": {"model": "d"}, "spec_method": "specbranch"},
        {"speculative_config": "specbranch"},
        {"spec_method": "specbranch"},
        {"speculative_config": {"method": "ngram"}, "spec_method": "specbranch"},
    ],
)
def test_our_method_reaches_our_builder(given: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr("vllm_specbranch.speculative_config.build_speculative_config", lambda *args: seen.append(args))
    args = engine_args(**given)
    EngineArgs.create_speculative_config(args, target_model_config="m", target_parallel_config="p")
    assert seen == [(args, "m", "p")]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"speculative_config": {}},
        {"speculative_config": {"method": "ngram"}},
        {"speculative_config": {"model": "specbranch"}},
        {"spec_method": "ngram"},
    ],
)
def test_other_methods_reach_vllm_with_nothing_changed(given: dict[str, object]) -> None:
    seen: list[tuple[object, ...]] = []
    hook = arg_utils.PATCHES[1].make(lambda *args: seen.append(args))
    args = engine_args(**given)
    before = dict(vars(args))
    hook(args, target_model_config="m", target_parallel_config="p")
    assert seen == [(args, "m", "p")]
    assert vars(args) == before


def test_other_methods_really_work() -> None:
    from vllm.engine.arg_utils import EngineArgs

    assert EngineArgs.create_speculative_config(engine_args(), "m", "p") is None
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    config = EngineArgs.create_speculative_config(engine_args(speculative_config=ngram), None, None)
    assert type(config).__name__ == "SpeculativeConfig"
    assert (config.method, config.num_speculative_tokens) == ("ngram", 3)
