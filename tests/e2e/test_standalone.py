"""A draft server that no engine started, over TCP with keys: two engines at once, its death under load, its return, its end."""

import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import RunEngine
from tests.e2e.standalone_server import StandaloneServer
from tests.model_paths import DRAFT
from vllm_specbranch.draft_identity import draft_identity
from vllm_specbranch.weaken import weaken

NUM_PROMPTS = 8
# Two engines and a server share two cores here: few requests and a slow target, so that drafts come in time on a busy machine too.
SLOW_DOWN_S = 0.05

Same = Callable[..., None]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandaloneServer]:
    found = StandaloneServer(tmp_path_factory.mktemp("standalone"))
    try:
        found.wait_until_ready()
        yield found
    finally:
        found.end()


def test_two_engines_share_a_server_that_is_killed_and_comes_back(
    run_engine: RunEngine,
    prompts: list[list[int]],
    num_new_tokens: int,
    assert_same: Same,
    server: StandaloneServer,
    tmp_path: Path,
) -> None:
    """Greedy answers in float32 are plain vLLM's, before, during and after; both engines find the new server.

    Each has an address more to go to, one first, one last, where nobody is. The new server has other weights: an upgrade.
    """
    upgrade = tmp_path / "upgrade"
    weaken(Path(DRAFT), upgrade, noise=0.05)
    assert draft_identity(upgrade) == draft_identity(DRAFT)
    server.model = str(upgrade)
    back = tmp_path / "back"
    watch = threading.Thread(target=server.start_again_when_dead, args=(back,), daemon=True)
    watch.start()
    load = {"prompts": prompts[:NUM_PROMPTS], "max_tokens": num_new_tokens, "with_status": True}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    kill = {"after_s": 0.2, "signals": [["SIGKILL", 0.0]], "pid": server.process.pid}
    jobs: list[list[dict[str, Any]]] = [
        [
            load | {"batch_size": 4, "slow_down_s": SLOW_DOWN_S, "then_touch": first, "then_wait_for": second},
            load | {"batch_size": 2, "disturb": kill, "then_wait_for": str(back)},
            load | {"batch_size": 4},
        ],
        [
            load | {"batch_size": 4, "slow_down_s": SLOW_DOWN_S, "then_touch": second, "then_wait_for": first},
            load | {"batch_size": 2, "then_wait_for": str(back)},
            load | {"batch_size": 4},
        ],
    ]
    placements = [[server.nobodys_address, server.address], f"{server.address},{server.nobodys_address}"]
    # What an engine decides for itself; the rest is the server's.
    speculative = {
        "draft_keys": server.keys,
        "draft_cpu_cores": None,
        "reply_timeout_ms": 200,
    }
    # Without it vLLM sends no functions to workers, such as the one that slows them down.
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(
                run_engine, one, speculative=speculative | {"draft_placement": placement}, environment=environment
            )
            for one, placement in zip(jobs, placements, strict=True)
        ]
        results: list[dict[str, Any]] = [run.result() for run in runs]
    watch.join()
    for result in results:
        for done in result["jobs"]:
            assert_same(done["answers"])
        before, during, after = (done["status"]["engine"]["num_accepted_tokens"] for done in result["jobs"])
        assert before > 0, result["jobs"][0]["status"]
        assert after > during, "the new server drafts"
        assert result["status"]["is_up"], "the new server was found"
        assert result["status"]["server_pid"] is None, "no child of the engine's"
    assert results[0]["jobs"][1]["events"] == ["SIGKILL"]
    assert results[0]["status"]["engine"]["num_breaker_openings"] >= 1
    assert str(upgrade) in server.log
    assert metric(server, "rounds_total") > 0, "it has drafted for them"
    assert metric(server, "requests") == 0


def metric(server: StandaloneServer, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=10.0) as answer:
        lines = answer.read().decode().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"specbranch_draft_server_{name} "))
    return float(value)


def test_sigterm_ends_it_well(server: StandaloneServer) -> None:
    for path in ("health", "ready"):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/{path}", timeout=10.0) as answer:
            assert answer.status == 200
    os.kill(server.process.pid, signal.SIGTERM)
    assert server.process.wait(30.0) == 0
    assert server.log.endswith("draft server ended\n")
