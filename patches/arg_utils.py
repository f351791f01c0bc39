"""Hooks into vLLM's engine arguments: the bare word `specbranch`, and our speculative config.

Every vLLM process gets them: both pass everything through that is not ours. They create no
process, socket, folder or random name, because API server processes run them too.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from typing import Any

from vllm_specbranch.config import METHOD
from vllm_specbranch.patching import Patch


def _accept_bare_word(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = original(parser)
        actions = parser._option_string_actions
        config = actions["--speculative-config"]
        config.type = _or_bare_word(config.type)
        method = actions["--spec-method"]
        method.choices = [*(method.choices or ()), METHOD]
        return parser

    return add_cli_args


def _or_bare_word(upstream: Any) -> Callable[[str], Any]:
    @functools.wraps(upstream)
    def parse(text: str) -> Any:
        return {"method": METHOD} if text == METHOD else upstream(text)

    return parse


def _build_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        if not _chooses_us(self):
            return original(self, target_model_config, target_parallel_config)
        from vllm_specbranch.speculative_config import build_speculative_config

        return build_speculative_config(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _chooses_us(engine_args: Any) -> bool:
    given = engine_args.speculative_config
    if isinstance(given, Mapping):
        given = given.get("method")
    return METHOD in (given, engine_args.spec_method)


PATCHES = (
    Patch(
        symbol="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        kind="wrap",
        process="frontend",
        why="`--speculative-config specbranch` is no JSON, and `--spec-method` allows vLLM's own methods only.",
        remove_when="vLLM lets a plugin register a speculative method.",
        fingerprints={"0.32.0": "a4378d5d3c331416d9b8b6f9aaddc0cea1552bdd23bf36c8a42297e0682d4a10"},
        make=_accept_bare_word,
    ),
    Patch(
        symbol="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        kind="wrap",
        process="frontend",
        why="`SpeculativeConfig` forbids unknown methods and fields; ours is a subclass that carries our settings.",
        remove_when="vLLM lets a plugin register a speculative method.",
        fingerprints={"0.32.0": "f64805340e5ddc727a94f7dd0b6fe1ec7c7508c7aa19de3650f54513bd622968"},
        make=_build_ours,
    ),
)
