"""A Ray cluster on this machine, in a process of its own, with which it ends; and what Ray says of its state.

Run as `python -m tests.ray_cluster NODES`, NODES being a JSON list of what each node has, the first being the head. Says its
address and the ids of its nodes as a line of JSON. A line `[{"CPU": 1}, ...]` on standard input makes a placement group and is
answered with its id, `[]` with the state of all actors and groups. `{"kill": 1}` kills a node, `{"add": NODE}` adds one.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.model_paths import REPOSITORY

OBJECT_STORE_BYTES = 80 * 2**20
START_TIMEOUT_S = 120.0


class RayCluster:
    """The process, as tests see it.

    Args:
        nodes: what each has, for example `{"num_cpus": 2, "resources": {"draft": 1}}`.

    Attributes:
        address: for `ray.init`.
        node_ids: of the nodes, as they were given.
        environment: for processes that are to find this cluster, and no other on this machine.
    """

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        # Ray's sockets lie deep below, and their paths may not be long.
        self._directory = tempfile.mkdtemp(prefix="sbray", dir="/tmp")
        self.environment = {"RAY_TMPDIR": self._directory, "PYTHONPATH": python_path()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_cluster", json.dumps(nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=dict(os.environ) | self.environment,
        )
        assert self._process.stdout is not None
        said = json.loads(self._process.stdout.readline())
        self.address: str = said["address"]
        self.node_ids: list[str] = said["node_ids"]
        self.environment["RAY_ADDRESS"] = self.address

    def _ask(self, question: list[dict[str, float]] | dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def make_group(self, *bundles: dict[str, float]) -> str:
        """A placement group; returns its id in hexadecimal."""
        return str(self._ask(list(bundles))["group"])

    def kill_node(self, index: int) -> None:
        """End a node's processes as a loss of power would. Not the head: there is no cluster without it."""
        self._ask({"kill": index})

    def add_node(self, node: dict[str, Any]) -> str:
        """One more; returns its id."""
        return str(self._ask({"add": node})["node_id"])

    def state(self) -> dict[str, Any]:
        """What Ray knows now: `actors` and `groups`."""
        return self._ask([])

    def draft_actors(self) -> list[dict[str, Any]]:
        """The actors of draft servers that Ray has not buried."""
        actors: list[dict[str, Any]] = self.state()["actors"]
        return [one for one in actors if one["class"] == "DraftActor" and one["state"] != "DEAD"]

    def wait_for_draft_actor(
        self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 60.0
    ) -> dict[str, Any]:
        """The one draft server's actor, once it is alive and as it should be."""
        until = time.monotonic() + timeout_s
        while True:
            actors = self.draft_actors()
            if len(actors) == 1 and actors[0]["state"] == "ALIVE" and condition(actors[0]):
                return actors[0]
            assert time.monotonic() < until, actors
            time.sleep(0.1)

    def close(self) -> None:
        """End the cluster."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60.0)
        self._process.stdout.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def python_path() -> str:
    """For processes that Ray starts: this repository before any other."""
    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])


@contextlib.contextmanager
def ray_cluster(*nodes: dict[str, Any]) -> Iterator[RayCluster]:
    cluster = RayCluster(list(nodes))
    try:
        yield cluster
    finally:
        cluster.close()


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    cluster = Cluster()
    nodes: list[Any] = []

    def add(one: dict[str, Any]) -> None:
        nodes.append(cluster.add_node(object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, **one))

    def answer(what: dict[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    for one in json.loads(sys.argv[1]):
        add(one)
    answer({"address": cluster.address, "node_ids": [node.node_id for node in nodes]})
    groups = []
    for line in sys.stdin:
        question = json.loads(line)
        if not question:
            answer({"actors": actors_of(cluster), "groups": groups_of(cluster)})
        elif "kill" in question:
            cluster.remove_node(nodes[question["kill"]], allow_graceful=False)
            answer({})
        elif "add" in question:
            add(question["add"])
            answer({"node_id": nodes[-1].node_id})
        else:
            ray.init(cluster.address, ignore_reinit_error=True)
            groups.append(ray.util.placement_group(question, strategy="PACK"))
            ray.get(groups[-1].ready())
            answer({"group": groups[-1].id.hex()})
    ray.shutdown()
    cluster.shutdown()


def actors_of(cluster: Any) -> list[dict[str, Any]]:
    from ray.core.generated.gcs_pb2 import ActorTableData

    accessor = cluster.global_state._connect_and_get_accessor()
    found = [ActorTableData.FromString(data) for data in accessor.get_actor_table(None, None)]
    return [
        {
            "class": one.class_name,
            "name": one.name,
            "namespace": one.ray_namespace,
            "state": ActorTableData.ActorState.Name(one.state),
            "pid": one.pid,
            "node_id": one.address.node_id.hex(),
            "num_restarts": one.num_restarts,
            "max_restarts": one.max_restarts,
            "is_detached": one.is_detached,
            "group": one.placement_group_id.hex() if one.HasField("placement_group_id") else None,
            "resources": dict(one.required_resources),
        }
        for one in found
    ]


def groups_of(cluster: Any) -> dict[str, Any]:
    table: dict[str, Any] = cluster.global_state.placement_group_table()
    return {
        group: {"state": one["state"], "nodes": {str(index): node for index, node in one["bundles_to_node_id"].items()}}
        for group, one in table.items()
    }


if __name__ == "__main__":
    main()
