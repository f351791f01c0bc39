"""A Ray Serve application: replicas of a vLLM engine that is drafted for, behind `POST /generate`, whole or streamed.

    cd examples/ray_serve
    serve run app:make target=TARGET draft=DRAFT num_gpus=2
    curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "import os", "max_tokens": 32, "stream": true}'

Every replica has an engine of its own. Its draft server is a child of the engine, on a device that Ray gives to the replica
(`draft_placement=process`; count it in `num_gpus`), or one of a pool that all replicas share (`draft_placement=tcp://HOST:PORT`
with `draft_keys=DIR`, where `DIR` is there on every node). A replica is healthy while its engine is; without drafts it answers all
the same.

Needs `ray[serve]`. Untested on a cluster. `tests/e2e/test_ray_serve.py` runs it on one machine without GPUs (`make test-long`).
"""

import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from ray import serve

api = FastAPI()


class Settings(BaseModel, extra="forbid"):
    """What the application is given, as `key=value` or in the `args` of a Serve configuration.

    Attributes:
        num_cpus, num_gpus: of a replica, its draft server included where that is a child of the engine.
        speculative: further keys of `speculative_config`.
        engine: further arguments of vLLM's engine.
    """

    target: str
    draft: str
    num_speculative_tokens: int = 8
    draft_placement: str = "process"
    draft_keys: str | None = None
    num_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    speculative: dict[str, Any] = {}
    engine: dict[str, Any] = {}

    def engine_arguments(self) -> dict[str, Any]:
        """The arguments of vLLM's engine."""
        speculative: dict[str, Any] = {
            "method": "specbranch",
            "model": self.draft,
            "num_speculative_tokens": self.num_speculative_tokens,
            "draft_placement": self.draft_placement,
        }
        if self.draft_keys is not None:
            speculative["draft_keys"] = self.draft_keys
        return {"model": self.target, "speculative_config": speculative | self.speculative} | self.engine


class Wanted(BaseModel, extra="forbid"):
    """A request; the prompt is a text or token ids."""

    prompt: str | list[int]
    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0)
    ignore_eos: bool = False
    stream: bool = False


class Part(BaseModel):
    """What came out in one engine step, or in all of them."""

    text: str = ""
    token_ids: list[int] = []


@serve.deployment
@serve.ingress(api)
class Generator:
    """One replica: one engine."""

    def __init__(self, settings: Settings) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings.engine_arguments()))

    @api.post("/generate")
    async def generate(self, wanted: Wanted) -> Response:
        """Answer: one JSON object, or a line of JSON for every engine step."""
        parts = self._parts(wanted)
        if wanted.stream:
            lines = (part.model_dump_json() + "\n" async for part in parts)
            return StreamingResponse(lines, media_type="application/x-ndjson")
        whole = Part()
        async for part in parts:
            whole = Part(text=whole.text + part.text, token_ids=whole.token_ids + part.token_ids)
        return JSONResponse(whole.model_dump())

    @api.get("/drafting")
    async def drafting(self) -> dict[str, Any]:
        """How one replica's drafting goes: the counters of both sides."""
        status, *_ = await self._engine.collective_rpc("specbranch_status")
        return dict(status)

    async def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose engine is dead."""
        await self._engine.check_health()

    def __del__(self) -> None:
        self._engine.shutdown()

    async def _parts(self, wanted: Wanted) -> AsyncIterator[Part]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            ignore_eos=wanted.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt: Any = wanted.prompt if isinstance(wanted.prompt, str) else {"prompt_token_ids": wanted.prompt}
        # Closed with its stream, so that a client that goes away ends its request.
        async for output in self._engine.generate(prompt, params, uuid.uuid4().hex):
            (completion,) = output.outputs
            yield Part(text=completion.text, token_ids=list(completion.token_ids))


def make(settings: Settings) -> serve.Application:
    """The application, for `serve run` and for a Serve configuration (`import_path: app:make`)."""
    options = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    deployment = Generator.options(num_replicas=settings.num_replicas, ray_actor_options=options)
    return deployment.bind(settings)
