"""The Ray driver beside a target's worker: joins the cluster, has the draft server's actor placed, tells how it fares.

Owns the actor: Ray ends it together with this process, whatever ends that. A process of its own, because Ray ends drivers whose
cluster is gone, and a target's worker must outlive its draft side. Run as `python -m vllm_specbranch.ray_driver`; not for people.
The parent says on standard input which draft server it wants, then the number of each start; when standard input closes or the
parent is gone, the actor is ended. What happens is told on standard output, a line each.
"""

import contextlib
import logging
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import msgspec

from vllm_specbranch.ray_actor import DraftActor
from vllm_specbranch.ray_messages import NAMESPACE, Ended, Order, Placed, Report

logger = logging.getLogger("vllm.specbranch.ray_driver")

# Ray takes a second for an actor where there is room.
PATIENCE_S = 30.0
RESTART_CHECK_S = 0.1
LEAVE_TIMEOUT_S = 4.0
PARENT_CHECK_S = 2.0
# Exit status without a cluster (EX_UNAVAILABLE of sysexits.h).
EXIT_UNAVAILABLE = 69
# A cluster of our own carries no objects; Ray wants at least 75 MiB.
OBJECT_STORE_BYTES = 100 * 2**20
# Names of what Ray has besides custom resources, as options of an actor.
_OPTIONS = {"CPU": "num_cpus", "GPU": "num_gpus"}


class RayDriver:
    """Has one actor, and starts draft servers in it.

    Args:
        order: what is wanted.
        reports: where it is told, a line of JSON each.
    """

    def __init__(self, order: Order, reports: BinaryIO) -> None:
        self._order = order
        self._reports = reports
        self._lock = threading.Lock()
        self._actor: Any = None
        self._has_joined = False

    def join(self) -> None:
        """Join the cluster; start one on this machine when there is none.

        Raises:
            OSError, RuntimeError, ValueError: there is none at the address given, or none can be started.
        """
        import ray

        common = {"namespace": NAMESPACE, "logging_level": logging.WARNING}
        # Unless it is told, Ray says only by starting one that there was none.
        is_local = self._order.target.address is None and not _is_ray_here()
        if is_local:
            custom = {name: amount for name, amount in self._order.resources.items() if name not in _OPTIONS}
            ray.init(
                "local", resources=custom, include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **common
            )
            address = ray.get_runtime_context().gcs_address
            logger.warning("Ray was not running: started it on this machine (%s) for the draft server alone.", address)
        else:
            ray.init(self._order.target.address or "auto", **common)
        self._has_joined = True
        if self._order.target.node_id is None:
            target = msgspec.structs.replace(self._order.target, node_id=ray.get_runtime_context().get_node_id())
            self._order = msgspec.structs.replace(self._order, target=target)

    def start(self, number: int) -> None:
        """Let a draft server be started; tell when it is, and when it has ended. Returns at once."""
        threading.Thread(target=self._run, args=(number,), name=f"start {number}", daemon=True).start()

    def _run(self, number: int) -> None:
        import ray

        try:
            self._tell(self._serve(number))
            status = ray.get(self._find_or_create_actor().outcome.remote())
            self._tell(Ended(number, f"it ended with status {status}", status))
        except (ray.exceptions.RayError, ValueError) as error:
            self._tell_failure(number, error)
        except Exception as error:
            # Whatever it is: of a start that has no end the parent expects a draft server for many minutes.
            logger.exception("Start %d of the draft server failed with %s.", number, type(error).__name__)
            self._tell_failure(number, error)

    def _serve(self, number: int) -> Placed:
        import ray

        until_s = time.monotonic() + PATIENCE_S
        while True:
            actor = self._find_or_create_actor()
            try:
                return self._await_placed(actor.serve.remote(number))
            except ray.exceptions.ActorUnavailableError:
                # Ray restarts it just now.
                if time.monotonic() > until_s:
                    raise
                time.sleep(RESTART_CHECK_S)

    def _find_or_create_actor(self) -> Any:
        """The actor, by its name: one that Ray has restarted is the same. It lives as long as the handle that created it."""
        import ray

        order = self._order
        with contextlib.suppress(ValueError):
            return ray.get_actor(order.name, NAMESPACE)
        custom = {name: amount for name, amount in order.resources.items() if name not in _OPTIONS}
        options: dict[str, Any] = {
            "name": order.name,
            "namespace": NAMESPACE,
            "max_restarts": -1,
            # One for `outcome`.
            "max_concurrency": 2,
            "num_cpus": order.resources.get("CPU", 0),
            "num_gpus": order.resources.get("GPU", 0),
            "resources": custom,
            "scheduling_strategy": self._strategy(),
        }
        if order.target.runtime_env:
            options["runtime_env"] = order.target.runtime_env
        self._actor = ray.remote(DraftActor).options(**options).remote(msgspec.json.encode(order))
        return self._actor

    def _strategy(self) -> Any:
        """In a bundle of the target's group that has room, best on the target's node; else on that node or, if it is full, any."""
        from ray.util import placement_group_table
        from ray.util.placement_group import PlacementGroup, PlacementGroupID
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

        target = self._order.target
        assert target.node_id is not None
        if target.placement_group is not None:
            group = PlacementGroup(PlacementGroupID(bytes.fromhex(target.placement_group)))
            # A group that has been removed has none.
            nodes = placement_group_table(group).get("bundles_to_node_id", {})
            index = choose_bundle(self._order.resources, nodes, _free_by_node(), target.placement_group, target.node_id)
            if index is not None:
                return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            logger.info("No bundle of the target's placement group has room for the draft server: it goes elsewhere.")
        # `soft` alone allows another node only where this one is gone or too small: while it is full, the actor would wait.
        return NodeAffinitySchedulingStrategy(target.node_id, soft=True, _spill_on_unavailable=True)

    def _await_placed(self, reference: Any) -> Placed:
        import ray

        done, _ = ray.wait([reference], timeout=PATIENCE_S)
        if not done:
            logger.warning(
                "Ray has not placed the draft server for %.0f s. It needs %s; free are %s.",
                PATIENCE_S,
                self._order.resources,
                _free_by_node(),
            )
        placed: Placed = msgspec.json.decode(ray.get(reference), type=Placed)
        return placed

    def _tell_failure(self, number: int, error: Exception) -> None:
        reason = str(error).strip().partition("\n")[0]
        self._tell(Ended(number, f"{type(error).__name__}: {reason}"))

    def _tell(self, report: Report) -> None:
        # The parent may be gone; then this process ends as well.
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._reports.write(msgspec.json.encode(report) + b"\n")
            self._reports.flush()

    def leave(self) -> None:
        """End the actor and leave the cluster, for as long as that may take."""
        if not self._has_joined:
            return
        worker = threading.Thread(target=self._leave, name="leave", daemon=True)
        worker.start()
        worker.join(LEAVE_TIMEOUT_S)

    def _leave(self) -> None:
        import ray

        if self._actor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._actor, no_restart=True)
        ray.shutdown()


def choose_bundle(
    needs: Mapping[str, float],
    nodes: Mapping[int, str],
    free: Mapping[str, Mapping[str, float]],
    group: str,
    target_node: str,
) -> int | None:
    """The bundle of a placement group that a draft server goes into.

    Args:
        needs: what its actor takes.
        nodes: the node of each bundle.
        free: what is free on each node. What a bundle has left is there under names of its own (`CPU_group_0_<id>`).
        group: hexadecimal id of the group.
        target_node: preferred.

    Returns:
        The last bundle with room, because engines fill a group from its front; None if there is none.
    """
    fitting = [
        index
        for index, node in nodes.items()
        if all(free.get(node, {}).get(f"{name}_group_{index}_{group}", 0.0) >= amount for name, amount in needs.items())
    ]
    return max(fitting, key=lambda index: (nodes[index] == target_node, index), default=None)


def _free_by_node() -> dict[str, dict[str, float]]:
    from ray._private.state import available_resources_per_node

    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free


def _is_ray_here() -> bool:
    """Whether Ray, asked for any cluster, would find one: by RAY_ADDRESS, or started on this machine by `ray start`."""
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address(None) is not None


def _listen(lifeline: BinaryIO, parent: int, numbers: "queue.SimpleQueue[int]", end: Callable[[], None]) -> None:
    """Pass on what the parent says until it closes the line or is gone, then end this process, whatever it is doing.

    Args:
        lifeline: without a buffer, where a line could lie unseen.
        parent: its pid is watched too: a fork of the parent may hold the line open beyond its death.
        numbers: of the starts that it wants.
        end: ends this process.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([lifeline], [], [], PARENT_CHECK_S)
        if not readable:
            continue
        line = lifeline.readline()
        if not line:
            break
        numbers.put(int(line))
    end()


def main() -> None:
    """Serve the parent until it closes standard input or is gone."""
    # The engine decides when this process ends, not who interrupts it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    # What Ray prints, the actor's lines among it, is for the log.
    reports = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(level=logging.INFO, format="%(levelname)s [%(name)s] %(message)s")
    lifeline = os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    driver = RayDriver(msgspec.json.decode(lifeline.readline(), type=Order), reports)

    def end() -> None:
        driver.leave()
        # Threads that wait for Ray are left behind.
        os._exit(0)

    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lifeline, parent, numbers, end), name="lifeline", daemon=True).start()
    try:
        driver.join()
    except (OSError, RuntimeError, ValueError) as error:
        logger.error("Ray cannot be joined: %s", error)
        os._exit(EXIT_UNAVAILABLE)
    while True:
        driver.start(numbers.get())


if __name__ == "__main__":
    main()
