"""Addresses and socket files of the wire."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.transport_ends import introduce
from vllm_specbranch import addresses, transport
from vllm_specbranch.errors import SpecBranchError, WireError

pytestmark = pytest.mark.timeout(60)


def test_no_file_is_left(address: str) -> None:
    path = addresses.ipc_path(address)
    client = transport.connect(address)
    server = transport.bind(address)
    assert os.path.exists(path)
    introduce(client, server)
    server.close()
    assert not os.path.exists(path)
    client.close()
    assert os.listdir(os.path.dirname(path)) == []


def test_closing_spares_a_successors_file(address: str, bind: Callable) -> None:
    path = addresses.ipc_path(address)
    server = transport.bind(address)
    os.rename(path, path + ".old")
    successor = bind()
    server.close()
    assert os.path.exists(path)
    client = transport.connect(address)
    introduce(client, successor)
    client.close()


def test_closing_survives_a_missing_file_or_directory(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    server = transport.bind(f"ipc://{directory}/s")
    (directory / "s").unlink()
    directory.rmdir()
    server.close()


def test_stale_file_is_replaced(connect: Callable, bind: Callable, address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(addresses.ipc_path(address))
    assert os.path.exists(addresses.ipc_path(address))
    introduce(connect(), bind())


def test_live_server_is_not_replaced(connect: Callable, bind: Callable, address: str) -> None:
    server = bind()
    with pytest.raises(WireError, match="another server is listening there"):
        transport.bind(address)
    introduce(connect(), server)


def test_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(WireError, match="not a socket"):
        transport.bind(f"ipc://{path}")
    assert path.read_text() == "precious"


def test_missing_directory_is_a_wire_error(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="No such file or directory"):
        transport.bind(f"ipc://{tmp_path}/missing/s")


@pytest.mark.parametrize("open_end", [transport.connect, transport.bind])
@pytest.mark.parametrize(
    "bad",
    ["", "ipc://", "ipc://relative", "ipc://@abstract", "ipc://*", "/tmp/s", "ipc:///a\0b"],
)
def test_unusable_addresses_are_named(open_end: Callable[[str], object], bad: str) -> None:
    with pytest.raises(WireError, match="ipc:// and an absolute path"):
        open_end(bad)


@pytest.mark.parametrize("open_end", [transport.connect, transport.bind])
def test_too_long_paths_are_explained(open_end: Callable[[str], object], tmp_path: Path) -> None:
    path = f"{tmp_path}/".ljust(108, "x")
    with pytest.raises(SpecBranchError, match="has 108 bytes, a Unix socket's at most 107"):
        open_end(f"ipc://{path}")
    with pytest.raises(WireError, match="108 bytes"):
        open_end("ipc:///" + "é" * 53 + "x")


def test_longest_path_works(tmp_path: Path) -> None:
    address = "ipc://" + f"{tmp_path}/".ljust(addresses.MAX_IPC_PATH_BYTES, "x")
    server, client = transport.bind(address), transport.connect(address)
    introduce(client, server)
    client.close()
    server.close()
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_running_after_a_failed_bind(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(WireError):
            transport.bind(f"ipc://{tmp_path}/missing/s")
    assert len(os.listdir("/proc/self/fd")) <= before
