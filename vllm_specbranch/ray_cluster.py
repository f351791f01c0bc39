"""What this process knows of Ray, without starting, joining or even importing it. Any process of the engine."""

import importlib.util
import sys
from typing import Any

from vllm_specbranch.errors import ConfigError
from vllm_specbranch.ray_messages import TargetPlace


def check_ray() -> None:
    """Refuse a placement by Ray where there is no Ray.

    Raises:
        ConfigError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        allowed = "'process' or 'tcp://host:port' without Ray (pip install 'vllm-specbranch[ray]')"
        raise ConfigError("ray", allowed, "draft_placement")


def _connected_ray() -> Any | None:
    """The module, if this process is connected to a cluster."""
    ray = sys.modules.get("ray")
    return ray if ray is not None and ray.is_initialized() else None


def connected_address() -> str | None:
    """The address of the cluster that this process is connected to, if it is."""
    ray = _connected_ray()
    return None if ray is None else str(ray.get_runtime_context().gcs_address)


def target_place(parallel_config: Any, recorded_address: str | None) -> TargetPlace:
    """Where the target runs; called in its worker.

    Args:
        parallel_config: the target's `ParallelConfig`.
        recorded_address: the cluster that the engine's frontend was connected to.
    """
    ray = _connected_ray()
    group = parallel_config.placement_group
    if group is None and ray is not None:
        group = ray.util.get_current_placement_group()
    runtime_env = parallel_config.ray_runtime_env
    return TargetPlace(
        address=connected_address() or recorded_address,
        node_id=None if ray is None else ray.get_runtime_context().get_node_id(),
        placement_group=None if group is None else group.id.hex(),
        runtime_env=dict(runtime_env.to_dict()) if runtime_env else {},
    )
