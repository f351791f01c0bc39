"""The network benchmark without engines: words, table, refusals; and two hosts, for real where this machine lets us."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import bench_network, emulated_draft_server, two_hosts
from benchmarks.bench_network import Case, Cut, as_table, longest_gap_ms
from benchmarks.decode_rows import Entry, Row
from benchmarks.two_hosts import ADDRESSES, NoHostsError, TwoHosts
from vllm_specbranch import cli
from vllm_specbranch.draft_model import DraftModel
from vllm_specbranch.measure_messages import EngineSpec, RequestTrace, RunResult

SOON_S = 20.0


def run_of(seconds: float, **counters: float) -> RunResult:
    trace = RequestTrace(0.0, [seconds / 2, seconds], [1, 3], [5, 6, 7, 8], "")
    return RunResult(seconds, 2, [trace], engine_counters=counters, num_drafts=1, num_accepted_tokens=2)


def case_of(name: str, seconds: float, delay_ms: float | None = None) -> Case:
    row = Row(Entry(EngineSpec(name, "target"), name, "", 1))
    row.runs.append(run_of(seconds, wait_s=0.06, num_commit_batches=3, num_reply_timeouts=1))
    return Case(row, delay_ms)


def test_a_line_per_latency() -> None:
    plain, far = case_of("plain", 4.0), case_of("another host", 2.0, 10.0)
    lines = [bench_network._line(case, plain, 0) for case in (plain, far)]
    assert [line["ratio_to_plain"] for line in lines] == [1.0, 2.0]
    assert lines[1]["wait_ms"] == pytest.approx(20.0)
    assert lines[1]["acceptance_length"] == 3.0
    text = as_table(lines)
    assert "another host, 10 ms each way" in text
    assert "1 of 3" in text
    assert text.count("the same") == 2
    far.differences = [{"prompt": 0}]
    assert "DIFFERENT" in as_table([bench_network._line(far, plain, 0)])


@pytest.mark.parametrize(("back_s", "words"), [(2.5, "again 2.5 s"), (None, "NEVER")])
def test_what_is_said_of_a_cut(back_s: float | None, words: str) -> None:
    cut = Cut(3.0, case_of("another host", 1.0), back_s, (9, 4, 8), (20.0, 600.0))
    assert words in cut.as_text()
    assert cut.is_back == (back_s is not None)
    assert cut.as_json()["num_accepted"] == (9, 4, 8)


def test_the_longest_gap_is_between_outputs() -> None:
    assert longest_gap_ms(run_of(3.0)) == pytest.approx(1500.0)


@pytest.mark.parametrize("words", [["--delays-ms", "x"], ["--delays-ms", "-1"], ["--delays-ms", "2000"]])
def test_words_that_cannot_be_used(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_network.main(["--out", str(tmp_path / "r.json"), *words])
    assert ended.value.code == 2
    assert "allowed: numbers of ms" in capsys.readouterr().err
    assert bench_network.main(["--out", str(tmp_path / "r.json"), "--emulate", "none"]) == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("geteuid", 1000, "made by root"),
        ("platform", "darwin", "and this is darwin"),
        ("which", None, "install iproute2"),
    ],
)
def test_where_it_cannot_run_it_says_why_and_is_skipped(
    name: str,
    value: object,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(two_hosts.shutil, "which", lambda _: "/sbin/ip")
    assert two_hosts.missing() is None
    owner = {"geteuid": os, "platform": sys, "which": two_hosts.shutil}[name]
    monkeypatch.setattr(owner, name, value if name == "platform" else lambda *_: value)
    assert bench_network.main(["--out", str(tmp_path / "r.json")]) == bench_network.EXIT_SKIPPED
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_emulated_draft_server_is_the_command_with_slower_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(DraftModel, "forward", DraftModel.forward)
    forward = DraftModel.forward
    monkeypatch.setattr(cli, "main", lambda words: given.append(words) or 0)
    assert emulated_draft_server.main(["2.0:0.02", "--model", "DRAFT", "--insecure"]) == 0
    assert given == [["draft-server", "--model", "DRAFT", "--insecure"]]
    assert DraftModel.forward is not forward


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    try:
        with TwoHosts() as found:
            yield found
    except NoHostsError as error:
        pytest.skip(str(error))


def test_two_hosts_have_addresses_of_their_own_and_a_wire_that_can_be_cut(hosts: TwoHosts) -> None:
    here = os.readlink("/proc/thread-self/ns/net")
    with hosts.on("draft"):
        assert os.readlink("/proc/thread-self/ns/net") != here
        listener = socket.create_server((ADDRESSES["draft"], 0))
        port = listener.getsockname()[1]
        # Another network: the same port is free elsewhere, and no address but its own is there.
        with pytest.raises(OSError, match="assign"):
            socket.create_server((ADDRESSES["engine"], 0))
    assert os.readlink("/proc/thread-self/ns/net") == here
    with pytest.raises(OSError):
        socket.create_connection((ADDRESSES["draft"], port), 0.3)
    with hosts.on("engine"):
        client = socket.create_connection((ADDRESSES["draft"], port), SOON_S)
    server, peer = listener.accept()
    assert peer[0] == ADDRESSES["engine"]
    with listener, client, server:
        server.settimeout(0.3)
        hosts.cut()
        client.sendall(b"across")
        with pytest.raises(TimeoutError):
            server.recv(6)
        server.settimeout(SOON_S)
        hosts.heal()
        assert server.recv(6) == b"across", "healed: nothing is lost"


def test_hosts_leave_nothing_behind() -> None:
    names = []
    try:
        with TwoHosts() as hosts:
            names += hosts._names.values()
            with hosts.on("engine"):
                inside = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout
            assert len(inside.splitlines()) == 2, "its own end of the wire, and itself"
            raise KeyError
    except NoHostsError as error:
        pytest.skip(str(error))
    except KeyError:
        assert len(names) == 2
        assert not any(Path("/run/netns", name).exists() for name in names)
