"""When a draft server under Ray is begun, given up and begun again, with a script in place of Ray's driver."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.processes import SLEEPER, assert_a_stopped_child_ends
from vllm_specbranch import ray_placement
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_model import DraftModelSettings
from vllm_specbranch.keys import load_server_keys, make_keys_for
from vllm_specbranch.messages import Hello, Ready
from vllm_specbranch.placement import EXIT_CONFIG
from vllm_specbranch.ray_messages import Ended, Order, Placed, TargetPlace
from vllm_specbranch.ray_placement import PlacedChannel, RayServer, Start
from vllm_specbranch.transport import ClientChannel, ServerEndpoint, bind, connect, memory_pair

MODEL = DraftModelSettings("draft", 64)
TARGET = TargetPlace("10.0.0.1:6379", "node-1", "abcd", {"env_vars": {"A": "b"}})
SOON_S = 20.0

# Does what each line of a file says, once per start; `die` ends it. What it was told lies beside that file.
DRIVER = """
import sys
plan, told = sys.argv[1], sys.argv[1] + ".told"
with open(told, "a") as stream:
    stream.write(sys.stdin.readline())
for number in sys.stdin:
    with open(told, "a") as stream:
        stream.write(number)
    for line in open(plan):
        if line.strip() == "die":
            sys.exit(3)
        print(line.strip().replace("NUMBER", number.strip()), flush=True)
"""


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


class Ray:
    """A server whose driver is the script, and what the script does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "driver.py").write_text(DRIVER)
        self.plan = folder / "plan"
        self.does()
        monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setattr(ray_placement, "driver_module", ("driver", str(self.plan)))
        self.clock = Clock()
        self.servers: list[RayServer] = []

    def does(self, *lines: str) -> None:
        self.plan.write_text("\n".join(lines))

    def places(self, address: str = "ipc:///tmp/none", **more: str) -> None:
        self.does(placed_line(address, **more))

    def server(self, on_cpu: bool = True, **settings: object) -> RayServer:
        config = SpecBranchConfig.from_user(
            {"model": "draft", "draft_placement": "ray", "draft_cpu_cores": [0], **settings}
        )
        self.servers.append(RayServer(config, MODEL, TARGET, on_cpu=on_cpu, clock=self.clock))
        return self.servers[-1]

    def order(self) -> Order:
        return msgspec.json.decode(self.told()[0], type=Order)

    def told(self) -> list[str]:
        path = Path(f"{self.plan}.told")
        return path.read_text().splitlines() if path.exists() else []


def placed_line(address: str, **more: str) -> str:
    line = msgspec.json.encode(Placed(0, address, 77, "node-2", **more)).decode()
    return line.replace('"number":0', '"number":NUMBER')


def ended_line(status: int | None) -> str:
    return msgspec.json.encode(Ended(0, "it has gone", status)).decode().replace('"number":0', '"number":NUMBER')


@pytest.fixture
def ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ray]:
    found = Ray(tmp_path, monkeypatch)
    yield found
    for server in found.servers:
        server.stop()


def test_what_is_asked_of_ray(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/models")
    secrets = (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_READ_TOKEN",
        "HF_token_2",
        "HF_API_KEY",
        "HF_SECRET",
        "HF_PASSWORD",
    )
    for name in secrets:
        monkeypatch.setenv(name, "hidden")
    ray.places()
    server = ray.server(draft_ray_num_cpus=3, draft_ray_resources={"fast": 0.5})
    assert not server.is_running()
    assert server.ensure_running()
    assert server.is_running() and not server.ensure_running(), "one at a time"
    wait_for(lambda: server.pid == 77)
    order = ray.order()
    assert order.resources == {"CPU": 3.0, "fast": 0.5}
    assert order.target == TARGET
    assert order.cores == (0,)
    assert order.environment["HF_HOME"] == "/models"
    assert not set(secrets) & set(order.environment)
    assert "hidden" not in ray.told()[0]
    assert order.config.draft_ray_resources == (("fast", 0.5),)
    assert Path(order.directory).stat().st_mode & 0o777 == 0o700
    assert len(order.client_key) == 40
    assert order.name in server.address
    assert order.name != ray.server().address, "each engine has its own"


@pytest.mark.parametrize(
    ("on_cpu", "settings", "expected"),
    [
        (True, {}, {"CPU": 1.0}),
        (False, {}, {"CPU": 1.0, "GPU": 1.0}),
        (False, {"draft_ray_num_gpus": 0.5, "draft_ray_num_cpus": 0}, {"GPU": 0.5}),
        (True, {"draft_ray_num_gpus": 1}, {"CPU": 1.0, "GPU": 1.0}),
    ],
)
def test_a_gpu_is_asked_for_where_the_target_has_one(
    ray: Ray, on_cpu: bool, settings: dict[str, object], expected: dict[str, float]
) -> None:
    server = ray.server(on_cpu, **settings)
    server.ensure_running()
    wait_for(lambda: len(ray.told()) == 2)
    assert ray.order().resources == expected


def test_a_server_that_has_gone_is_begun_again_by_the_same_driver_after_a_back_off(ray: Ray) -> None:
    ray.does(placed_line("ipc:///tmp/none"), ended_line(-9))
    server = ray.server()
    assert server.ensure_running()
    wait_for(lambda: not server.is_running())
    first = server.address
    assert not server.ensure_running(), "it waits"
    ray.places()
    ray.clock.now_s += 0.5
    assert server.ensure_running()
    wait_for(lambda: server.pid == 77)
    assert server.is_running()
    assert (server.num_starts, ray.told()[1:]) == (2, ["1", "2"])
    assert server.address != first and server.address.rpartition("#")[0] == first.rpartition("#")[0]


def test_a_driver_that_dies_takes_its_server_along_and_another_one_has_another_actor(ray: Ray) -> None:
    server = ray.server()
    waits = []
    ray.does("die")
    for _ in range(4):
        started_s = ray.clock.now_s
        while not server.ensure_running():
            ray.clock.now_s += 0.25
        waits.append(ray.clock.now_s - started_s)
        wait_for(lambda: not server.is_running())
    assert waits == [0.0, 0.5, 1.0, 2.0]
    names = [msgspec.json.decode(line, type=Order).name for line in ray.told()[::2]]
    assert len(set(names)) == 4


def test_a_server_that_does_not_answer_is_given_up_with_its_driver(ray: Ray) -> None:
    ray.places()
    server = ray.server()
    server.ensure_running()
    wait_for(lambda: server.pid == 77)
    driver = server._driver
    assert driver is not None
    server.kill()
    assert not server.is_running() and not server.ensure_running()
    assert driver.wait(SOON_S) == -9
    ray.clock.now_s += 0.5
    assert server.ensure_running()
    assert server.pid is None, "not placed yet"
    wait_for(lambda: server.pid == 77)
    assert server.is_running(), "what the first driver's end says is not about the second"


def test_settings_that_cannot_work_are_not_tried_again(ray: Ray, caplog: pytest.LogCaptureFixture) -> None:
    ray.does(placed_line("ipc:///tmp/none"), ended_line(EXIT_CONFIG))
    server = ray.server()
    server.ensure_running()
    wait_for(lambda: not server.is_running())
    ray.clock.now_s += 1000.0
    assert not server.ensure_running()
    assert server.is_hopeless
    assert sum("cannot work with these settings" in record.message for record in caplog.records) == 1


PARENT = f"""
from vllm_specbranch import ray_placement
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_model import DraftModelSettings
from vllm_specbranch.ray_messages import TargetPlace

ray_placement.driver_module = {SLEEPER}
config = SpecBranchConfig.from_user({{"model": "draft", "draft_placement": "ray"}})
server = ray_placement.RayServer(config, DraftModelSettings("draft", 64), TargetPlace("none"), on_cpu=True)
assert server.ensure_running()
child = server._driver
"""


def test_a_stopped_driver_does_not_outlive_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    # What the killed parent leaves there is the child's to remove, and the sleeper does not. Short enough for a socket's path.
    with tempfile.TemporaryDirectory(prefix="sb", dir="/tmp") as directory:
        monkeypatch.setenv("TMPDIR", directory)
        assert_a_stopped_child_ends(PARENT)


def test_a_refusal_and_a_stop_are_for_good(ray: Ray) -> None:
    for end in (lambda one: one.refused(True), lambda one: one.stop()):
        ray.places()
        server = ray.server()
        server.ensure_running()
        wait_for(lambda one=server: one.pid == 77)  # type: ignore[misc]
        driver, directory = server._driver, Path(ray.order().directory)
        assert driver is not None
        end(server)
        end(server)
        assert driver.poll() == 0, "it was told by its standard input, and ended by itself"
        assert not directory.exists()
        ray.clock.now_s += 1000.0
        assert not server.is_running() and not server.ensure_running()
        Path(f"{ray.plan}.told").unlink()


def test_what_cannot_be_launched_is_tried_again_later(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    server = ray.server()
    with monkeypatch.context() as patched:
        patched.setattr(ray_placement.subprocess, "Popen", refuse)
        assert not server.ensure_running()
        assert not server.is_running()
    assert not server.ensure_running()
    ray.clock.now_s += 0.5
    assert server.ensure_running()


def test_lines_that_are_no_reports_do_no_harm(ray: Ray) -> None:
    ray.does("", "Ray says hello", '{"type":"Placed"}', placed_line("ipc:///tmp/none"))
    server = ray.server()
    server.ensure_running()
    wait_for(lambda: server.pid == 77)
    assert server.is_running()


# --- the channel --------------------------------------------------------------------------------------------------------


def open_memory(ends: list[ServerEndpoint]) -> Callable[[Placed], ClientChannel]:
    def open_channel(_: Placed) -> ClientChannel:
        client, server = memory_pair()
        ends.append(server)
        return client

    return open_channel


def test_the_greeting_waits_for_the_place() -> None:
    start, ends = Start(1), list[ServerEndpoint]()
    channel = PlacedChannel(start, open_memory(ends))
    assert channel.send(Hello("1", 50, 100, False, None))
    assert channel.send(Hello("2", 50, 100, False, None))
    assert channel.recv(0.0) is None and channel.recv(5.0) is None
    assert channel.num_dropped == 0
    channel.drain()
    assert not ends
    start.take(Placed(1, "ipc:///tmp/none", 5, "node"))
    assert channel.recv(0.0) is None
    (server,) = ends
    received = server.recv(0.0)
    assert received is not None and received[1] == Hello("2", 50, 100, False, None), "the newest one"
    assert server.recv(0.0) is None
    server.send(received[0], Ready("2", 100, 8, 16))
    assert channel.recv(0.0) == Ready("2", 100, 8, 16)
    assert channel.send(Hello("3", 50, 100, False, None))
    assert len(ends) == 1
    channel.close()
    channel.close()
    assert not channel.send(Hello("4", 50, 100, False, None))


def test_a_closed_channel_connects_to_nothing() -> None:
    start, ends = Start(1), list[ServerEndpoint]()
    channel = PlacedChannel(start, open_memory(ends))
    channel.close()
    start.take(Placed(1, "ipc:///tmp/none", 5, "node"))
    assert not channel.send(Hello("1", 50, 100, False, None))
    assert channel.recv(0.0) is None
    assert not ends


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_server_is_reached_where_it_was_placed(ray: Ray, tmp_path: Path, with_keys: bool) -> None:
    """Over TCP only who has this engine's keys gets through; the secret one has never left the engine."""
    server = ray.server()
    keys, more = tmp_path / "keys", {}
    if with_keys:
        more["server_key"] = make_keys_for(keys, server._public_key).decode()
        endpoint = bind("tcp://127.0.0.1:0", load_server_keys(keys))
    else:
        endpoint = bind(f"ipc://{tmp_path}/s")
    strangers: list[ClientChannel] = []
    try:
        ray.places(endpoint.address, **more)
        server.ensure_running()
        channel = server.open_channel(server.address)
        hello = Hello("1", 50, 100, False, None)
        assert channel.send(hello)
        assert channel.recv(1.0) is None
        wait_for(lambda: channel.recv(10.0) is None and server.pid == 77)
        received = endpoint.recv(SOON_S * 1e3)
        assert received is not None and received[1] == hello
        endpoint.send(received[0], Ready("1", 100, 8, 16))
        assert channel.recv(SOON_S * 1e3) == Ready("1", 100, 8, 16)
        if with_keys:
            public, secret = zmq.curve_keypair()
            stranger = ray_placement.ClientKeys(public, secret, more["server_key"].encode())
            strangers.append(connect(endpoint.address, stranger))
            strangers[0].send(hello)
            assert endpoint.recv(500.0) is None
        channel.close()
    finally:
        for one in strangers:
            one.close()
        endpoint.close()
