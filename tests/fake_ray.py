"""A module in place of `ray`: remembers what it is asked for, and runs an actor's methods in place."""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

GROUP = "ab" * 14


class RayError(Exception):
    """Base, as in `ray.exceptions`."""


class ActorUnavailableError(RayError):
    """An actor that is being restarted."""


class Ray:
    """The state behind the fake module.

    Attributes:
        inits: arguments of `ray.init`.
        options: of actors, as they were created.
        free: what is free, by node and name.
        bundles: nodes of the group's bundles.
        is_running: whether a cluster would be found.
        failures: raised by the next calls of an actor, one each.
        killed: how often an actor was.
    """

    def __init__(self) -> None:
        self.inits: list[tuple[str, dict[str, Any]]] = []
        self.options: list[dict[str, Any]] = []
        self.free: dict[str, dict[str, float]] = {}
        self.bundles: dict[int, str] = {}
        self.is_running = True
        self.failures: list[Exception] = []
        self.killed = 0
        self.node_id = "node-1"
        self._actors: dict[tuple[str, str], _Handle] = {}

    def init(self, address: str, **options: Any) -> None:
        self.inits.append((address, options))

    def remote(self, actor_class: Callable[..., Any]) -> Any:
        def options(**given: Any) -> Any:
            self.options.append(given)

            def create(*args: Any) -> Any:
                self._actors[given["name"], given["namespace"]] = _Handle(self, actor_class(*args))
                return self.get_actor(given["name"], given["namespace"])

            return SimpleNamespace(remote=create)

        return SimpleNamespace(options=options)

    def get_actor(self, name: str, namespace: str) -> Any:
        if (name, namespace) not in self._actors:
            raise ValueError(f"no actor {name}")
        return self._actors[name, namespace]

    def get(self, call: Callable[[], Any]) -> Any:
        return call()

    def kill(self, _: Any, *, no_restart: bool) -> None:
        assert no_restart
        self.killed += 1


class _Handle:
    def __init__(self, ray: Ray, instance: Any) -> None:
        self._ray = ray
        self._instance = instance

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Callable[[], Any]:
            def call() -> Any:
                if self._ray.failures:
                    raise self._ray.failures.pop(0)
                return getattr(self._instance, name)(*args)

            return call

        return SimpleNamespace(remote=remote)


def install(monkeypatch: pytest.MonkeyPatch) -> Ray:
    """Put the fake in the place of `ray` and of the modules in it that are used."""
    ray = Ray()
    context = SimpleNamespace(get_node_id=lambda: ray.node_id, gcs_address="10.0.0.1:6379")
    group = SimpleNamespace(id=SimpleNamespace(hex=lambda: GROUP))
    util: dict[str, Any] = {
        "get_node_ip_address": lambda: "127.0.0.1",
        "get_current_placement_group": lambda: group,
        "placement_group_table": lambda _: {"bundles_to_node_id": ray.bundles},
    }
    modules: dict[str, dict[str, Any]] = {
        "ray": {
            "init": ray.init,
            "is_initialized": lambda: True,
            "remote": ray.remote,
            "get": ray.get,
            "get_actor": ray.get_actor,
            "kill": ray.kill,
            "wait": lambda references, timeout: (references, []),
            "shutdown": lambda: None,
            "get_runtime_context": lambda: context,
            "exceptions": SimpleNamespace(RayError=RayError, ActorUnavailableError=ActorUnavailableError),
        },
        "ray.util": util,
        "ray.util.placement_group": {
            "PlacementGroup": lambda identity: SimpleNamespace(id=identity),
            "PlacementGroupID": lambda data: data.hex(),
        },
        "ray.util.scheduling_strategies": {
            "PlacementGroupSchedulingStrategy": lambda group, placement_group_bundle_index: (
                "bundle",
                group.id,
                placement_group_bundle_index,
            ),
            "NodeAffinitySchedulingStrategy": lambda node, soft, _spill_on_unavailable=False: (
                "node",
                node,
                soft,
                _spill_on_unavailable,
            ),
        },
        "ray._private": {},
        "ray._private.state": {"available_resources_per_node": lambda: ray.free},
        "ray._private.services": {
            "canonicalize_bootstrap_address": lambda _: "10.0.0.1:6379" if ray.is_running else None
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["ray"].util = sys.modules["ray.util"]  # type: ignore[attr-defined]
    return ray
