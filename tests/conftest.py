"""Settings of every test session: a small, offline, two-core vLLM; and no process left behind.

The environment is set at import, before any test module can import vLLM, which reads it once.
"""

import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# The first core is the target's; the draft server finds its own (see placement).
_FIRST_CORE = str(min(os.sched_getaffinity(0)))
_SESSION_MARK = "SPECBRANCH_TEST_SESSION"
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": _FIRST_CORE,
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# Inherited by every process that a test starts, so that orphans are found as well as children.
os.environ[_SESSION_MARK] = uuid.uuid4().hex

# Lives as long as its parent, by design.
_EXPECTED = "multiprocessing.resource_tracker"
_GRACE_S = 5.0


@pytest.fixture(scope="session")
def target_model() -> str:
    """The shipped target model. Fails, never skips, when it is missing."""
    from tests.model_paths import TARGET

    return TARGET


@pytest.fixture(scope="session")
def draft_model() -> str:
    """The shipped draft model. Fails, never skips, when it is missing."""
    from tests.model_paths import DRAFT

    return DRAFT


@pytest.fixture(scope="session")
def weak_draft_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A draft of the same tokenizer that often disagrees with the target."""
    from tests.model_paths import make_weak_draft

    yield make_weak_draft(Path(tmp_path_factory.mktemp("weak_draft")))


@pytest.fixture(autouse=True)
def _our_log_lines_reach_caplog(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let tests see our log lines too once vLLM has been imported: it stops its loggers from propagating."""
    logger = logging.getLogger("vllm")
    if logger.propagate:
        yield
    else:
        logger.addHandler(caplog.handler)
        yield
        logger.removeHandler(caplog.handler)
    left = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    assert not left, "the test left logging switched off for those after it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where there is none, with the reason in the summary."""
    if Path("/dev/nvidiactl").exists():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop every process that a test left behind, and fail the session for it."""
    left = _leftovers()
    _, left = psutil.wait_procs(left, timeout=_GRACE_S)
    left = [process for process in left if _is_alive(process)]
    if not left:
        return
    described = [_describe(process) for process in left]
    _stop(left)
    _report_error(session, "processes left behind by tests (stopped now):\n" + "\n".join(described))


def _leftovers() -> list[psutil.Process]:
    """Return what descends from this session and still runs: children, and orphans by the mark in their environment."""
    mark = os.environ[_SESSION_MARK]
    me = psutil.Process()
    found = {process.pid: process for process in me.children(recursive=True)}
    for process in psutil.process_iter():
        if process.pid != me.pid and process.pid not in found and _mark_of(process) == mark:
            found[process.pid] = process
    return [process for process in found.values() if _is_alive(process) and not _is_expected(process)]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(_SESSION_MARK)
    except psutil.Error:
        return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_expected(process: psutil.Process) -> bool:
    try:
        return any(_EXPECTED in word for word in process.cmdline())
    except psutil.Error:
        return True


def _describe(process: psutil.Process) -> str:
    try:
        return f"  {process.pid}: {' '.join(process.cmdline())[:200] or process.name()}"
    except psutil.Error:
        return f"  {process.pid}: already gone"


def _stop(processes: list[psutil.Process]) -> None:
    for process in processes:
        _signal(process, kill=False)
    _, stubborn = psutil.wait_procs(processes, timeout=_GRACE_S)
    for process in stubborn:
        _signal(process, kill=True)
    psutil.wait_procs(stubborn, timeout=_GRACE_S)


def _signal(process: psutil.Process, kill: bool) -> None:
    try:
        if kill:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        return


def _report_error(session: pytest.Session, text: str) -> None:
    """Make the session fail, with `text` among the errors and one error more in the summary line."""
    if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    report = pytest.TestReport(
        nodeid="left-over processes",
        location=("tests/conftest.py", 0, "left-over processes"),
        keywords={},
        outcome="failed",
        longrepr=text,
        when="teardown",
    )
    reporter.stats.setdefault("error", []).append(report)
