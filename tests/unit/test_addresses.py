"""TCP addresses; those of Unix sockets are tested with the transport."""

import pytest

from vllm_specbranch.addresses import is_tcp, tcp_host_and_port
from vllm_specbranch.errors import WireError


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://127.0.0.1:5600", ("127.0.0.1", 5600)),
        ("tcp://draft-0.pool.svc:1", ("draft-0.pool.svc", 1)),
        ("tcp://[::1]:65535", ("::1", 65535)),
        ("tcp://[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_what_can_be_used(address: str, expected: tuple[str, int]) -> None:
    assert is_tcp(address)
    assert tcp_host_and_port(address) == expected
    assert tcp_host_and_port(address, to_bind=True) == expected


@pytest.mark.parametrize("address", ["tcp://*:0", "tcp://*:5600", "tcp://127.0.0.1:0"])
def test_what_can_only_be_bound(address: str) -> None:
    tcp_host_and_port(address, to_bind=True)
    with pytest.raises(WireError, match="allowed: tcp://host:port"):
        tcp_host_and_port(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "tcp://host",
        "tcp://:5600",
        "tcp://host:",
        "tcp://host:65536",
        "tcp://host:56000000",
        "tcp://host:-1",
        "tcp://host:1.5",
        "tcp://host:\u0661",
        "tcp://ho st:1",
        "tcp://host:1\n",
        "tcp://user@host:1",
        "tcp://source;host:1",
        "tcp://::1:80",
        "tcp://host:1/path",
        "udp://host:1",
        "host:1",
        "ipc:///tmp/s",
    ],
)
def test_what_cannot_be_used_is_named(address: str) -> None:
    with pytest.raises(WireError, match="cannot be used"):
        tcp_host_and_port(address, to_bind=True)
