"""What vLLM's Ray executor sees while it is made for CPUs, and that it sees its own things again afterwards."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

from vllm_specbranch import ray_executor
from vllm_specbranch.ray_executor import CPURayExecutor, CPURayWorkerProc, free_bundles

GROUP = SimpleNamespace(id=SimpleNamespace(hex=lambda: "ab"), bundle_specs=[{"CPU": 1.0}] * 4)
BUNDLES = [(1, "here", "10.0.0.1"), (2, "here", "10.0.0.1"), (0, "there", "10.0.0.2"), (3, "there", "10.0.0.2")]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """What is free on each node: the second bundle is taken."""
    found = {
        "here": {"CPU": 4.0, "CPU_group_1_ab": 1.0, "CPU_group_2_cd": 1.0},
        "there": {"CPU_group_0_ab": 1.0, "CPU_group_3_ab": 1.0},
    }
    monkeypatch.setattr(ray_executor, "available_resources_per_node", lambda: found)
    monkeypatch.setattr(ray_executor, "get_bundles_sorted_by_node", lambda _: BUNDLES)
    return found


def config(num_workers: int) -> Any:
    parallel = SimpleNamespace(
        world_size=num_workers, local_world_size=num_workers, data_parallel_rank_local=None, _api_process_count=1
    )
    return SimpleNamespace(parallel_config=parallel, kv_transfer_config=None)


def test_workers_go_into_as_many_bundles_as_they_are_and_not_where_somebody_is(
    free: dict[str, dict[str, float]],
) -> None:
    assert free_bundles(GROUP, 1) == BUNDLES[:1]
    assert free_bundles(GROUP, 2) == [BUNDLES[0], BUNDLES[2]]


def test_a_group_without_room_is_told_of_rather_than_waited_for(
    free: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "BUNDLES_TIMEOUT_S", 0.0)
    with pytest.raises(ValueError, match=r"4 workers need as many bundles with a free CPU.*has 3"):
        free_bundles(GROUP, 4)


def test_what_becomes_free_is_noticed(free: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_executor.time, "sleep", lambda _: free["here"].update({"CPU_group_2_ab": 1.0}))
    assert free_bundles(GROUP, 4) == BUNDLES


def test_each_worker_takes_a_cpu_and_knows_its_cores_from_the_beginning(
    free: dict[str, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|2-3")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    made: list[tuple[type, dict[str, Any]]] = []

    def remote(worker: type) -> Any:
        return SimpleNamespace(options=lambda **options: made.append((worker, options)))

    monkeypatch.setattr(ray, "remote", remote)
    names = ("ray", "get_bundles_sorted_by_node")
    before = [getattr(ray_executor_v2, name) for name in names]
    with pytest.raises(RuntimeError, match="vLLM fails"), ray_executor._on_cpus(config(2)):
        assert current_platform.ray_device_key == "CPU"
        assert ray_executor_v2.ray.is_initialized is ray.is_initialized, "the rest is Ray"
        assert ray_executor_v2.get_bundles_sorted_by_node(GROUP) == [BUNDLES[0], BUNDLES[2]]
        for rank in range(2):
            base = {"env_vars": {"A": "b"}, "working_dir": "w"}
            ray_executor_v2.ray.remote(RayWorkerProc).options(
                name=f"worker {rank}",
                num_cpus=0,
                **CPURayExecutor._get_actor_resource_kwargs(),
                scheduling_strategy="s",
                runtime_env=base,
            )
            assert base == {"env_vars": {"A": "b"}, "working_dir": "w"}
        raise RuntimeError("vLLM fails")
    assert [getattr(ray_executor_v2, name) for name in names] == before
    assert current_platform.ray_device_key == ""
    for rank, (count, places) in enumerate([("1", "{0}"), ("2", "{2,3}")]):
        worker, options = made[rank]
        assert worker is CPURayWorkerProc
        variables = options.pop("runtime_env")["env_vars"]
        assert options == {"name": f"worker {rank}", "num_cpus": 1, "scheduling_strategy": "s"}
        assert variables["A"] == "b"
        assert (variables["OMP_NUM_THREADS"], variables["OMP_PLACES"]) == (count, places)
