"""An engine gone wrong, on the real loop of a shared draft server over real sockets: the other engine does not notice.

Its drafts are those that it would get alone (`Engine.step` compares each with the draft model's own chain), and none of its replies
comes late. The hostile engine has a key of its own, as engines that do not trust each other should, and a process of its own: it
shares no interpreter with the other engine, and libzmq may abort a client that never reads.
"""

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fake_draft_server import OFFER
from tests.remote_engine import SOON_S, TERMS, Engine, Servers
from vllm_specbranch.keys import CLIENT_PUBLIC, CLIENTS, ClientKeys, load_client_keys, load_server_keys, make_keys
from vllm_specbranch.messages import MAX_ID_LENGTH, Commit, CommitBatch, Farewell, Hello, Open, Status, StepBegin
from vllm_specbranch.transport import ClientChannel, connect

pytestmark = pytest.mark.timeout(240)

# What it opens at once.
OPENS = [Open(f"request {number}", [number % 50, *range(20)], None) for number in range(1000)]
# A round of the engine that means well: the draft server has this long for its drafts, and on a busy machine needs it.
ROUND_S = 0.02
Misdeed = Callable[[ClientChannel, int], None]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder)
    return folder


@pytest.fixture
def stranger(keys: Path, tmp_path: Path) -> ClientKeys:
    make_keys(tmp_path / "other")
    (keys / CLIENTS / "hostile.key").write_bytes((tmp_path / "other" / CLIENT_PUBLIC).read_bytes())
    return replace(load_client_keys(tmp_path / "other"), server=load_server_keys(keys).public)


@pytest.fixture
def servers(keys: Path) -> Iterator[Servers]:
    found = Servers(keys)
    yield found
    found.kill()


def begin(channel: ClientChannel) -> None:
    channel.send(Hello("hostile", 50, 1000, False, TERMS))
    channel.send(StepBegin(OPENS, []))


def crowd(channel: ClientChannel, number: int) -> None:
    """A thousand requests, more than it may have, all of which get a token at every step."""
    commits = [Commit(one.request_id, 21, [number % 50], 0, None) for one in OPENS]
    channel.send(CommitBatch(number, 25.0, commits, None))
    # It waits for its reply: a session that gets far ahead of a busy machine's server ends.
    if isinstance(channel.recv(1000.0), Farewell):
        begin(channel)


def deaf(channel: ClientChannel, number: int) -> None:
    """Long answers to long questions, none of which it ever reads."""
    commits = [Commit(f"{index}".zfill(MAX_ID_LENGTH), 1, [1], 0, None) for index in range(1000)]
    channel.send(CommitBatch(number, 0.0, commits, None))
    time.sleep(0.01)  # More than a server takes in; the processor is the other engine's as well.


def garbage(channel: ClientChannel, number: int) -> None:
    """Bytes that are no message, as fast as they are taken."""
    if number % 200 == 0:
        time.sleep(0.001)  # Far too fast is enough; the processor is the other engine's as well.
    if not channel._link.send([b"garbage"]):  # type: ignore[attr-defined]
        time.sleep(0.001)


def misbehave(address: str, keys: ClientKeys, misdeed: Misdeed) -> None:
    channel = connect(address, keys)
    begin(channel)
    for number in itertools.count(1):
        misdeed(channel, number)


def status_of(engine: Engine) -> Status | None:
    """Asked for between two rounds; None while the line is down, which a busy machine can make it be."""
    return engine.link.query_status(SOON_S)


def has_come(misdeed: Misdeed, engine: Engine) -> bool:
    """Whether the server has felt it."""
    status = status_of(engine)
    if status is None:
        return False
    if misdeed is garbage:
        return min(status.counters[f"num_{kind}_messages"] for kind in ("flood", "malformed")) > 0
    if misdeed is crowd:
        return status.num_requests == 1 + OFFER.max_requests
    measures = sum(status.counters[f"num_{kind}"] for kind in ("narrowings", "shortenings", "evictions"))
    return status.num_requests == 1 and measures > 0


@pytest.mark.parametrize("misdeed", [crowd, deaf, garbage])
def test_an_engine_gone_wrong_does_not_hurt_the_others(
    keys: Path, servers: Servers, stranger: ClientKeys, misdeed: Misdeed
) -> None:
    """`deaf` ends with its session: of the requests there are, the only one is the other engine's."""
    # A rate that a busy machine's flood exceeds too.
    engine = Engine(servers.start(messages_per_s=1200.0), load_client_keys(keys))
    engine.pause_s = ROUND_S
    engine.draft()
    process = multiprocessing.get_context("spawn").Process(
        target=misbehave, args=(servers.address, stranger, misdeed), daemon=True
    )
    process.start()
    try:
        engine.draft()
        engine.run_until(lambda: has_come(misdeed, engine))
        for _ in range(3):
            engine.draft()
    finally:
        process.kill()
        process.join()
        engine.link.close()
    assert engine.counters.num_reply_timeouts == 0
    assert engine.link.generation == 1, "its session has lasted"
    assert servers.process is not None and servers.process.poll() is None, "its server lives"
