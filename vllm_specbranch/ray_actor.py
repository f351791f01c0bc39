"""The actor that a draft server runs under: Ray gives it its place, and another process when it dies.

Owns the draft server's process on its node, and what that needs there: a socket in the engine's directory on the same machine, a
port and keys elsewhere. Runs in a process of Ray's. Whatever ends that process closes the draft server's standard input, which ends
the draft server as well (see `draft_main`).
"""

import contextlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

import msgspec

from vllm_specbranch.keys import make_keys_for
from vllm_specbranch.placement import ServerSpec, launch, make_private_directory
from vllm_specbranch.ray_messages import Order, Placed

END_TIMEOUT_S = 5.0


class DraftActor:
    """Starts a draft server, and knows when it ends. Needs two threads: `outcome` takes one until the server has ended.

    Args:
        order: an `Order`, as JSON.
    """

    def __init__(self, order: bytes) -> None:
        self._order = msgspec.json.decode(order, type=Order)
        self._server: subprocess.Popen[bytes] | None = None
        self._keys: Path | None = None

    def serve(self, number: int) -> bytes:
        """Start a draft server, in the place of one that was there; returns `Placed` as JSON. Does not wait until it is ready.

        Args:
            number: of the start.
        """
        import ray

        self._end_server()
        node_id = ray.get_runtime_context().get_node_id()
        is_beside_target = node_id == self._order.target.node_id and self._can_enter(Path(self._order.directory))
        server_key = None
        if is_beside_target:
            address = f"ipc://{self._order.directory}/draft-{number}.sock"
        else:
            self._keys = make_private_directory()
            server_key = make_keys_for(self._keys, self._order.client_key.encode()).decode()
            address = free_address(ray.util.get_node_ip_address())
        cores = self._order.cores if is_beside_target else self._order.config.draft_cpu_cores
        keys = str(self._keys) if self._keys else None
        spec = ServerSpec(address, cores, self._order.model, self._order.config, keys)
        self._server = launch(spec, self._threads(cores), self._order.environment, self._order.module)
        return msgspec.json.encode(Placed(number, address, self._server.pid, node_id, server_key))

    def outcome(self) -> int:
        """The exit status of the draft server that was started last, once it has ended."""
        assert self._server is not None
        # Its standard input is closed with it.
        with self._server as server:
            return server.wait()

    def _threads(self, cores: tuple[int, ...] | None) -> dict[str, str]:
        if not self._order.on_cpu:
            return {}
        return {"OMP_NUM_THREADS": str(len(cores) if cores else max(1, int(self._order.resources.get("CPU", 1))))}

    def _can_enter(self, directory: Path) -> bool:
        """Whether the engine's private directory is here and ours: same machine, same user."""
        try:
            return directory.stat().st_uid == os.getuid()
        except OSError:
            return False

    def _end_server(self) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._server.stdin.close()
            try:
                self._server.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
        if self._keys is not None:
            shutil.rmtree(self._keys, ignore_errors=True)
            self._keys = None


def free_address(host: str) -> str:
    """An address on this host that nobody listens at. Should somebody else be quicker, the draft server ends and is begun anew."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}"
