"""tests/conftest.py: no test session may leave a process behind unseen."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.model_paths import REPOSITORY

LEAVES_TWO = """
import subprocess, sys
def test_leaves_a_child():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def test_leaves_an_orphan():
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    subprocess.run([sys.executable, "-c", script], check=True)
"""
CLEAN = """
import subprocess, sys
def test_cleans_up():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        child.kill()
"""


def session(tmp_path: Path, test: str, ci: bool = False) -> subprocess.CompletedProcess[str]:
    shutil.copy(REPOSITORY / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(test)
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "BUILD_NUMBER")}
    if ci:
        environment["CI"] = "true"
    return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("ci", [False, True])
def test_processes_left_behind_fail_the_session_and_are_stopped(tmp_path: Path, ci: bool) -> None:
    done = session(tmp_path, LEAVES_TWO, ci)
    assert done.returncode == 1
    assert "processes left behind" in done.stdout
    assert "2 passed, 1 error" in done.stdout.splitlines()[-1]
    # A set: pytest prints an error a second time, in its summary, when it believes itself in a CI job.
    pids = {int(pid) for pid in re.findall(r"^  (\d+): .*time.sleep\(600\)", done.stdout, re.MULTILINE)}
    assert len(pids) == 2
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_a_clean_session_passes(tmp_path: Path) -> None:
    done = session(tmp_path, CLEAN)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout.splitlines()[-1]
