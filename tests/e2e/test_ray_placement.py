"""A draft server under a real Ray, of two nodes on this machine: everything real but the draft model and the engine."""

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeDraftModel
from tests.processes import is_gone
from tests.ray_cluster import RayCluster, ray_cluster
from tests.remote_engine import Engine
from vllm_specbranch import placement
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_link import DraftLink
from vllm_specbranch.draft_model import DraftModelSettings
from vllm_specbranch.keys import SERVER_SECRET
from vllm_specbranch.messages import Draft
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.ray_messages import TargetPlace
from vllm_specbranch.ray_placement import RayServer

SETTINGS = {"model": "fake", "num_speculative_tokens": 4, "on_miss": "wait:1", "draft_placement": "ray"}
SOON_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster({"num_cpus": 4}, {"num_cpus": 2, "resources": {"draft_node": 1}}) as found:
        yield found


class RayEngine(Engine):
    """What the proposer does with its line to a draft server under Ray."""

    def __init__(self, target: TargetPlace, **settings: Any) -> None:
        config = SpecBranchConfig.from_user(SETTINGS | settings)
        self.server = RayServer(config, DraftModelSettings("fake", 1000), target, on_cpu=True)
        self.counters = EngineCounters()
        self.link = DraftLink(
            self.server,
            vocab_size=50,
            max_model_len=1000,
            counters=self.counters,
            open_channel=self.server.open_channel,
        )
        self.model = FakeDraftModel(1, 1)
        self.tokens = [0, 1, 2]
        self.num_accepted = 0
        self._draft: list[int] = []
        self._generation = 0
        self._is_known = False
        self._round = 0

    def step(self) -> Draft | None:
        """An engine step; without a draft server only a look at the line, or the request would outgrow the next one's blocks."""
        if self.link.is_up:
            return super().step()
        self.link.poll()
        return None


MakeEngine = Callable[..., RayEngine]


@pytest.fixture
def make_engine(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    with engines_of(cluster, monkeypatch) as make:
        yield make
    wait_until(lambda: not cluster.draft_actors())


@contextlib.contextmanager
def engines_of(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeEngine]:
    """Makes engines on this cluster; all are closed at the end."""
    monkeypatch.setattr(placement, "server_module", ("tests.fake_draft_main",))
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    engines = []

    def make(group: str | None = None, **settings: Any) -> RayEngine:
        engines.append(RayEngine(TargetPlace(cluster.address, placement_group=group), **settings))
        return engines[-1]

    try:
        yield make
    finally:
        for engine in engines:
            engine.link.close()


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_actor_on_another_node_is_reached_with_keys_and_survives_the_death_of_its_process(
    cluster: RayCluster, make_engine: MakeEngine
) -> None:
    engine = make_engine(draft_ray_resources={"draft_node": 1}, draft_ray_num_cpus=2)
    engine.draft()
    first = cluster.wait_for_draft_actor(lambda _: True)
    assert first["node_id"] == cluster.node_ids[1]
    assert first["namespace"] == "specbranch" and first["name"] in engine.server.address
    assert (first["max_restarts"], first["is_detached"]) == (-1, False)
    assert first["resources"] == {"CPU": 2.0, "draft_node": 1.0}
    placed = engine.server._start.placed
    assert placed is not None and placed.address.startswith("tcp://") and placed.server_key is not None
    (keys,) = Path(tempfile.gettempdir()).glob(f"specbranch-{first['pid']}-*")
    assert keys.stat().st_mode & 0o777 == 0o700
    assert (keys / SERVER_SECRET).stat().st_mode & 0o777 == 0o600

    draft_server = placed.pid
    os.kill(first["pid"], signal.SIGKILL)
    engine.run_until(lambda: not engine.link.is_up)
    num_tokens = len(engine.tokens)
    engine.draft()
    assert len(engine.tokens) > num_tokens
    second = cluster.wait_for_draft_actor(lambda actor: actor["num_restarts"] == 1)
    assert second["name"] == first["name"] and second["pid"] != first["pid"]
    assert second["node_id"] == cluster.node_ids[1]
    assert engine.counters.num_server_deaths == 1 and engine.counters.num_server_starts == 2
    wait_until(lambda: is_gone(draft_server) and not keys.exists())


def test_an_actor_in_the_targets_group_is_reached_by_a_socket_of_the_engines(
    cluster: RayCluster, make_engine: MakeEngine
) -> None:
    group = cluster.make_group({"CPU": 1}, {"CPU": 1}, {"CPU": 0.5})
    engine = make_engine(group)
    engine.draft()
    actor = cluster.wait_for_draft_actor(lambda _: True)
    assert actor["group"] == group
    nodes = cluster.state()["groups"][group]["nodes"]
    assert actor["resources"][f"CPU_group_1_{group}"] == 1.0, "the last bundle with room"
    assert actor["node_id"] == nodes["1"] == cluster.node_ids[0]
    placed = engine.server._start.placed
    assert placed is not None and placed.address.startswith("ipc://") and placed.server_key is None
    directory = Path(placed.address.removeprefix("ipc://")).parent
    assert directory.stat().st_mode & 0o777 == 0o700
    pids = [actor["pid"], placed.pid]
    engine.link.close()
    wait_until(lambda: all(map(is_gone, pids)))
    assert not directory.exists()


def test_a_group_without_room_leaves_the_actor_beside_the_target(cluster: RayCluster, make_engine: MakeEngine) -> None:
    group = cluster.make_group({"CPU": 0.5})
    engine = make_engine(group)
    engine.draft()
    actor = cluster.wait_for_draft_actor(lambda _: True)
    assert actor["group"] is None
    assert actor["node_id"] == cluster.node_ids[0]


def test_a_full_node_of_the_targets_sends_the_actor_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node could have it by what it has in all, so Ray would wait there for as long as the others stay."""
    with ray_cluster({"num_cpus": 4}, {"num_cpus": 2}) as cluster, engines_of(cluster, monkeypatch) as make_engine:
        group = cluster.make_group({"CPU": 4})
        assert cluster.state()["groups"][group]["nodes"] == {"0": cluster.node_ids[0]}
        engine = make_engine()
        engine.draft()
        actor = cluster.wait_for_draft_actor(lambda _: True)
        assert actor["node_id"] == cluster.node_ids[1]
        placed = engine.server._start.placed
        assert placed is not None and placed.address.startswith("tcp://")


def test_nothing_is_left_of_an_engine_whose_driver_dies_and_the_next_begins_anew(
    cluster: RayCluster, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    engine.draft()
    first = cluster.wait_for_draft_actor(lambda _: True)
    draft_server = engine.server.pid
    assert draft_server is not None and engine.server._driver is not None
    os.kill(engine.server._driver.pid, signal.SIGKILL)
    engine.run_until(lambda: not engine.link.is_up)
    engine.draft()
    wait_until(lambda: is_gone(first["pid"]) and is_gone(draft_server))
    second = cluster.wait_for_draft_actor(lambda _: True)
    assert second["name"] != first["name"]


def test_a_draft_server_that_hangs_is_begun_anew(
    cluster: RayCluster, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RayServer, "longest_silence_s", 1.0)
    engine = make_engine()
    engine.draft()
    draft_server = engine.server.pid
    assert draft_server is not None
    os.kill(draft_server, signal.SIGSTOP)
    engine.run_until(lambda: engine.server.pid not in (None, draft_server))
    engine.draft()
    wait_until(lambda: is_gone(draft_server))


def longest_poll_s(engine: RayEngine, for_s: float) -> float:
    """How long an engine step without a draft server takes at most."""
    longest_s = 0.0
    until = time.monotonic() + for_s
    while time.monotonic() < until:
        before_s = time.monotonic()
        engine.step()
        longest_s = max(longest_s, time.monotonic() - before_s)
        assert not engine.link.is_up
        time.sleep(0.002)
    return longest_s


@pytest.mark.long
def test_engines_outlive_the_draft_servers_node_and_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"num_cpus": 2, "resources": {"draft_node": 1}}
    with ray_cluster({"num_cpus": 4}, node) as cluster, engines_of(cluster, monkeypatch) as make_engine:
        # How long Ray's drivers look for a cluster that is gone; a minute is usual.
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
        engine = make_engine(draft_ray_resources={"draft_node": 1})
        engine.draft()
        first = cluster.wait_for_draft_actor(lambda _: True)
        draft_server = engine.server.pid
        assert first["node_id"] == cluster.node_ids[1] and draft_server is not None
        cluster.kill_node(1)
        engine.run_until(lambda: not engine.link.is_up)
        wait_until(lambda: is_gone(first["pid"]) and is_gone(draft_server))
        assert longest_poll_s(engine, for_s=5.0) < 1.0, "no node has what the actor needs: the engine waits for none"
        added = cluster.add_node(node)
        engine.draft()
        second = cluster.wait_for_draft_actor(lambda _: True)
        draft_server, driver = engine.server.pid, engine.server._driver
        assert second["node_id"] == added and draft_server is not None and driver is not None

        cluster.close()
        engine.run_until(lambda: not engine.link.is_up)
        num_starts = engine.server.num_starts
        assert longest_poll_s(engine, for_s=8.0) < 1.0
        wait_until(lambda: is_gone(second["pid"]) and is_gone(draft_server) and is_gone(driver.pid))
        engine.run_until(lambda: engine.server.num_starts > num_starts)
