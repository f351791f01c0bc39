"""The loop of the draft server: two threads, real sockets, no model."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.draft_engine import BLOCK_SIZE
from tests.fakes import FakeDraftModel
from vllm_specbranch import draft_loop, messages
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_loop import serve
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_server import OVERRUN, DraftServer
from vllm_specbranch.draft_sessions import NO_SESSION, Offer
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks
from vllm_specbranch.message_turns import MOST_WAITING
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


@dataclass
class Scripted:
    """An endpoint at which everything has arrived already."""

    arrived: list[tuple[bytes, messages.EngineMessage]]
    sent: list[tuple[bytes, messages.ServerMessage]] = field(default_factory=list)
    unsendable: set[bytes] = field(default_factory=set)
    num_dropped: int = 0
    num_refused: int = 0
    key: str = ""

    def recv(self, timeout_ms: float) -> tuple[bytes, messages.EngineMessage] | None:
        assert self.arrived or not timeout_ms, "nothing waits while messages do"
        if not self.arrived:
            return None
        self.key = f"key of {self.arrived[0][0].decode()}"
        return self.arrived.pop(0)

    def send(self, peer: bytes, message: messages.ServerMessage) -> bool:
        self.sent.append((peer, message))
        return peer not in self.unsendable


def take_in(
    arrived: list[tuple[bytes, messages.EngineMessage]], unsendable: Sequence[bytes] = ()
) -> tuple[Any, Scripted]:
    model = FakeDraftModel(64, BLOCK_SIZE)
    offer = Offer("identity", "float32", 4)
    config = SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": 4})
    server = make_server(config, model, KVBlocks(64, BLOCK_SIZE), Limits(), offer=offer)
    hello = messages.Hello("s", 50, 500, False, messages.Terms("identity", "float32", 4))
    for peer in (b"one", b"two"):
        server.handle(peer, hello)
        server.handle(peer, messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    endpoint = Scripted(arrived, unsendable=set(unsendable))
    post = draft_loop._Post(server, endpoint)  # type: ignore[arg-type]
    while endpoint.arrived or post._turns.is_waiting:
        post.take_in(0.0)
    return server, endpoint


def test_an_engine_with_many_messages_does_not_make_anothers_wait() -> None:
    many = [(b"one", messages.StatusQuery(number)) for number in range(MOST_WAITING)]
    _, endpoint = take_in([*many, (b"two", messages.StatusQuery(0))])
    assert len(endpoint.sent) == MOST_WAITING + 1
    assert b"two" in [peer for peer, _ in endpoint.sent[:2]]


def test_an_engine_that_overruns_the_server_has_to_begin_anew() -> None:
    many = [(b"one", messages.StatusQuery(number)) for number in range(MOST_WAITING + 1)]
    server, endpoint = take_in([*many, (b"two", messages.StatusQuery(0))])
    assert endpoint.sent[0] == (b"one", messages.Farewell(OVERRUN))
    assert [peer for peer, _ in endpoint.sent[1:]] == [b"two"]
    assert {key[0] for key in server._requests} == {b"two"}


def test_a_session_is_known_to_be_of_the_key_that_asked_for_it() -> None:
    hello = messages.Hello("s", 50, 500, False, messages.Terms("identity", "float32", 4))
    server, _ = take_in([(b"three", hello), (b"four", hello), (b"three", messages.StatusQuery(0))])
    assert {peer: server._keys[peer] for peer in (b"three", b"four")} == {
        b"three": "key of three",
        b"four": "key of four",
    }


def test_who_has_no_session_does_not_fill_the_memory() -> None:
    large = messages.StepBegin([messages.Open("a", [1] * 90_000, None)], [])
    server, endpoint = take_in([(b"three", large), (b"three", large), (b"one", messages.StatusQuery(0))])
    assert endpoint.sent[0] == (b"three", messages.Farewell(NO_SESSION)), "at once, and nothing of it waits"
    assert [peer for peer, _ in endpoint.sent] == [b"three", b"one"]
    assert server.num_sessions == 2


def test_an_engine_whose_replies_cannot_be_sent_loses_its_session() -> None:
    server, endpoint = take_in([(b"one", messages.StatusQuery(0)), (b"one", messages.StatusQuery(1))], [b"one"])
    assert isinstance(endpoint.sent[1][1], messages.Farewell)
    assert {key[0] for key in server._requests} == {b"two"}


def test_what_engines_are_still_owed_when_they_vanish_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_loop, "MAX_TIMED", 4)
    batch = messages.CommitBatch(1, 0.0, [messages.Commit("a", 3, [1], 0, None)], None)
    server = make_server(
        SpecBranchConfig.from_user({"model": "draft"}),
        FakeDraftModel(64, BLOCK_SIZE),
        KVBlocks(64, BLOCK_SIZE),
        Limits(),
        offer=Offer("identity", "float32", 4),
    )
    endpoint = Scripted([(f"{number}".encode(), batch) for number in range(20)])
    post = draft_loop._Post(server, endpoint)  # type: ignore[arg-type]
    while endpoint.arrived or post._turns.is_waiting:
        post.take_in(0.0)
    assert len(endpoint.sent) == 20 and len(post._taken_s) == 4, (
        "none has a session, so none has an answer to its batch"
    )


def test_the_plain_server_forgets_the_requests_of_an_engine_that_overran_it() -> None:
    server = make_server(
        SpecBranchConfig.from_user({"model": "draft"}),
        FakeDraftModel(64, BLOCK_SIZE),
        KVBlocks(64, BLOCK_SIZE),
        Limits(),
    )
    for peer in (b"one", b"two"):
        server.handle(peer, messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    assert server.overrun(b"one") == [(b"one", messages.Farewell(OVERRUN))]
    assert [key[0] for key in server._requests] == [b"two"]


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


def test_the_loop_turns_while_there_is_nothing_to_do_and_while_a_forward_is_under_way(
    ends: tuple[ClientChannel, ServerEndpoint],
) -> None:
    client, endpoint = ends
    model = GatedModel()
    server, thread = served(model, endpoint)

    def turns() -> bool:
        before_s = time.monotonic()
        until_s = before_s + TIMEOUT_MS / 1e3
        while server.turned_s <= before_s and time.monotonic() < until_s:
            time.sleep(0.01)
        return server.turned_s > before_s

    assert turns()
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    assert model.begun.acquire(timeout=TIMEOUT_MS / 1e3)
    assert turns()
    client.send(messages.Shutdown())
    model.may_end.release(1000)
    thread.join(TIMEOUT_MS / 1e3)
    assert not thread.is_alive()


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
