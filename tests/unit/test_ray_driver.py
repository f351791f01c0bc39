"""What Ray is asked for, and what is told of it, with a fake in the place of Ray and of the draft server."""

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests import fake_ray
from tests.fake_ray import GROUP
from tests.model_paths import REPOSITORY
from tests.processes import is_gone
from vllm_specbranch import ray_driver
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_model import DraftModelSettings
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.keys import CLIENT_PUBLIC, load_server_keys
from vllm_specbranch.placement import ServerSpec
from vllm_specbranch.ray_actor import DraftActor, free_address
from vllm_specbranch.ray_cluster import check_ray, connected_address, target_place
from vllm_specbranch.ray_driver import RayDriver, choose_bundle
from vllm_specbranch.ray_messages import Ended, Order, Placed, Report, TargetPlace, read_report

CONFIG = SpecBranchConfig.from_user({"model": "draft", "draft_placement": "ray"})
KEY = "a" * 40
# Tells what it was told, and ends when its standard input does, or with the status that its file names.
SERVER = """
import os, sys, time
folder = sys.argv[1]
with open(folder + "/told", "a") as stream:
    stream.write(sys.stdin.readline())
with open(folder + "/environment", "w") as stream:
    stream.write(os.environ["OMP_NUM_THREADS"] + " " + os.environ.get("HF_HOME", ""))
if os.path.exists(folder + "/status"):
    sys.exit(int(open(folder + "/status").read()))
sys.stdin.read()
"""


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> fake_ray.Ray:
    return fake_ray.install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "draft_stand_in.py").write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def order(folder: Path, target: TargetPlace | None = None, **changes: Any) -> Order:
    wanted = Order(
        name="draft-x-1",
        target=target or TargetPlace("10.0.0.1:6379", "node-1"),
        resources={"CPU": 2.0, "fast": 1.0},
        directory=str(folder),
        client_key=KEY,
        cores=(0, 1, 2),
        on_cpu=True,
        environment={"HF_HOME": "/models"},
        module=("draft_stand_in", str(folder)),
        model=DraftModelSettings("draft", 64),
        config=CONFIG,
    )
    return msgspec.structs.replace(wanted, **changes)


class Reports(io.BytesIO):
    def all(self) -> list[Report]:
        return [read_report(line) for line in self.getvalue().splitlines()]

    def wait_for(self, number: int) -> list[Report]:
        until = time.monotonic() + 20.0
        while len(self.all()) < number:
            assert time.monotonic() < until
            time.sleep(0.01)
        return self.all()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# --- the driver ---------------------------------------------------------------------------------------------------------


def test_the_bundle_is_one_with_room_best_on_the_targets_node_and_at_the_end() -> None:
    nodes = {0: "a", 1: "a", 2: "b", 3: "a", 4: "b"}

    def choose(free: dict[str, dict[str, float]], **needs: float) -> int | None:
        return choose_bundle(needs, nodes, free, "g", "a")

    room = {
        "a": {"CPU": 9.0, "CPU_group_0_g": 1.0, "CPU_group_1_g": 1.0, "CPU_group_3_g": 0.5, "GPU_group_0_g": 1.0},
        "b": {"CPU_group_2_g": 2.0, "CPU_group_4_g": 2.0, "CPU_group_4_h": 4.0},
    }
    assert choose(room, CPU=1.0) == 1
    assert choose(room, CPU=0.5) == 3
    assert choose(room, CPU=1.0, GPU=0.5) == 0
    assert choose(room, CPU=2.0) == 4, "another node has room"
    assert choose(room, CPU=3.0) is None, "nor does what is free outside the group count, or in another one"
    assert choose(room) == 3
    assert choose({}, CPU=1.0) is None


def test_the_actor_is_named_restarted_and_in_the_group(ray: fake_ray.Ray, folder: Path) -> None:
    ray.bundles, ray.free = (
        {0: "node-1", 1: "node-1"},
        {"node-1": {f"CPU_group_1_{GROUP}": 2, f"fast_group_1_{GROUP}": 1}},
    )
    (folder / "status").write_text("0")
    target = TargetPlace("10.0.0.1:6379", "node-1", GROUP, {"env_vars": {"A": "b"}})
    reports = Reports()
    driver = RayDriver(order(folder, target), reports)
    driver.join()
    driver.start(1)
    reports.wait_for(2)
    (options,) = ray.options
    assert options == {
        "name": "draft-x-1",
        "namespace": "specbranch",
        "max_restarts": -1,
        "max_concurrency": 2,
        "num_cpus": 2.0,
        "num_gpus": 0,
        "resources": {"fast": 1.0},
        "scheduling_strategy": ("bundle", GROUP, 1),
        "runtime_env": {"env_vars": {"A": "b"}},
    }
    ((address, _),) = ray.inits
    assert address == "10.0.0.1:6379"


@pytest.mark.parametrize("group", [None, GROUP])
def test_without_a_group_or_room_in_it_the_actor_goes_to_the_targets_node_if_it_can(
    ray: fake_ray.Ray, folder: Path, group: str | None
) -> None:
    ray.bundles = {0: "node-1"}
    (folder / "status").write_text("0")
    reports = Reports()
    driver = RayDriver(order(folder, TargetPlace("10.0.0.1:6379", None, group)), reports)
    driver.join()
    driver.start(1)
    reports.wait_for(2)
    strategy = ray.options[0]["scheduling_strategy"]
    assert strategy == ("node", "node-1", True, True), "the driver's, where no other is known; another if that is full"
    assert "runtime_env" not in ray.options[0]


def test_a_cluster_is_started_only_where_there_is_none(
    ray: fake_ray.Ray, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ray.is_running = False
    RayDriver(order(folder, TargetPlace()), Reports()).join()
    ((address, options),) = ray.inits
    assert address == "local"
    assert options["resources"] == {"fast": 1.0}, "or it could never be placed"
    assert sum("Ray was not running" in record.message for record in caplog.records) == 1
    ray.is_running = True
    RayDriver(order(folder, TargetPlace()), Reports()).join()
    assert ray.inits[1][0] == "auto"
    ray.is_running = False
    RayDriver(order(folder, TargetPlace("10.0.0.1:6379")), Reports()).join()
    assert ray.inits[2][0] == "10.0.0.1:6379", "the engine's own, or none"


def test_the_end_of_a_draft_server_and_the_failure_of_an_actor_are_told(ray: fake_ray.Ray, folder: Path) -> None:
    (folder / "status").write_text("78")
    reports = Reports()
    driver = RayDriver(order(folder), reports)
    driver.join()
    driver.start(1)
    placed, ended = reports.wait_for(2)
    assert isinstance(placed, Placed) and (placed.number, placed.node_id) == (1, "node-1")
    assert ended == Ended(1, "it ended with status 78", 78)
    ray.failures = [fake_ray.RayError("the actor died\nbecause")]
    driver.start(2)
    assert reports.wait_for(3)[2] == Ended(2, "RayError: the actor died")
    assert len(ray.options) == 1, "found again by its name"


def test_a_failure_of_any_kind_is_told(
    ray: fake_ray.Ray, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise AttributeError("Ray has no such table\nany more")

    reports = Reports()
    driver = RayDriver(order(folder), reports)
    driver.join()
    monkeypatch.setattr(driver, "_strategy", fail)
    driver.start(1)
    assert reports.wait_for(1) == [Ended(1, "AttributeError: Ray has no such table")]
    assert sum("AttributeError" in record.message and record.exc_info is not None for record in caplog.records) == 1


def test_an_actor_that_ray_restarts_just_now_is_asked_again(
    ray: fake_ray.Ray, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "status").write_text("0")
    ray.failures = [fake_ray.ActorUnavailableError("restarting"), fake_ray.ActorUnavailableError("restarting")]
    reports = Reports()
    driver = RayDriver(order(folder), reports)
    driver.join()
    driver.start(7)
    assert [type(one) for one in reports.wait_for(2)] == [Placed, Ended]
    monkeypatch.setattr(ray_driver, "PATIENCE_S", 0.0)
    ray.failures = [fake_ray.ActorUnavailableError("restarting") for _ in range(3)]
    driver.start(8)
    assert reports.wait_for(3)[2] == Ended(8, "ActorUnavailableError: restarting")


def test_leaving_ends_the_actor_and_waits_for_nobody(
    ray: fake_ray.Ray, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "status").write_text("0")
    reports = Reports()
    driver = RayDriver(order(folder), reports)
    driver.leave()
    assert ray.killed == 0, "nothing was joined yet"
    driver.join()
    driver.start(1)
    reports.wait_for(2)
    driver.leave()
    assert ray.killed == 1
    hangs = threading.Event()
    monkeypatch.setattr(sys.modules["ray"], "shutdown", lambda: hangs.wait(60.0))
    monkeypatch.setattr(ray_driver, "LEAVE_TIMEOUT_S", 0.05)
    driver.leave()
    assert ray.killed == 2
    hangs.set()


# The driver, without a cluster: notes what it is told, and that it has left.
DRIVER = """
import sys
from pathlib import Path
from vllm_specbranch import ray_driver
notes = Path(sys.argv[1])

def note(what):
    with notes.open("a") as stream:
        stream.write(what)

class Driver:
    def __init__(self, order, reports):
        note(order.name + ";")
    def join(self):
        pass
    def start(self, number):
        note(f"{number};")
    def leave(self):
        note("left;")

ray_driver.PARENT_CHECK_S = 0.1
ray_driver.RayDriver = Driver
ray_driver.main()
"""
# Begins the driver with its own standard input, and stays.
PARENT = """
import signal, subprocess, sys
print(subprocess.Popen([sys.executable, *sys.argv[1:]]).pid, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("gone", ["the line", "the parent"])
def test_the_driver_ends_with_the_line_or_the_parent(folder: Path, gone: str) -> None:
    """This test holds the other end of the line, as a fork of the parent might when the parent has died."""
    notes, script = folder / "notes", folder / "driver.py"
    script.write_text(DRIVER)
    command = [sys.executable, "-c", PARENT, str(script), str(notes)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        parent.stdin.write(msgspec.json.encode(order(folder)) + b"\n1\n2\n")
        parent.stdin.flush()
        driver = int(parent.stdout.readline())
        try:
            wait_for(lambda: notes.exists() and notes.read_text() == "draft-x-1;1;2;")
            # A few looks at the parent.
            time.sleep(0.3)
            assert notes.read_text() == "draft-x-1;1;2;", "it stays while it has both"
            if gone == "the line":
                parent.stdin.close()
            else:
                parent.kill()
            wait_for(lambda: is_gone(driver))
            assert notes.read_text() == "draft-x-1;1;2;left;"
        finally:
            parent.kill()


# --- the actor ----------------------------------------------------------------------------------------------------------


def serve(actor: DraftActor, number: int) -> Placed:
    return msgspec.json.decode(actor.serve(number), type=Placed)


def told(folder: Path, number: int) -> ServerSpec:
    path = folder / "told"
    wait_for(lambda: path.exists() and len(path.read_bytes().splitlines()) == number)
    return ServerSpec.from_json(path.read_bytes().splitlines()[-1])


def test_beside_the_target_the_draft_server_listens_in_the_engines_directory(ray: fake_ray.Ray, folder: Path) -> None:
    actor = DraftActor(msgspec.json.encode(order(folder)))
    placed = serve(actor, 3)
    spec = told(folder, 1)
    assert placed.address == spec.address == f"ipc://{folder}/draft-3.sock"
    assert (placed.server_key, spec.keys) == (None, None)
    assert spec.cores == (0, 1, 2)
    assert (spec.model.model, spec.config) == ("draft", CONFIG)
    wait_for(lambda: (folder / "environment").exists() and (folder / "environment").read_text() == "3 /models")
    # The first has to make room for the second.
    again = serve(actor, 4)
    assert again.pid != placed.pid and again.address != placed.address
    told(folder, 2)
    actor._end_server()
    assert actor.outcome() == 0


@pytest.mark.parametrize("reason", ["another node", "another machine"])
def test_elsewhere_it_listens_on_tcp_and_admits_this_engine_only(ray: fake_ray.Ray, folder: Path, reason: str) -> None:
    if reason == "another node":
        ray.node_id = "node-2"
        actor = DraftActor(msgspec.json.encode(order(folder)))
    else:
        actor = DraftActor(msgspec.json.encode(order(folder, directory="/nonexistent")))
    placed = serve(actor, 1)
    spec = told(folder, 1)
    assert placed.address == spec.address and placed.address.startswith("tcp://127.0.0.1:")
    assert spec.keys is not None and placed.server_key is not None
    assert load_server_keys(spec.keys).public.decode() == placed.server_key
    assert KEY in (Path(spec.keys) / CLIENT_PUBLIC).read_text()
    assert spec.cores is None, "core numbers of the target's node mean nothing here"
    wait_for(lambda: (folder / "environment").exists() and (folder / "environment").read_text() == "2 /models")
    actor._end_server()
    assert not Path(spec.keys).exists()


def test_cores_that_the_user_names_hold_on_every_node(ray: fake_ray.Ray, folder: Path) -> None:
    ray.node_id = "node-2"
    config = SpecBranchConfig.from_user({"model": "draft", "draft_placement": "ray", "draft_cpu_cores": [5]})
    actor = DraftActor(msgspec.json.encode(order(folder, config=config)))
    serve(actor, 1)
    assert told(folder, 1).cores == (5,)
    actor._end_server()


def test_an_address_of_either_family() -> None:
    assert free_address("127.0.0.1").startswith("tcp://127.0.0.1:")
    assert free_address("::1").startswith("tcp://[::1]:")


# --- what the engine knows of Ray ---------------------------------------------------------------------------------------


def test_the_targets_place_is_what_vllm_and_ray_say(ray: fake_ray.Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    given = SimpleNamespace(id=SimpleNamespace(hex=lambda: "cd"))
    runtime_env = SimpleNamespace(to_dict=lambda: {"pip": ["x"]})
    parallel = SimpleNamespace(placement_group=given, ray_runtime_env=runtime_env)
    connected = target_place(parallel, "recorded:1")
    assert connected == TargetPlace("10.0.0.1:6379", "node-1", "cd", {"pip": ["x"]})
    parallel = SimpleNamespace(placement_group=None, ray_runtime_env=None)
    assert target_place(parallel, None).placement_group == GROUP
    monkeypatch.setattr(sys.modules["ray"], "is_initialized", lambda: False)
    assert connected_address() is None
    assert target_place(parallel, "recorded:1") == TargetPlace("recorded:1")
    monkeypatch.delitem(sys.modules, "ray")
    assert target_place(parallel, None) == TargetPlace(), "nor is Ray imported for this"
    assert "ray" not in sys.modules


def test_ray_must_be_installed_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ray()
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda _: None))
    monkeypatch.setattr("vllm_specbranch.ray_cluster.importlib", nothing)
    with pytest.raises(ConfigError, match=r"vllm-specbranch\[ray\]") as caught:
        check_ray()
    assert caught.value.field == "draft_placement"
