"""The Ray Serve example for real, on a Ray of this machine: answers over HTTP are plain vLLM's, and drafts are accepted."""

import json
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from ray import serve

from examples.ray_serve import app
from tests.e2e.conftest import BLOCK_SIZE, MAX_MODEL_LEN, last_core
from tests.e2e.serving import free_port
from tests.model_paths import DRAFT, REPOSITORY, TARGET

pytestmark = pytest.mark.long

NUM_PROMPTS = 8


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 16, "block_size": BLOCK_SIZE}
    settings = app.Settings(
        target=TARGET,
        draft=DRAFT,
        speculative={"draft_cpu_cores": last_core(), "reply_timeout_ms": 1000},
        engine=engine | {"enforce_eager": True, "seed": 0},
    )
    port = free_port()
    # The application is imported by the replica, too.
    environment = {"env_vars": {"PYTHONPATH": str(REPOSITORY)}}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, runtime_env=environment)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(app.make(settings))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def ask(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return str(reply.read().decode())


def test_answers_are_plain_vllm_s(
    url: str, prompts: list[list[int]], num_new_tokens: int, assert_same: Callable[..., None]
) -> None:
    def answer(prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "max_tokens": num_new_tokens, "ignore_eos": True, "stream": True}
        parts = [json.loads(line) for line in ask(f"{url}/generate", body).splitlines()]
        assert len(parts) > 5, "really streamed"
        return [token for part in parts for token in part["token_ids"]]

    with ThreadPoolExecutor(NUM_PROMPTS) as pool:
        assert_same(list(pool.map(answer, prompts[:NUM_PROMPTS])))
    drafting = json.loads(ask(f"{url}/drafting"))
    assert drafting["is_up"]
    assert drafting["engine"]["num_accepted_tokens"] > 0
