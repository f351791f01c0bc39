"""Cores, back-off and the child's life, with a tiny script in place of the draft server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.processes import SLEEPER, assert_a_stopped_child_ends
from vllm_specbranch import back_off, placement
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_model import DraftModelSettings
from vllm_specbranch.placement import ServerProcess, ServerSpec, choose_cores, parse_target_cores, sibling_threads
from vllm_specbranch.setting_values import OnMiss

CONFIG = SpecBranchConfig.from_user({"model": "draft", "on_miss": "wait:3", "draft_cpu_cores": [0]})
MODEL = DraftModelSettings(model="draft", max_model_len=64)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def wait_for(condition: object, timeout_s: float = 10.0) -> None:
    assert callable(condition)
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, set()),
        ("", set()),
        ("{0}", {0}),
        ("{0,1,5}", {0, 1, 5}),
        ("0 2 4", {0, 2, 4}),
        ("0-2", {0, 1, 2}),
        ("granularity=fine,explicit,proclist=[1,3]", {1, 3}),
    ],
)
def test_target_cores_are_read_from_any_openmp_setting(setting: str | None, expected: set[int]) -> None:
    assert parse_target_cores(setting) == expected


def test_the_draft_server_takes_what_the_target_leaves() -> None:
    assert choose_cores(None, {0, 1, 2}, {0}, set()) == (1, 2)
    assert choose_cores((3,), {0, 1}, {0}, set()) == (3,)
    assert choose_cores(None, {0, 1}, {0, 1}, set()) is None
    assert choose_cores(None, {0, 1}, set(), set()) is None


def test_hardware_threads_of_the_targets_cores_come_last() -> None:
    assert choose_cores(None, {0, 1, 2, 3}, {0}, {2}) == (1, 3)
    assert choose_cores(None, {0, 2}, {0}, {2}) == (2,)
    assert sibling_threads({10**6}) == set(), "unknown to the kernel"


def test_settings_that_cannot_work_are_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_popen = subprocess.Popen
    command = [sys.executable, "-S", "-c", f"import sys; sys.exit({placement.EXIT_CONFIG})"]
    monkeypatch.setattr(placement.subprocess, "Popen", lambda _, **keywords: real_popen(command, **keywords))
    clock = Clock()
    process = ServerProcess(CONFIG, MODEL, on_cpu=True, clock=clock)
    try:
        assert process.ensure_running()
        wait_for(lambda: not process.is_running())
        clock.now_s += 1000.0
        assert not process.ensure_running()
        assert process.is_hopeless
        assert sum("cannot work with these settings" in record.message for record in caplog.records) == 1
    finally:
        process.stop()


def test_a_start_that_the_system_refuses_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    real_popen = subprocess.Popen

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(placement.subprocess, "Popen", refuse)
    clock = Clock()
    process = ServerProcess(CONFIG, MODEL, on_cpu=True, clock=clock)
    try:
        assert not process.ensure_running()
        assert not process.ensure_running()
        monkeypatch.setattr(
            placement.subprocess, "Popen", lambda _, **keywords: real_popen(["sleep", "60"], **keywords)
        )
        clock.now_s += back_off.FIRST_BACK_OFF_S
        assert process.ensure_running()
        process.kill()
    finally:
        process.stop()


def test_another_engine_may_remove_a_directory_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "specbranch-4194304-x"
    gone.mkdir()
    monkeypatch.setattr(placement.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(placement, "LONGEST_ROOT", 1000)

    def pid_exists(_: int) -> bool:
        gone.rmdir()
        return False

    monkeypatch.setattr(placement.psutil, "pid_exists", pid_exists)
    assert placement.make_private_directory().is_dir()


def test_directories_of_engines_that_are_gone_are_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(placement.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(placement, "LONGEST_ROOT", 1000)
    gone, other = tmp_path / "specbranch-4194304-x", tmp_path / f"specbranch-{os.getppid()}-y"
    gone.mkdir()
    other.mkdir()
    process = ServerProcess(CONFIG, MODEL, on_cpu=True)
    assert not gone.exists()
    assert other.exists(), "its owner lives"
    process.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name]


def test_the_spec_survives_its_way_to_the_child() -> None:
    spec = ServerSpec("ipc:///tmp/x", (1,), MODEL, CONFIG)
    line = spec.to_json()
    assert b"\n" not in line
    assert ServerSpec.from_json(line) == spec
    assert ServerSpec.from_json(line).config.on_miss == OnMiss("wait", 3)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Replace the child's program: it writes its spec to a file, then waits for its lifeline."""
    log = tmp_path / "spec.json"
    program = f"import sys, pathlib; pathlib.Path({str(log)!r}).write_bytes(sys.stdin.buffer.readline()); sys.stdin.buffer.read()"
    real_popen = subprocess.Popen

    def popen(command: list[str], **keywords: object) -> "subprocess.Popen[bytes]":
        assert command[1:] == ["-m", "vllm_specbranch.draft_main"]
        return real_popen([sys.executable, "-S", "-c", program], **keywords)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(placement.subprocess, "Popen", popen)
    return log


def test_a_dead_child_is_started_again_after_a_growing_back_off(
    stand_in: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    process = ServerProcess(CONFIG, MODEL, on_cpu=True, clock=clock)
    try:
        assert process.ensure_running()
        assert not process.ensure_running()
        wait_for(stand_in.exists)
        wait_for(lambda: stand_in.read_bytes().endswith(b"\n"))
        assert ServerSpec.from_json(stand_in.read_bytes()).cores == (0,)
        addresses = {process.address}
        waits = []
        for _ in range(4):
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            wait_for(lambda: not process.is_running())
            started_s = clock.now_s
            while not process.ensure_running():
                clock.now_s += 0.25
            waits.append(clock.now_s - started_s)
            addresses.add(process.address)
        assert waits == [0.5, 1.0, 2.0, 4.0]
        assert len(addresses) == 5, "every start has its own address"
        assert sum("ended with status -9" in record.message for record in caplog.records) == 4, "one line per death"
    finally:
        process.stop()


def test_a_long_healthy_life_ends_the_series(stand_in: Path) -> None:
    clock = Clock()
    process = ServerProcess(CONFIG, MODEL, on_cpu=True, clock=clock)
    try:
        for lived_s, back_off_s in ((1.0, 0.5), (1.0, 1.0), (back_off.HEALTHY_AFTER_S + 1, 0.5)):
            assert process.ensure_running()
            clock.now_s += lived_s
            process.kill()
            wait_for(lambda: not process.is_running())
            assert not process.ensure_running(), "the back-off has begun"
            clock.now_s += back_off_s - 0.01
            assert not process.ensure_running()
            clock.now_s += 0.02
        assert process.ensure_running()
    finally:
        process.stop()


@pytest.mark.parametrize("end", [ServerProcess.kill, lambda process: process.refused(True)], ids=["hung", "refused"])
def test_no_step_waits_for_the_end_of_a_child(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[ServerProcess], None]
) -> None:
    process = ServerProcess(CONFIG, MODEL, on_cpu=True)
    try:
        assert process.ensure_running()
        with monkeypatch.context() as patched:
            patched.setattr(process._process, "wait", lambda *args: pytest.fail("waited for the child"))
            end(process)
        wait_for(lambda: not process.is_running())
    finally:
        process.stop()


def test_stop_leaves_neither_process_nor_directory(stand_in: Path) -> None:
    process = ServerProcess(CONFIG, MODEL, on_cpu=True)
    process.ensure_running()
    pid, directory = process.pid, Path(process.address.removeprefix("ipc://")).parent
    assert directory.stat().st_mode & 0o777 == 0o700, "only the user can enter"
    process.stop()
    process.stop()
    assert pid is not None
    assert not psutil.pid_exists(pid)
    assert not directory.exists()


PARENT = f"""
import sys
from vllm_specbranch.placement import ServerSpec, launch

child = launch(ServerSpec.from_json(sys.stdin.buffer.readline()), {{}}, module={SLEEPER})
"""


def test_a_stopped_child_does_not_outlive_its_parent() -> None:
    assert_a_stopped_child_ends(PARENT, ServerSpec("ipc:///nowhere/draft.sock", None, MODEL, CONFIG).to_json() + b"\n")


def test_the_child_gets_none_of_the_targets_thread_settings(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PLACES", "{0}")
    monkeypatch.setenv("KMP_AFFINITY", "x")
    process = ServerProcess(CONFIG, MODEL, on_cpu=True)
    try:
        process.ensure_running()
        environment = psutil.Process(process.pid).environ()
        assert "OMP_PLACES" not in environment
        assert "KMP_AFFINITY" not in environment
        assert environment["OMP_NUM_THREADS"] == "1"
    finally:
        process.stop()
