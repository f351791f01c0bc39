"""The engine's line to a draft server in another process, over TCP with keys: everything real but the model and vLLM."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.remote_engine import SOON_S, TERMS, Engine, Servers
from vllm_specbranch import messages
from vllm_specbranch.keys import load_client_keys, load_server_keys, make_keys
from vllm_specbranch.messages import Terms

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder)
    return folder


@pytest.fixture
def servers(keys: Path) -> Iterator[Servers]:
    found = Servers(keys)
    found.start()
    yield found
    found.kill()


@pytest.fixture
def engine(servers: Servers, keys: Path) -> Iterator[Engine]:
    found = Engine(servers.address, load_client_keys(keys))
    yield found
    found.link.close()


def test_two_engines_with_the_same_request_id_share_a_server(servers: Servers, engine: Engine, keys: Path) -> None:
    other = Engine(servers.address, load_client_keys(keys), start=20)
    try:
        for _ in range(3):
            engine.draft()
            other.draft()
    finally:
        other.link.close()


def test_a_killed_server_is_found_again_and_requests_are_opened_from_their_history(
    servers: Servers, engine: Engine
) -> None:
    engine.draft()
    address = servers.address
    for life in range(2, 4):
        assert servers.end(signal.SIGKILL) == -signal.SIGKILL
        engine.run_until(lambda: not engine.link.is_up)
        num_tokens, num_accepted = len(engine.tokens), engine.num_accepted
        for _ in range(50):
            engine.step()
        assert len(engine.tokens) == num_tokens + 50, "plain decoding: one token a step"
        assert engine.num_accepted == num_accepted
        assert servers.start() == address
        engine.draft()
        assert engine.link.generation >= life
    assert engine.counters.num_breaker_openings >= 2


def test_a_server_that_hangs_is_not_waited_for_and_used_again_when_it_moves(servers: Servers, engine: Engine) -> None:
    engine.draft()
    assert servers.process is not None
    os.kill(servers.process.pid, signal.SIGSTOP)
    try:
        engine.run_until(lambda: not engine.link.is_up)
    finally:
        os.kill(servers.process.pid, signal.SIGCONT)
    engine.draft()
    assert engine.link.generation == 2


def test_a_server_that_is_told_to_end_takes_leave(servers: Servers, engine: Engine, caplog: object) -> None:
    """No reply times out: the engine knows at once. The next server, perhaps with another model's weights, is found."""
    engine.draft()
    assert servers.end(signal.SIGTERM) == 0
    engine.run_until(lambda: not engine.link.is_up)
    assert engine.counters.num_reply_timeouts == 0
    assert engine.counters.num_breaker_openings == 0
    servers.start()
    engine.draft()


@pytest.mark.parametrize(
    ("vocab_size", "terms", "reason"),
    [(51, TERMS, "vocabulary has 51 tokens"), (50, Terms("another", "float32", 4), "another draft model")],
)
def test_an_engine_that_does_not_fit_is_refused_with_the_reason(
    servers: Servers,
    engine: Engine,
    keys: Path,
    vocab_size: int,
    terms: Terms,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = Engine(servers.address, load_client_keys(keys), terms, vocab_size)
    try:
        other.link.poll()
        assert not other.link.wait_until_up(SOON_S)
        assert sum(reason in record.message for record in caplog.records) == 1
        for _ in range(20):
            other.step()
        assert other.num_accepted == 0
    finally:
        other.link.close()
    engine.draft()


def test_an_engine_with_an_unknown_key_decodes_without_drafts(
    servers: Servers, engine: Engine, keys: Path, tmp_path: Path
) -> None:
    make_keys(tmp_path / "other")
    stranger = replace(load_client_keys(tmp_path / "other"), server=load_server_keys(keys).public)
    other = Engine(servers.address, stranger)
    try:
        for _ in range(100):
            other.step()
            time.sleep(0.002)
        assert len(other.tokens) == 103
        assert not other.link.is_up
    finally:
        other.link.close()
    engine.draft()


def test_an_engine_starts_without_its_server_and_finds_it_later(keys: Path, servers: Servers) -> None:
    servers.end(signal.SIGKILL)
    engine = Engine(servers.address, load_client_keys(keys))
    try:
        for _ in range(20):
            engine.step()
        assert not engine.link.is_up
        servers.start()
        engine.draft()
        assert isinstance(engine.link.query_status(SOON_S), messages.Status)
    finally:
        engine.link.close()


def test_an_engine_with_two_servers_goes_to_the_other_when_one_dies_hangs_or_ends(keys: Path, servers: Servers) -> None:
    """And on with the same request, opened there from its history."""
    other = Servers(keys)
    other.start()
    engine = Engine(f"{servers.address},{other.address}", load_client_keys(keys))
    try:
        engine.draft()
        assert engine.used == servers.address
        servers.end(signal.SIGKILL)
        engine.run_until(lambda: not engine.link.is_up)
        engine.draft()
        assert engine.used == other.address
        servers.start()
        assert other.process is not None
        os.kill(other.process.pid, signal.SIGSTOP)
        try:
            engine.run_until(lambda: engine.used == servers.address)
            engine.draft()
        finally:
            os.kill(other.process.pid, signal.SIGCONT)
        assert servers.end(signal.SIGTERM) == 0
        engine.run_until(lambda: engine.used == other.address)
        engine.draft()
    finally:
        engine.link.close()
        other.kill()
