"""The Ray Serve example without a cluster: it imports, its settings are ours, and a request becomes what its engine makes of it."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve import Application

from examples.ray_serve import app
from vllm_specbranch.config import SpecBranchConfig

README = Path(__file__).resolve().parents[2] / "README.md"


class FakeEngine:
    """Continues every prompt with tokens 1, 2 and 3 in two steps."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, params, request_id))
        for text, token_ids in (("a", [1]), ("bc", [2, 3])):
            yield SimpleNamespace(outputs=[SimpleNamespace(text=text, token_ids=token_ids)])

    async def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        assert method == "specbranch_status"
        return [{"is_up": True}, {}]

    def shutdown(self) -> None:
        """Nothing runs."""


@pytest.fixture
def replica() -> Any:
    found = object.__new__(app.Generator.func_or_class)
    found._engine = FakeEngine()
    return found


async def body_of(response: Any) -> bytes:
    if hasattr(response, "body_iterator"):
        return b"".join([part.encode() async for part in response.body_iterator])
    return bytes(response.body)


def test_settings_become_an_engine_that_is_drafted_for() -> None:
    settings = app.Settings(target="T", draft="D", draft_placement="tcp://pool:5600", draft_keys="keys")
    arguments = app.Settings.model_validate(settings.model_dump() | {"engine": {"dtype": "float32"}}).engine_arguments()
    assert arguments["model"] == "T"
    assert arguments["dtype"] == "float32"
    config = SpecBranchConfig.from_user(arguments["speculative_config"])
    assert (config.model, config.draft_placement, config.draft_keys) == ("D", "tcp://pool:5600", "keys")
    child = app.Settings(target="T", draft="D", speculative={"policy": "pearl"}).engine_arguments()
    assert SpecBranchConfig.from_user(child["speculative_config"]).policy == "pearl"
    with pytest.raises(ValidationError, match="num_gpu"):
        app.Settings(target="T", draft="D", num_gpu=1)


def test_make_gives_serve_an_application() -> None:
    made = app.make(app.Settings(target="T", draft="D", num_replicas=2, num_cpus=1.5))
    assert isinstance(made, Application)
    deployment = made._bound_deployment
    assert deployment.num_replicas == 2
    assert deployment.ray_actor_options["num_cpus"] == 1.5


@pytest.mark.parametrize(("prompt", "given"), [("import", "import"), ([5, 6], {"prompt_token_ids": [5, 6]})])
def test_an_answer_at_once_and_streamed(replica: Any, prompt: Any, given: Any) -> None:
    whole = asyncio.run(body_of(asyncio.run(replica.generate(app.Wanted(prompt=prompt, max_tokens=3)))))
    assert json.loads(whole) == {"text": "abc", "token_ids": [1, 2, 3]}
    streamed = asyncio.run(body_of(asyncio.run(replica.generate(app.Wanted(prompt=prompt, stream=True)))))
    parts = [json.loads(line) for line in streamed.splitlines()]
    assert parts == [{"text": "a", "token_ids": [1]}, {"text": "bc", "token_ids": [2, 3]}]
    (first, params, name), (second, _, other) = replica._engine.asked
    assert first == second == given
    assert params.max_tokens == 3
    assert name != other


def test_how_drafting_goes_can_be_asked(replica: Any) -> None:
    assert asyncio.run(replica.drafting()) == {"is_up": True}


def test_it_says_where_it_has_not_run() -> None:
    assert "Untested on a cluster" in (app.__doc__ or "")
    (line,) = (line for line in README.read_text().splitlines() if "examples/ray_serve" in line)
    assert "untested on a cluster" in line
