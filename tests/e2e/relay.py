"""A TCP relay that spoils what passes: it delays, holds, thins, changes, cuts, and puts garbage in. For tests and a benchmark.

Owns both ends: the relay, a process of its own with a thread per direction of each connection, and `Relay`, by which another
process starts it and tells it what to do. Knows bytes, not messages.

    python -m tests.e2e.relay LISTEN_HOST:PORT SERVER_HOST:PORT [SEED]     the port 0 takes any

It says `ready PORT`, then obeys the commands on its standard input, a line of JSON each, and answers `ok` when one is in force:

    {"conditions": {"delay_s": 0.01}}       from now on; what is not named is as without the relay
    {"cut": true}                           end all connections
    {"inject": "00ff", "to": "server"}      these bytes, in hexadecimal, between two pieces of what passes on every connection

It ends with its standard input, so it outlives nobody.
"""

import contextlib
import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[2]
CONNECT_TIMEOUT_S = 2.0
PIECE_BYTES = 1 << 16
# Beyond this a sender is no longer listened to, as with a full socket.
MOST_WAITING_BYTES = 1 << 22
# How soon a change of the conditions is noticed.
IDLE_S = 0.01

Side = Literal["server", "client"]


@dataclass(frozen=True)
class Conditions:
    """What happens to what passes, each way.

    Attributes:
        delay_s: how much later it arrives; order is kept, and many pieces may be on their way.
        bytes_per_s: how much may pass; 0 for no limit.
        is_held: nothing passes, and connections stay: a host that is gone.
        is_refusing: new connections are ended at once.
        flip_share: share of the pieces of which a bit is changed.
    """

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    is_held: bool = False
    is_refusing: bool = False
    flip_share: float = 0.0


class _Direction(threading.Thread):
    """Passes on what comes from one socket to another, until either ends."""

    def __init__(self, owner: "_Server", source: socket.socket, sink: socket.socket, seed: int) -> None:
        super().__init__(daemon=True)
        self._owner = owner
        self._source = source
        self._sink = sink
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._random = random.Random(seed)
        self._free_s = 0.0
        self._has_ended = False
        self.way_back: _Direction | None = None
        self.is_done = False

    def run(self) -> None:
        """Until the source has ended and all that it sent is delivered, or a socket breaks."""
        try:
            while not self._has_ended or self._waiting:
                self._turn()
            self._sink.shutdown(socket.SHUT_WR)
            is_broken = False
        except (OSError, ValueError):
            is_broken = True
        self.is_done = True
        if is_broken or (self.way_back is not None and self.way_back.is_done):
            end(self._source)
            end(self._sink)

    def inject(self, data: bytes) -> None:
        """Put bytes before what is delivered next; from any thread."""
        self._waiting.appendleft((0.0, data))

    def _turn(self) -> None:
        conditions = self._owner.conditions
        wait_s = IDLE_S
        while self._waiting and not conditions.is_held:
            due_s = max(self._waiting[0][0], self._free_s)
            if due_s > (now_s := time.perf_counter()):
                wait_s = min(wait_s, due_s - now_s)
                break
            self._deliver(self._waiting.popleft()[1], conditions)
        has_room = sum(len(data) for _, data in self._waiting) < MOST_WAITING_BYTES
        sources = [self._source] if has_room and not self._has_ended else []
        readable, _, _ = select.select(sources, [], [], wait_s)
        if readable:
            data = self._source.recv(PIECE_BYTES)
            self._has_ended = not data
            self._waiting.append((time.perf_counter() + conditions.delay_s, data))

    def _deliver(self, data: bytes, conditions: Conditions) -> None:
        if data and self._random.random() < conditions.flip_share:
            changed = bytearray(data)
            changed[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            data = bytes(changed)
        self._sink.sendall(data)
        if conditions.bytes_per_s:
            self._free_s = time.perf_counter() + len(data) / conditions.bytes_per_s


class _Server:
    """The relay itself."""

    def __init__(self, listener: socket.socket, server: tuple[str, int], seed: int) -> None:
        self.conditions = Conditions()
        self._listener = listener
        self._server = server
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._pairs: list[dict[Side, _Direction]] = []
        self._sockets: list[socket.socket] = []

    def accept_all(self) -> None:
        """Take every connection and pass it on; for a thread of its own."""
        while True:
            client, _ = self._listener.accept()
            if self.conditions.is_refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(self._server, CONNECT_TIMEOUT_S)
            except OSError:
                client.close()
                continue
            self._relay(client, server)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        for one in (client, server):
            one.settimeout(None)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair: dict[Side, _Direction] = {
            "server": _Direction(self, client, server, self._random.randrange(1 << 30)),
            "client": _Direction(self, server, client, self._random.randrange(1 << 30)),
        }
        pair["server"].way_back, pair["client"].way_back = pair["client"], pair["server"]
        with self._lock:
            self._pairs = [one for one in self._pairs if any(thread.is_alive() for thread in one.values())]
            self._pairs.append(pair)
            self._sockets = [one for one in self._sockets if one.fileno() >= 0] + [client, server]
        for thread in pair.values():
            thread.start()

    def obey(self, command: dict[str, Any]) -> None:
        """Do what a line of the standard input says; see the module."""
        if "conditions" in command:
            self.conditions = Conditions(**command["conditions"])
        if command.get("cut"):
            with self._lock:
                for one in self._sockets:
                    end(one)
                self._sockets.clear()
        if "inject" in command:
            with self._lock:
                for pair in self._pairs:
                    pair[command["to"]].inject(bytes.fromhex(command["inject"]))


def end(one: socket.socket) -> None:
    """End a connection; whoever waits on it in another thread wakes up."""
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def parse_place(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`."""
    host, _, port = text.rpartition(":")
    return host, int(port)


def main(argv: Sequence[str]) -> None:
    """Relay until the standard input ends."""
    listener = socket.create_server(parse_place(argv[0]))
    server = _Server(listener, parse_place(argv[1]), int(argv[2]) if len(argv) > 2 else 0)
    threading.Thread(target=server.accept_all, daemon=True).start()
    sys.stdout.write(f"ready {listener.getsockname()[1]}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        server.obey(json.loads(line))
        sys.stdout.write("ok\n")
        sys.stdout.flush()
    os._exit(0)


class Relay:
    """A relay in a process of its own, as the one who started it sees it. Use as a context manager. One thread.

    Args:
        server: `HOST:PORT` of whom it passes things on to; nobody has to be there yet.
        host: where it listens, at any free port.
        seed: of what it changes.
    """

    def __init__(self, server: str, host: str = "127.0.0.1", seed: int = 0) -> None:
        command = [sys.executable, "-m", "tests.e2e.relay", f"{host}:0", server, str(seed)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
        )
        assert self._process.stdout is not None
        word, port = self._process.stdout.readline().split()
        assert word == "ready"
        self.address = f"tcp://{host}:{port}"

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set(self, conditions: Conditions) -> None:
        """What happens to all that passes from now on."""
        self._command({"conditions": asdict(conditions)})

    def cut(self) -> None:
        """End all connections; new ones are taken unless that is refused."""
        self._command({"cut": True})

    def inject(self, data: bytes, to: Side) -> None:
        """Put bytes on the way to one side of every connection."""
        self._command({"inject": data.hex(), "to": to})

    def close(self) -> None:
        """End the process, and with it all connections. Safe to call again."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _command(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer == "ok\n", f"the relay answered {answer!r}"


if __name__ == "__main__":
    main(sys.argv[1:])
