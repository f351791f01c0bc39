"""Data parallelism: two engines behind one `vllm serve`, each with a draft server of its own, or both on one that is shared.

Run by `make test-long`: two engines and their draft servers on two cores take their time.
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from openai import AsyncOpenAI

from tests.e2e.conftest import last_core
from tests.e2e.serving import Server, serving, stream_completion
from tests.e2e.standalone_server import StandaloneServer

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

NUM_STREAMS = 16


TWO_ENGINES = ("--data-parallel-size", "2")


def both_cores() -> dict[str, str]:
    """One for each engine."""
    cores = sorted(os.sched_getaffinity(0))
    return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Each engine has a draft server of its own."""
    with serving(tmp_path, TWO_ENGINES, last_core(), both_cores()) as running:
        yield running


@pytest.fixture
def draft_server(tmp_path: Path) -> Iterator[StandaloneServer]:
    found = StandaloneServer(tmp_path)
    try:
        found.wait_until_ready()
        yield found
    finally:
        found.end()


async def run(server: Server, prompts: list[list[int]], temperature: float) -> list[list[int]]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=240.0) as client:
        tasks = [stream_completion(client, prompt, 32, temperature) for prompt in prompts[:NUM_STREAMS]]
        return [token_ids for token_ids, _ in await asyncio.gather(*tasks)]


def draft_servers(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children(recursive=True)
    return [child for child in children if "vllm_specbranch.draft_main" in " ".join(child.cmdline())]


def generate_until_both_draft(server: Server, generate: Callable[[], None]) -> None:
    """Generate until both engines have more hits and accepted draft tokens than so far: at first a busy machine's come too late."""

    def counts() -> list[float]:
        names = ("vllm:spec_decode_num_accepted_tokens_total", "vllm:specbranch_hits_total")
        return [value for name in names for value in server.metric(name)]

    before = counts()
    assert len(before) == 4, "each engine has its own metrics"
    until = time.monotonic() + 60.0
    while not all(now > then for now, then in zip(counts(), before, strict=True)):
        assert time.monotonic() < until, (before, counts())
        generate()
    assert server.metric("vllm:specbranch_foreign_drafts_total") == [0.0, 0.0], (
        "what is verified is what was handed over"
    )


def test_each_engine_drafts_with_its_own_server_and_the_answers_are_plain_vllm_s(
    server: Server, prompts: list[list[int]], plain_answers: list[list[int]], assert_same: Callable[..., None]
) -> None:
    found = draft_servers(server)
    assert len(found) == 2
    assert len({one.ppid() for one in found}) == 2

    expected = [answer[:32] for answer in plain_answers[:NUM_STREAMS]]
    generate_until_both_draft(server, lambda: assert_same(asyncio.run(run(server, prompts, 0.0)), expected))

    found[0].kill()
    answers = asyncio.run(run(server, prompts, 1.0))
    assert [len(answer) for answer in answers] == [32] * NUM_STREAMS, "one engine's draft server died, nothing is lost"
    assert found[1].is_running(), "the other engine's lives on"
    assert sorted(server.metric("vllm:specbranch_draft_server_deaths_total")) == [0, 1]


def test_both_engines_draft_with_one_server_that_is_killed_and_comes_back(
    draft_server: StandaloneServer,
    tmp_path: Path,
    prompts: list[list[int]],
    plain_answers: list[list[int]],
    assert_same: Callable[..., None],
) -> None:
    """Two engines of one name, one seed and one key."""
    expected = [answer[:32] for answer in plain_answers[:NUM_STREAMS]]
    place = {"draft_placement": draft_server.address, "draft_keys": draft_server.keys}
    with serving(tmp_path, TWO_ENGINES, None, both_cores(), **place) as server:
        assert not draft_servers(server), "none of their own"
        generate_until_both_draft(server, lambda: assert_same(asyncio.run(run(server, prompts, 0.0)), expected))
        draft_server.end()
        assert_same(asyncio.run(run(server, prompts, 0.0)), expected)
        draft_server.start()
        generate_until_both_draft(server, lambda: assert_same(asyncio.run(run(server, prompts, 0.0)), expected))
