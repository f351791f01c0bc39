"""Engines whose draft server, and whose workers, Ray places: right answers, the placement asked for, and nothing lost or left."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import RunEngine
from tests.processes import is_gone
from tests.ray_cluster import RayCluster, ray_cluster

# So small a target on two busy cores would often be right not to wait for drafts.
SLOW_DOWN_S = 0.03
SETTINGS = {"draft_placement": "ray", "enforce_eager": True}
EXECUTOR = "vllm_specbranch.ray_executor.CPURayExecutor"
SOON_S = 180.0
# `slow_down_s` sends a function to the workers.
ENVIRONMENT = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

Same = Callable[..., None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster({"num_cpus": 4}, {"num_cpus": 2, "resources": {"draft_node": 1}}) as found:
        yield found


def wait_for_file(path: Path) -> None:
    until = time.monotonic() + SOON_S
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_killed_actor_under_load_loses_nothing_and_drafting_resumes(
    run_engine: RunEngine,
    prompts: list[list[int]],
    num_new_tokens: int,
    assert_same: Same,
    cluster: RayCluster,
    tmp_path: Path,
) -> None:
    """Process executor, the draft server on the other node: over TCP with keys."""
    drafted = tmp_path / "drafted"
    common = {"max_tokens": num_new_tokens, "with_status": True}
    jobs: list[dict[str, Any]] = [
        {**common, "prompts": prompts[:8], "batch_size": 8, "slow_down_s": SLOW_DOWN_S, "then_touch": str(drafted)},
        {**common, "prompts": prompts[:32], "batch_size": 8},
        {**common, "prompts": prompts[:16], "batch_size": 8, "once_up": True},
    ]

    def kill_under_load() -> tuple[dict[str, Any], dict[str, Any]]:
        wait_for_file(drafted)
        first = cluster.wait_for_draft_actor(lambda _: True)
        time.sleep(0.5)
        os.kill(first["pid"], signal.SIGKILL)
        return first, cluster.wait_for_draft_actor(lambda actor: actor["num_restarts"] == 1)

    with ThreadPoolExecutor(1) as pool:
        actors = pool.submit(kill_under_load)
        result = run_engine(
            jobs,
            speculative={**SETTINGS, "draft_ray_resources": {"draft_node": 1}, "reply_timeout_ms": 200},
            environment=ENVIRONMENT | cluster.environment,
            in_process=False,
        )
        first, second = actors.result()
    for done in result["jobs"]:
        assert_same(done["answers"])
    for actor in (first, second):
        assert actor["node_id"] == cluster.node_ids[1]
        assert actor["resources"] == {"CPU": 1.0, "draft_node": 1.0}
    assert first["name"] == second["name"] and first["pid"] != second["pid"]
    before, during, after = (done["status"]["engine"] for done in result["jobs"])
    assert before["num_accepted_tokens"] > 0
    assert (before["num_server_deaths"], during["num_server_deaths"]) == (0, 1)
    assert after["num_accepted_tokens"] > during["num_accepted_tokens"]
    assert result["status"]["is_up"]
    assert not cluster.draft_actors(), "it ends with its engine"


@pytest.mark.parametrize(
    ("executor", "num_workers"),
    [
        (EXECUTOR, 1),
        pytest.param(EXECUTOR, 2, marks=pytest.mark.long),
        # One worker of the engine's own, which Ray knows nothing of.
        pytest.param("mp", 1, marks=pytest.mark.long),
    ],
)
def test_workers_and_draft_server_share_the_placement_group_of_an_engine_that_ray_started(
    run_engine: RunEngine,
    prompts: list[list[int]],
    num_new_tokens: int,
    assert_same: Same,
    cluster: RayCluster,
    tmp_path: Path,
    executor: str,
    num_workers: int,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(map(str, (cores[0], cores[-1])[:num_workers]))
    drafted, seen = tmp_path / "drafted", tmp_path / "seen"
    job = {"prompts": prompts[:16], "max_tokens": num_new_tokens, "batch_size": 8, "slow_down_s": SLOW_DOWN_S}
    job |= {"then_touch": str(drafted), "then_wait_for": str(seen)}

    def look() -> dict[str, Any]:
        wait_for_file(drafted)
        state = cluster.state()
        seen.touch()
        return state

    with ThreadPoolExecutor(1) as pool:
        looked = pool.submit(look)
        result = run_engine(
            [job],
            speculative={**SETTINGS, "reply_timeout_ms": 200},
            environment=ENVIRONMENT | cluster.environment | {"VLLM_CPU_OMP_THREADS_BIND": binding},
            runner="tests.e2e.ray_engine",
            in_process=False,
            distributed_executor_backend=executor,
            tensor_parallel_size=num_workers,
        )
        state = looked.result()
    assert_same(result["jobs"][0]["answers"])
    assert result["status"]["engine"]["num_accepted_tokens"] > 0
    group = result["group"]
    alive = [actor for actor in state["actors"] if actor["state"] == "ALIVE"]
    workers = [actor for actor in alive if actor["class"] == "CPURayWorkerProc"]
    (draft,) = [actor for actor in alive if actor["class"] == "DraftActor"]
    assert len(workers) == (num_workers if executor == EXECUTOR else 0)
    taken = [one for actor in (*workers, draft) for one in actor["resources"] if one.startswith("CPU_group_")]
    bundles = sorted(name for name in taken if name.count("_") == 3)
    expected = range(num_workers - len(workers), num_workers + 1)
    assert bundles == [f"CPU_group_{index}_{group}" for index in expected], "each has its own"
    assert f"CPU_group_{num_workers}_{group}" in draft["resources"]
    assert {actor["group"] for actor in (*workers, draft)} == {group}
    assert draft["node_id"] == state["groups"][group]["nodes"][str(num_workers)] == result["node_id"]


@pytest.mark.long
@pytest.mark.parametrize("stop_driver", [False, True], ids=["driver", "stopped driver"])
def test_ray_is_started_where_it_was_not_and_nothing_outlives_a_killed_engine(
    run_engine: RunEngine,
    prompts: list[list[int]],
    assert_same: Same,
    plain_answers: list[list[int]],
    stop_driver: bool,
) -> None:
    directory = tempfile.mkdtemp(prefix="sbray", dir="/tmp")
    job = {"prompts": prompts[:4], "max_tokens": 32, "batch_size": 4, "slow_down_s": SLOW_DOWN_S}
    try:
        result = run_engine(
            [job],
            speculative={**SETTINGS, "reply_timeout_ms": 200},
            environment=ENVIRONMENT | {"RAY_TMPDIR": directory, "RAY_ADDRESS": ""},
            in_process=False,
            expect_kill=True,
            stop_driver=stop_driver,
        )
        assert_same(result["jobs"][0]["answers"], [answer[:32] for answer in plain_answers[:4]])
        assert "Ray was not running: started it on this machine" in result["log"]
        assert result["status"]["engine"]["num_accepted_tokens"] > 0
        left = {result["status"]["server_pid"], *result["children"]}
        until = time.monotonic() + 30.0
        while left := {pid for pid in left if not is_gone(pid)}:
            assert time.monotonic() < until, [psutil.Process(pid).cmdline() for pid in left]
            time.sleep(0.1)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
