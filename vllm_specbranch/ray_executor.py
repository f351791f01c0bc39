"""Target workers under Ray on machines without accelerators, where vLLM's own Ray executor refuses to work.

Give it as `distributed_executor_backend="vllm_specbranch.ray_executor.CPURayExecutor"` (or the class); it works with every method,
and with none. Owns what differs there: a worker takes one CPU of its bundle where vLLM's takes a device, and is told its cores
(`VLLM_CPU_OMP_THREADS_BIND`, a list per rank) before it begins. Runs in the EngineCore process.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc
from vllm.v1.executor.ray_utils import get_bundles_sorted_by_node

from vllm_specbranch.config import thread_environment

# Under this name a bundle of a placement group has room for a worker.
DEVICE_KEY = "CPU"
# How long what is free in a new placement group may take to be known here.
BUNDLES_TIMEOUT_S = 10.0
BUNDLES_CHECK_S = 0.2


class CPURayWorkerProc(RayWorkerProc):
    """vLLM's worker in a Ray actor, without a device."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """The node, and no device."""
        return ray.get_runtime_context().get_node_id(), []


class CPURayExecutor(RayExecutorV2):
    """vLLM's Ray executor for CPUs. Each bundle of the placement group has at most one CPU; a worker takes that of its bundle."""

    def _init_executor(self) -> None:
        address = getattr(self.vllm_config.speculative_config, "ray_address", None)
        if address is not None and not ray.is_initialized():
            # Left to itself, a process that Ray did not start would start a second cluster.
            ray.init(address, runtime_env=self.parallel_config.ray_runtime_env)
        with _on_cpus(self.vllm_config):
            super()._init_executor()

    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        """Nothing here: what vLLM adds these to already says that a worker takes no CPU (see `_ActorClass`)."""
        return {}


class _ActorClass:
    """Stands for `ray.remote(RayWorkerProc)` while vLLM creates its workers, one after the other by their ranks."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._cores = OMPProcessManager(vllm_config)
        self._num_workers = 0

    def options(self, *, runtime_env: dict[str, Any], **options: Any) -> Any:
        """The actor class with vLLM's options, but for a CPU, and with this rank's cores."""
        rank = self._num_workers
        self._num_workers += 1
        with self._cores.configure_omp_envs(rank=rank, local_rank=rank):
            variables = thread_environment()
        runtime_env = runtime_env | {"env_vars": runtime_env.get("env_vars", {}) | variables}
        return ray.remote(CPURayWorkerProc).options(**options | {"num_cpus": 1, "runtime_env": runtime_env})


class _Ray:
    """Stands for the module."""

    def __init__(self, actor_class: _ActorClass) -> None:
        self._actor_class = actor_class

    def remote(self, worker: type[RayWorkerProc]) -> _ActorClass:
        assert worker is RayWorkerProc
        return self._actor_class

    def __getattr__(self, name: str) -> Any:
        return getattr(ray, name)


def free_bundles(placement_group: Any, num_workers: int) -> list[tuple[int, str, str]]:
    """The first bundles with a free CPU, as (index, node id, node's address).

    vLLM's own counts all bundles with a device as workers', those of others (the engine's actor, the draft server's) as well, and
    then waits for workers that never come.

    Raises:
        ValueError: there are not so many.
    """
    until_s = time.monotonic() + BUNDLES_TIMEOUT_S
    while True:
        name = f"{DEVICE_KEY}_group_%d_{placement_group.id.hex()}"
        free = available_resources_per_node()
        bundles = [
            (index, node_id, address)
            for index, node_id, address in get_bundles_sorted_by_node(placement_group)
            if free.get(node_id, {}).get(name % index, 0.0) >= 1.0
        ]
        if len(bundles) >= num_workers:
            return bundles[:num_workers]
        if time.monotonic() > until_s:
            raise ValueError(
                f"{num_workers} workers need as many bundles with a free CPU; the placement group {placement_group.bundle_specs} "
                f"has {len(bundles)}"
            )
        time.sleep(BUNDLES_CHECK_S)


@contextlib.contextmanager
def _on_cpus(vllm_config: VllmConfig) -> Iterator[None]:
    """Let vLLM's executor be made for CPUs: what it looks up meanwhile is another device, and other workers."""
    num_workers = vllm_config.parallel_config.world_size
    replaced = {
        # It says `num_cpus=0` for every worker, and takes no other word for it.
        "ray": _Ray(_ActorClass(vllm_config)),
        "get_bundles_sorted_by_node": lambda group: free_bundles(group, num_workers),
    }
    originals = {name: getattr(ray_executor_v2, name) for name in replaced}
    current_platform.ray_device_key = DEVICE_KEY
    try:
        for name, value in replaced.items():
            setattr(ray_executor_v2, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(ray_executor_v2, name, value)
        del current_platform.ray_device_key
