"""The loop of the draft server: two threads, real sockets, no model."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.draft_engine import BLOCK_SIZE
from tests.fakes import FakeDraftModel
from vllm_specbranch import draft_loop, messages
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_loop import serve
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_server import DraftServer
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks
from vllm_specbranch.token_tree import Candidates
from vllm_specbranch.transport import ClientChannel, ServerEndpoint, bind, connect, memory_pair

TIMEOUT_MS = 10_000.0


class GatedModel(FakeDraftModel):
    """Its forwards begin when they like, and end when they may."""

    def __init__(self) -> None:
        super().__init__(64, BLOCK_SIZE)
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)
        self.is_broken = False

    def forward(self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        self.begun.release()
        assert self.may_end.acquire(timeout=TIMEOUT_MS / 1e3)
        if self.is_broken:
            raise RuntimeError("the device is gone")
        return super().forward(rows, copies, top_k)


def served(model: FakeDraftModel, endpoint: ServerEndpoint, **keys: object) -> tuple[DraftServer, threading.Thread]:
    config = SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": 4, "on_miss": "go"} | keys)
    server = make_server(config, model, KVBlocks(64, BLOCK_SIZE), Limits())
    thread = threading.Thread(target=serve, args=(server, endpoint))
    thread.start()
    return server, thread


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[ClientChannel, ServerEndpoint]]:
    address = f"ipc://{tmp_path}/s"
    endpoint = bind(address)
    client = connect(address)
    yield client, endpoint
    client.close()
    endpoint.close()


def test_a_reply_does_not_wait_for_the_forward_under_way(ends: tuple[ClientChannel, ServerEndpoint]) -> None:
    client, endpoint = ends
    model = GatedModel()
    _, thread = served(model, endpoint)
    client.send(messages.Hello("s", 50, 500, False, None))
    assert isinstance(client.recv(TIMEOUT_MS), messages.Ready)
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    assert model.begun.acquire(timeout=TIMEOUT_MS / 1e3)
    client.send(messages.CommitBatch(1, 0.0, [messages.Commit("a", 3, [4], 0, None)], None))
    reply = client.recv(TIMEOUT_MS)
    assert isinstance(reply, messages.DraftBatch)
    assert (reply.round, reply.drafts[0].position) == (1, 4)
    assert not model.may_end.acquire(blocking=False), "the forward is still under way"
    client.send(messages.Shutdown())
    model.may_end.release(1000)
    thread.join(TIMEOUT_MS / 1e3)
    assert not thread.is_alive()


def test_drafting_goes_on_between_messages_and_is_found_at_the_next_commit(
    ends: tuple[ClientChannel, ServerEndpoint],
) -> None:
    client, endpoint = ends
    model = FakeDraftModel(64, BLOCK_SIZE, confidences=(0.95,))
    server, thread = served(model, endpoint)
    client.send(messages.Hello("s", 50, 500, False, None))
    assert isinstance(client.recv(TIMEOUT_MS), messages.Ready)
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    until_s = time.monotonic() + TIMEOUT_MS / 1e3
    while model.num_forwards < 6 and time.monotonic() < until_s:
        time.sleep(0.001)
    context = [1, 2, 3]
    first = model.chain(context, 1, 8)
    client.send(messages.CommitBatch(1, 0.0, [messages.Commit("a", 3, first, 0, None)], None))
    reply = client.recv(TIMEOUT_MS)
    assert isinstance(reply, messages.DraftBatch)
    (draft,) = reply.drafts
    assert draft.hit
    assert draft.tokens == model.chain(context + first, len(draft.tokens), 8)
    assert len(draft.tokens) == 4
    client.send(messages.Shutdown())
    thread.join(TIMEOUT_MS / 1e3)
    assert not thread.is_alive()
    server.check_integrity()


def test_a_reply_that_waits_is_sent_at_its_limit_whatever_the_forward_does(
    ends: tuple[ClientChannel, ServerEndpoint],
) -> None:
    client, endpoint = ends
    model = GatedModel()
    _, thread = served(model, endpoint, policy="specbranch", stop_rule="none", on_miss="wait:2")
    client.send(messages.Hello("s", 50, 500, False, None))
    assert isinstance(client.recv(TIMEOUT_MS), messages.Ready)
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    assert model.begun.acquire(timeout=TIMEOUT_MS / 1e3)
    client.send(messages.CommitBatch(1, 30.0, [messages.Commit("a", 3, [49], 0, None)], None))
    reply = client.recv(TIMEOUT_MS)
    assert isinstance(reply, messages.DraftBatch) and reply.round == 1
    assert not model.may_end.acquire(blocking=False), "the forward is still under way"
    client.send(messages.Shutdown())
    model.may_end.release(1000)
    thread.join(TIMEOUT_MS / 1e3)
    assert not thread.is_alive()


def test_a_forward_that_never_ends_ends_the_process(
    ends: tuple[ClientChannel, ServerEndpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers while its device hangs would be trusted for ever; the engine's supervisor starts another."""
    client, endpoint = ends
    model = GatedModel()
    monkeypatch.setattr(draft_loop, "LONGEST_FORWARD_S", 0.2)
    ended: list[float] = []

    def on_hang() -> None:
        ended.append(time.monotonic())
        model.may_end.release(1000)

    server = make_server(SpecBranchConfig.from_user({"model": "draft"}), model, KVBlocks(64, BLOCK_SIZE), Limits())
    client.send(messages.Hello("s", 50, 500, False, None))
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    started_s = time.monotonic()
    serve(server, endpoint, on_hang)
    assert len(ended) == 1
    assert ended[0] - started_s >= 0.2


def test_many_quick_forwards_are_all_taken(ends: tuple[ClientChannel, ServerEndpoint]) -> None:
    """The two threads hand over thousands of results, at any moment of each other's work."""
    client, endpoint = ends
    model = FakeDraftModel(64, BLOCK_SIZE, confidences=(0.95,))
    _, thread = served(model, endpoint)
    client.send(messages.Hello("s", 50, 500, False, None))
    assert isinstance(client.recv(TIMEOUT_MS), messages.Ready)
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    position, until_s = 3, time.monotonic() + 3.0
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(1, 100_000):
            client.send(
                messages.CommitBatch(number, 0.0, [messages.Commit("a", position, [number % 50], 0, None)], None)
            )
            reply = client.recv(TIMEOUT_MS)
            assert isinstance(reply, messages.DraftBatch) and reply.round == number, f"after {model.num_forwards}"
            position += 1
            if position == 100:
                client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
                position = 3
            if time.monotonic() > until_s:
                break
    finally:
        sys.setswitchinterval(interval_s)
    assert model.num_forwards > 500
    client.send(messages.Shutdown())
    thread.join(TIMEOUT_MS / 1e3)
    assert not thread.is_alive()


def test_a_forward_that_fails_ends_the_server() -> None:
    model = GatedModel()
    client, endpoint = memory_pair()
    model.is_broken = True
    model.may_end.release()
    client.send(messages.Hello("s", 50, 500, False, None))
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    config = SpecBranchConfig.from_user({"model": "draft"})
    server = make_server(config, model, KVBlocks(64, BLOCK_SIZE), Limits())
    with pytest.raises(RuntimeError, match="the device is gone"):
        serve(server, endpoint)


def test_a_message_that_breaks_the_server_thread_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    client, endpoint = memory_pair()
    server = make_server(
        SpecBranchConfig.from_user({"model": "draft"}),
        FakeDraftModel(64, BLOCK_SIZE),
        KVBlocks(64, BLOCK_SIZE),
        Limits(),
    )

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(server, "handle", fail)
    client.send(messages.Hello("s", 50, 500, False, None))
    with pytest.raises(ZeroDivisionError):
        serve(server, endpoint)


def test_every_reply_says_how_the_server_stands(ends: tuple[ClientChannel, ServerEndpoint]) -> None:
    client, endpoint = ends
    model = FakeDraftModel(64, BLOCK_SIZE)
    _, thread = served(model, endpoint)
    client.send(messages.Hello("s", model.vocab_size, 500, False, None))
    client.recv(TIMEOUT_MS)
    client.send(messages.StepBegin([messages.Open(name, [1, 2, 3], None) for name in ("a", "b")], []))
    for number in (1, 2):
        position = 2 + number
        client.send(messages.CommitBatch(number, 0.0, [messages.Commit("a", position, [5], 0, None)], None))
        reply = client.recv(TIMEOUT_MS)
        assert isinstance(reply, messages.DraftBatch) and reply.report is not None
        report = reply.report
        assert (report.num_requests, report.num_blocks) == (2, 64)
        assert report.counters["num_rounds"] == number
        assert report.counters["num_hits"] + report.counters["num_misses"] == number
    client.send(messages.StepBegin([], ["a", "b"]))
    client.send(messages.Shutdown())
    thread.join(TIMEOUT_MS / 1e3)


def test_how_long_an_answer_took_rides_on_it(ends: tuple[ClientChannel, ServerEndpoint]) -> None:
    """From when the batch was taken in until the forward that it waits for is over; taking it in is a small part of that."""
    client, endpoint = ends
    model = GatedModel()
    server, thread = served(model, endpoint, policy="specbranch", stop_rule="none", on_miss="wait:1")
    client.send(messages.Hello("s", 50, 500, False, None))
    assert isinstance(client.recv(TIMEOUT_MS), messages.Ready)
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    assert model.begun.acquire(timeout=TIMEOUT_MS / 1e3)
    sent_s = time.perf_counter()
    client.send(messages.CommitBatch(1, 5000.0, [messages.Commit("a", 3, [49], 0, None)], None))
    until_s = time.monotonic() + TIMEOUT_MS / 1e3
    while not server.counters.num_rounds and time.monotonic() < until_s:
        time.sleep(0.001)
    taken_s = time.perf_counter()
    time.sleep(0.02)
    released_s = time.perf_counter()
    model.may_end.release(1000)
    reply = client.recv(TIMEOUT_MS)
    came_s = time.perf_counter()
    assert isinstance(reply, messages.DraftBatch) and reply.report is not None and reply.drafts[0].tokens
    took_us, handling_us = (reply.report.counters[name] for name in ("answer_us", "handling_us"))
    assert released_s - taken_s <= took_us / 1e6 <= came_s - sent_s
    assert 0 < handling_us < took_us
    client.send(messages.CommitBatch(2, 0.0, [messages.Commit("nobody", 3, [1], 0, None)], None))
    again = client.recv(TIMEOUT_MS)
    assert isinstance(again, messages.DraftBatch) and again.report is not None
    assert took_us < again.report.counters["answer_us"], "it is a sum"
    client.send(messages.Shutdown())
    thread.join(TIMEOUT_MS / 1e3)
    assert not thread.is_alive()
