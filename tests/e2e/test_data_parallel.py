"""Data parallelism: two engines behind one `vllm serve`, each with a draft server of its own.

Run by `make test-long`: two engines and two draft servers on two cores take their time.
"""

import asyncio
import os
from collections.abc import Callable, Iterator

import psutil
import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import last_core
from tests.e2e.serving import Server, serving, stream_completion

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

NUM_STREAMS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    cores = sorted(os.sched_getaffinity(0))
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    folder = tmp_path_factory.mktemp("data_parallel")
    with serving(folder, ["--data-parallel-size", "2"], last_core(), environment) as running:
        yield running


def draft_servers(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children(recursive=True)
    return [child for child in children if "vllm_specbranch.draft_main" in " ".join(child.cmdline())]


def test_each_engine_drafts_with_its_own_server_and_the_answers_are_plain_vllm_s(
    server: Server, prompts: list[list[int]], plain_answers: list[list[int]], assert_same: Callable[..., None]
) -> None:
    found = draft_servers(server)
    assert len(found) == 2
    assert len({one.ppid() for one in found}) == 2

    async def run(temperature: float) -> list[list[int]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=240.0) as client:
            tasks = [stream_completion(client, prompt, 32, temperature) for prompt in prompts[:NUM_STREAMS]]
            return [token_ids for token_ids, _ in await asyncio.gather(*tasks)]

    assert_same(asyncio.run(run(0.0)), [answer[:32] for answer in plain_answers[:NUM_STREAMS]])
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert len(accepted) == 2
    assert min(accepted) > 0, "both engines accept drafts"

    hits = server.metric("vllm:specbranch_hits_total")
    assert len(hits) == 2
    assert min(hits) > 0, "each engine has its own metrics"

    found[0].kill()
    answers = asyncio.run(run(1.0))
    assert [len(answer) for answer in answers] == [32] * NUM_STREAMS, "one engine's draft server died, nothing is lost"
    assert found[1].is_running(), "the other engine's lives on"
    assert sorted(server.metric("vllm:specbranch_draft_server_deaths_total")) == [0, 1]
