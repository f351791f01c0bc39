"""Addresses of draft servers: what they look like, and which cannot be used. Pure; any process.

ipc:///run/user/1000/specbranch-x/draft.sock     a Unix socket, of a server that the engine starts itself
tcp://10.0.0.7:5600, tcp://[::1]:5600            a server on its own; the port 0 takes any, `*` any interface (to bind only)
"""

import os
import re

from vllm_specbranch.errors import WireError

MAX_IPC_PATH_BYTES = 107  # sockaddr_un.sun_path is 108 bytes on Linux, one of them the terminating zero.
MAX_PORT = 65535

# A name or a number, or an IPv6 number in brackets (with a zone, perhaps); libzmq's own extras (`source;target`) are not for here.
_TCP = re.compile(
    r"tcp://(?P<host>\*|[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?\]):(?P<port>[0-9]{1,5})"
)


def is_tcp(address: str) -> bool:
    """Whether an address is meant for TCP, usable or not."""
    return address.startswith("tcp://")


def ipc_path(address: str) -> str:
    """The path of an `ipc://` address.

    Raises:
        WireError: it is not `ipc://` and an absolute path, or the path is too long for a Unix socket.
    """
    scheme, separator, path = address.partition("://")
    if (scheme, separator) != ("ipc", "://") or not path.startswith("/") or "\0" in path:
        raise WireError(f"address {address!r} cannot be used; allowed: ipc:// and an absolute path, or tcp://host:port")
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_IPC_PATH_BYTES:
        raise WireError(
            f"address {address!r} cannot be used: its path has {num_bytes} bytes, a Unix socket's at most "
            f"{MAX_IPC_PATH_BYTES}; choose a shorter directory"
        )
    return path


def tcp_host_and_port(address: str, *, to_bind: bool = False) -> tuple[str, int]:
    """The parts of a `tcp://` address, an IPv6 number without its brackets.

    Args:
        to_bind: whether the port 0 (any) and the host `*` (every interface) are allowed.

    Raises:
        WireError: it is not `tcp://host:port`.
    """
    found = _TCP.fullmatch(address)
    port = int(found["port"]) if found else 0
    if found is None or port > MAX_PORT or (not to_bind and (port == 0 or found["host"] == "*")):
        allowed = "tcp://host:port" + (", with * for every interface and 0 for any port" if to_bind else "")
        raise WireError(f"address {address!r} cannot be used; allowed: {allowed}")
    return found["host"].strip("[]"), port
