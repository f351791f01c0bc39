"""Mutated messages: a corpus of real ones, ways to spoil them, and a real draft server with a fake model that has to bear it.

The corpus is recorded from a session of a real server, so it speaks today's protocol; one random generator decides everything else.
"""

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tests.draft_engine import BLOCK_SIZE, Clock
from tests.fakes import FakeDraftModel
from vllm_specbranch import messages
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_link import DraftLink
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_sessions import LEASE_S, Offer, SharedDraftServer
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.errors import WireError
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.messages import Commit, CommitBatch, Hello, Open, Pace, Sampling, StatusQuery, StepBegin, Terms
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.remote_server import RemoteServer

VERSION = bytes([messages.PROTOCOL_VERSION])
NUM_BLOCKS = 96
VOCAB_SIZE = 50
MAX_MODEL_LEN = 200
MAX_REQUESTS = 24
TERMS = Terms("identity", "float32", 4)
PEERS = [bytes([0, number]) for number in range(12)]
NAMES = ["a", "b", "c", "unknown", "", *(f"request {number}" for number in range(40))]
# What decoders and servers stumble over.
VALUES: list[Any] = [0, 1, -1, 2, 3, 49, 50, 2**7, 2**15, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
VALUES += [0.0, -0.0, 0.5, 1.0, 1e-9, 2.0, 6e4, 1e15, float("inf"), float("nan"), None, True, False]
VALUES += ["", "a", "b", "x" * 256, "x" * 257, "\0", b"", b"\0" * 16, [], [1], [[]], {}]
MARKS = [0x80, 0x90, 0xC0, 0xC1, 0xC4, 0xC6, 0xCA, 0xCB, 0xCF, 0xD3, 0xD9, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF]


def make_shared_server(clock: Callable[[], float]) -> SharedDraftServer:
    """A real server; small in everything, so that its limits are reached."""
    config = SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": 4, "max_branches": 4})
    model = FakeDraftModel(NUM_BLOCKS, BLOCK_SIZE, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
    offer = Offer("identity", "float32", 4, max_requests=MAX_REQUESTS)
    server = make_server(config, model, KVBlocks(NUM_BLOCKS, BLOCK_SIZE), Limits(), clock, offer=offer)
    assert isinstance(server, SharedDraftServer)
    return server


def record_session() -> list[bytes]:
    """Real messages of all kinds in both directions, as they are on the wire."""
    clock = Clock()
    server = make_shared_server(clock)
    wire: list[messages.Message] = []

    def say(message: messages.EngineMessage, peer: bytes = PEERS[0]) -> None:
        wire.append(message)
        wire.extend(reply for _, reply in server.handle(peer, message))

    say(StatusQuery(1))
    for index, terms in enumerate((TERMS, None, Terms("other", "bfloat16", 64))):
        say(Hello(f"life {index}", VOCAB_SIZE, MAX_MODEL_LEN, index == 0, terms), PEERS[index])
    sampling = Sampling(0.8, 8, 12345678901234)
    say(StepBegin([Open("a", list(range(20)), None), Open("b", [1, 2, 3], sampling), Open("c", [7], None)], []))
    for round_number in range(1, 6):
        for _ in range(8):
            wire.extend(reply for _, reply in server.step()[0])
        commits = [
            Commit("a", 19 + round_number, [round_number], 2, round_number % 3),
            Commit("b", 2 + round_number, [4], 0, None),
        ]
        say(CommitBatch(round_number, 5.0, [*commits, Commit("unknown", 3, [4], 0, None)], Pace(7, 20_000.0, 300.0)))
    say(StepBegin([], ["a", "c"]))
    say(StatusQuery(2))
    say(messages.Shutdown())
    replies = [one for one in wire if isinstance(one, messages.DraftBatch)]
    wire += [msgspec.structs.replace(one, report=server.report(PEERS[0])) for one in replies]
    wire.append(messages.Failure("token 51 is outside the vocabulary of 50"))
    wire.extend(reply for _, reply in server.drain("this draft server ends"))
    return [messages.encode(one) for one in wire]


def is_for_server(data: bytes) -> bool:
    """Whether a message goes from an engine to a server."""
    try:
        messages.decode_for_server(data)
    except WireError:
        return False
    return True


def spoil_bytes(data: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """Change a few bytes, without knowing what they mean."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(spoilt) + 1)
        kind = rng.randrange(8)
        if kind == 0 and spoilt:
            spoilt[at % len(spoilt)] ^= 1 << rng.randrange(8)
        elif kind == 1 and spoilt:
            spoilt[at % len(spoilt)] = rng.randrange(256)
        elif kind == 2 and spoilt:
            spoilt[at % len(spoilt)] = rng.choice(MARKS)
        elif kind == 3:
            spoilt[at:at] = rng.randbytes(rng.choice((1, 2, 4, 9)))
        elif kind == 4:
            del spoilt[at : at + rng.choice((1, 2, 4, 9))]
        elif kind == 5:
            del spoilt[at:]
        elif kind == 6:
            spoilt[at:at] = spoilt[at : at + rng.randrange(32)]
        else:
            other = rng.choice(corpus)
            spoilt[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(spoilt)


def spoil_values(data: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """Change a few values of a message, so that it often stays one."""
    plain = msgspec.msgpack.decode(data[1:])
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(plain))
        if not places:
            break
        holder, key = rng.choice(places)
        kind = rng.randrange(5) if rng.random() < 0.9 else 5
        old = holder[key]
        if kind == 0:
            # Mostly of the same type: the others are refused at once.
            alike = [one for one in VALUES if type(one) is type(old)]
            holder[key] = copy.deepcopy(rng.choice(alike if alike and rng.random() < 0.8 else VALUES))
        elif kind == 1 and isinstance(old, int) and not isinstance(old, bool):
            holder[key] = old + rng.choice((-2, -1, 1, 2))
        elif kind == 2 and isinstance(old, str):
            holder[key] = rng.choice(NAMES)
        elif kind == 3 and isinstance(old, list):
            holder[key] = old * rng.choice((0, 2, 3))
        elif kind == 4 and isinstance(old, list) and old:
            old.pop(rng.randrange(len(old)))
        elif kind == 5:
            other = msgspec.msgpack.decode(rng.choice(corpus)[1:])
            donor, donor_key = rng.choice(list(_places(other)) or [([None], 0)])
            holder[key] = donor[donor_key]
    try:
        return VERSION + msgspec.msgpack.encode(plain)
    except (OverflowError, RecursionError):
        return data


def _places(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Everywhere in nested lists and dictionaries where a value is."""
    items = enumerate(plain) if isinstance(plain, list) else plain.items() if isinstance(plain, dict) else ()
    for key, value in list(items):
        yield plain, key
        yield from _places(value)


@dataclass
class Scripted:
    """A channel on which whatever was put there arrives."""

    num_dropped: int = 0
    arrivals: list[messages.ServerMessage] = field(default_factory=list)

    def send(self, message: messages.EngineMessage) -> bool:
        return True

    def recv(self, timeout_ms: float) -> messages.ServerMessage | None:
        return self.arrivals.pop(0) if self.arrivals else None

    def drain(self) -> None:
        self.arrivals.clear()

    def close(self) -> None:
        self.arrivals.clear()


class Fuzzer:
    """Feeds mutated messages to a real server, and to the engine's end of a line.

    Args:
        seed: of everything that is random.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.server = make_shared_server(self.clock)
        self.corpus = record_session()
        self.to_server = [one for one in self.corpus if is_for_server(one)]
        self.channel = Scripted()
        self.link = DraftLink(
            RemoteServer(["tcp://fuzz:1"], clock=self.clock),
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            counters=EngineCounters(),
            terms=TERMS,
            open_channel=lambda _: self.channel,
            clock=self.clock,
        )
        self.num_to_server = self.num_to_engine = self.num_refused = self.num_answers = 0
        self.most_requests = 0

    def run(self, count: int) -> None:
        """So many mutated messages, with draft steps, real messages and the passing of time in between."""
        for number in range(count):
            spoil = spoil_values if self.rng.random() < 0.6 else spoil_bytes
            original = self.rng.choice(self.to_server if self.rng.random() < 0.7 else self.corpus)
            self.take(spoil(original, self.corpus, self.rng))
            if number % 40 == 0:
                self.behave()
            if number % 2048 == 0:
                self.check()
        self.check()

    def take(self, data: bytes) -> None:
        """What both ends do with bytes that arrive."""
        try:
            message = messages.decode_for_server(data)
        except WireError:
            pass
        else:
            self.num_to_server += 1
            self.tell(self.rng.choice(PEERS), message)
        try:
            answer = messages.decode_for_engine(data)
        except WireError:
            return
        self.num_to_engine += 1
        self.link.poll()
        self.channel.arrivals.append(answer)
        self.link.receive(self.rng.randrange(8), 1.0)
        self.link.poll()

    def tell(self, peer: bytes, message: messages.EngineMessage) -> None:
        """As the loop of the server does it; a batch may be under way meanwhile."""
        batch = self.server.begin_step() if self.rng.random() < 0.02 else None
        try:
            replies = self.server.handle(peer, message)
        except WireError as error:
            replies = [(peer, self.server.refuse(error))]
            self.num_refused += 1
        if batch is not None:
            replies += self.server.finish_step(batch, self.server.run_forward(batch))
        for _, reply in replies:
            messages.decode_for_engine(messages.encode(reply))
            self.num_answers += 1

    def behave(self) -> None:
        """A real engine among the others says what real engines do, and time passes."""
        peer, rng = self.rng.choice(PEERS), self.rng
        self.clock.now_s += rng.choice((0.001, 0.01, 0.1, LEASE_S / 50))
        if peer not in self.server._peers or rng.random() < 0.05:
            self.tell(peer, Hello("s", VOCAB_SIZE, MAX_MODEL_LEN, False, TERMS))
        name = rng.choice(NAMES)
        sampling = rng.choice((None, Sampling(1.0, 4, rng.randrange(1000))))
        self.tell(peer, StepBegin([Open(name, [rng.randrange(VOCAB_SIZE) for _ in range(6)], sampling)], []))
        self.server.step()
        self.most_requests = max(self.most_requests, len(self.server._requests))
        self.tell(peer, CommitBatch(1, 0.0, [Commit(name, 6, [rng.randrange(VOCAB_SIZE)], 0, None)], None))

        if rng.random() < 0.05:
            self.outgrow(peer, name)

    def outgrow(self, peer: bytes, name: str) -> None:
        """An answer comes to the end of the model's context, and an engine gone wrong goes on."""
        for _ in range(6):
            request = self.server._requests.get((peer, name))
            if request is None:
                return
            assert request.tree.num_tokens <= MAX_MODEL_LEN
            commit = Commit(name, request.tree.num_tokens, [self.rng.randrange(VOCAB_SIZE)] * 60, 0, None)
            self.tell(peer, CommitBatch(1, 0.0, [commit], None))
        raise AssertionError("a sequence grows beyond the model's context")

    def check(self) -> None:
        """Nothing has been lost, and nothing grows."""
        server = self.server
        server.check_integrity()
        assert len(server._peers) <= len(PEERS)
        assert set(server._peers) == set(server._heard_s), "what is known of an engine ends with its session"
        assert {peer for peer, _ in server._requests} <= set(server._heard_s)
        assert all(request.tree.num_tokens <= MAX_MODEL_LEN for request in server._requests.values())
