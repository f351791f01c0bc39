"""Whether processes have ended; above all a child that is stopped when its parent is killed, and cannot see its lifeline close."""

import contextlib
import subprocess
import sys
import time

import psutil

SOON_S = 20.0

# What a parent may start in place of a child's module: it never reads its standard input.
SLEEPER = ("timeit", "-n1", "-r1", "__import__('time').sleep(600)")

# Before what starts `child`: who runs the tests under `nohup` has children that ignore being hung up.
_LISTEN = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
# After it.
_STOP_AND_WAIT = """
import os, signal, sys
os.kill(child.pid, signal.SIGSTOP)
os.waitpid(child.pid, os.WUNTRACED)
print(child.pid, flush=True)
sys.stdin.read()
"""


def assert_a_stopped_child_ends(parent_source: str, line: bytes = b"\n") -> None:
    """Run a parent that starts a process, `child`; stop that, kill the parent, and see the child end.

    Args:
        parent_source: Python.
        line: for the parent's standard input.
    """
    # A session of its own: who inherits the child has to be in another one, as the first process of a machine is.
    with subprocess.Popen(
        [sys.executable, "-c", _LISTEN + parent_source + _STOP_AND_WAIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(line)
        parent.stdin.flush()
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            assert child.status() == psutil.STATUS_STOPPED
            parent.kill()
            until = time.monotonic() + SOON_S
            while not is_gone(child.pid):
                assert time.monotonic() < until
                time.sleep(0.01)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that nobody has collected its status yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
