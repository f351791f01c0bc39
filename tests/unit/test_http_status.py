"""What a draft server of its own tells over HTTP: right names and figures, health, readiness, and nobody kept waiting."""

import contextlib
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.test_draft_sessions import ONE, TWO, Bench
from vllm_specbranch import http_status
from vllm_specbranch.draft_sessions import LEASE_S
from vllm_specbranch.errors import ConfigError, WireError
from vllm_specbranch.http_status import HUNG_AFTER_S, PREFIX, HttpStatus
from vllm_specbranch.metrics import DraftServerCounters
from vllm_specbranch.transport import memory_pair


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def status(clock: Clock) -> Iterator[HttpStatus]:
    found = HttpStatus("127.0.0.1:0", clock)
    yield found
    found.close()


def get(status: HttpStatus, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{status.port}{path}", timeout=10.0) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def scrape(status: HttpStatus) -> dict[str, float]:
    code, text = get(status, "/metrics")
    assert code == 200
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def test_before_the_model_is_loaded_it_lives_and_is_not_ready(status: HttpStatus) -> None:
    assert get(status, "/health") == (200, "yes\n")
    assert get(status, "/ready") == (503, "no\n")
    found = scrape(status)
    assert found[PREFIX + "ready"] == 0
    assert found["process_resident_memory_bytes"] > 0
    assert PREFIX + "engines" not in found


def test_counts_and_gauges_are_those_of_all_engines(status: HttpStatus, clock: Clock) -> None:
    bench = Bench()
    _, endpoint = memory_pair()
    for peer, names in ((ONE, ("a", "b")), (TWO, ("a",))):
        bench.greet(peer)
        bench.open(peer, *names)
        bench.commit(peer, "a")
    bench.run()
    bench.clock.now_s += 2.0
    bench.server.look_around()
    bench.server.counters.num_answers = 5
    bench.server.counters.answer_us, bench.server.counters.handling_us = 2_500_000, 500_000
    status.watch(bench.server, endpoint)
    clock.now_s += 2.0
    found = {name.removeprefix(PREFIX): value for name, value in scrape(status).items() if name.startswith(PREFIX)}
    assert (found["ready"], found["engines"], found["requests"], found["turn_age_seconds"]) == (1, 2, 3, 2)
    assert found["kv_blocks"] == bench.server.kv.num_blocks
    assert found["kv_blocks_held"] == bench.server.kv.num_held > 0
    assert (found["answer_seconds_total"], found["answers_total"], found["handling_seconds_total"]) == (2.5, 5, 0.5)
    counters = bench.server.counters
    assert found["rounds_total"] == counters.num_rounds == 2
    assert found["draft_steps_total"] == counters.num_steps > 0
    assert found["drafted_tokens_total"] == counters.num_drafted_tokens > 0


def test_engines_that_are_gone_are_told_no_more_also_while_nobody_speaks(status: HttpStatus) -> None:
    bench = Bench()
    bench.greet(ONE)
    bench.open(ONE, "a")
    status.watch(bench.server, memory_pair()[1])
    bench.clock.now_s += 2.0
    bench.server.look_around()
    assert (scrape(status)[PREFIX + "engines"], scrape(status)[PREFIX + "requests"]) == (1, 1)
    bench.clock.now_s += LEASE_S
    bench.server.look_around()
    found = scrape(status)
    assert [found[PREFIX + name] for name in ("engines", "requests", "kv_blocks_held")] == [0, 0, 0]
    assert found[PREFIX + "expired_requests_total"] == 1


class Endpoint:
    """What is asked of one."""

    num_dropped = 1001
    num_refused = 1002


def test_every_counter_is_told(status: HttpStatus) -> None:
    bench = Bench()
    status.watch(bench.server, Endpoint())  # type: ignore[arg-type]
    values = {name: 103 + number for number, name in enumerate(DraftServerCounters().as_dict())}
    for name, value in values.items():
        setattr(bench.server.counters, name, value)
    found = {name: value for name, value in scrape(status).items() if name.startswith(PREFIX)}
    assert found[PREFIX + "malformed_messages_total"] == Endpoint.num_dropped
    assert found[PREFIX + "flood_messages_total"] == Endpoint.num_refused
    seconds = {"answer_us", "handling_us"}
    of_the_endpoint = {"num_malformed_messages", "num_flood_messages"}
    told = set(found.values())
    assert {value for name, value in values.items() if name not in seconds | of_the_endpoint} <= told
    assert {values[name] / 1e6 for name in seconds} <= told


def test_one_that_hangs_is_not_healthy_and_one_that_ends_not_ready(status: HttpStatus, clock: Clock) -> None:
    bench = Bench()
    status.watch(bench.server, memory_pair()[1])
    assert get(status, "/health")[0] == get(status, "/ready")[0] == 200
    clock.now_s += HUNG_AFTER_S
    assert get(status, "/health")[0] == get(status, "/ready")[0] == 503
    bench.server.turned_s = clock.now_s
    assert get(status, "/health")[0] == get(status, "/ready")[0] == 200
    bench.server.is_stopping = True
    assert get(status, "/health")[0] == 200
    assert get(status, "/ready")[0] == 503
    assert scrape(status)[PREFIX + "ready"] == 0


def test_other_paths_name_those_that_there_are(status: HttpStatus) -> None:
    code, text = get(status, "/?x=/metrics")
    assert code == 404
    assert "/metrics" in text
    assert get(status, "/metrics?name[]=up")[0] == 200


def reset(line: socket.socket) -> None:
    """Go without a farewell."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    line.close()


@pytest.mark.parametrize(
    "said", [b"", b"GET /metrics HTTP/1.1\r\n\r\n", b"GET http://[ HTTP/1.0\r\n\r\n", b"\0" * 5000]
)
def test_who_goes_in_the_middle_leaves_nothing_in_the_log(
    status: HttpStatus, said: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        line = socket.create_connection(("127.0.0.1", status.port))
        line.sendall(said)
        reset(line)
    assert get(status, "/health")[0] == 200
    assert capfd.readouterr() == ("", "")


def test_who_is_slow_is_ended_and_who_has_many_lines_keeps_nobody_out_for_long(
    status: HttpStatus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_status, "LONGEST_CONNECTION_S", 1.0)
    lines = [socket.create_connection(("127.0.0.1", status.port)) for _ in range(2 * http_status.MOST_CONNECTIONS)]
    ended_s = time.monotonic() + 10.0
    is_served = False
    while not is_served and time.monotonic() < ended_s:
        # A byte now and then is no request.
        for line in lines:
            with contextlib.suppress(OSError):
                line.send(b"G")
        try:
            is_served = get(status, "/health")[0] == 200
        except OSError:
            time.sleep(0.1)
    assert is_served
    for line in lines:
        line.settimeout(10.0)
        with contextlib.suppress(ConnectionError):
            assert line.recv(1) == b""
        line.close()


@pytest.mark.parametrize("address", ["", "9600", "localhost", "http://localhost:1", "127.0.0.1:70000", "a b:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="--http"):
        HttpStatus(address)


def test_an_address_that_is_taken_or_not_ours_is_named(status: HttpStatus) -> None:
    with pytest.raises(WireError, match=f"127.0.0.1:{status.port}.*in use"):
        HttpStatus(f"127.0.0.1:{status.port}")
    with pytest.raises(WireError, match=r"no-such-host\.invalid"):
        HttpStatus("no-such-host.invalid:0")


@pytest.mark.parametrize("host", ["*", "localhost", "[::1]"])
def test_interfaces(host: str) -> None:
    if host == "[::1]" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    found = HttpStatus(f"{host}:0")
    try:
        with socket.create_connection((host.strip("[]").replace("*", "127.0.0.1"), found.port), 5.0) as line:
            line.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            assert b"200" in line.recv(100)
    finally:
        found.close()
