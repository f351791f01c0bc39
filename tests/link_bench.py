"""A `DraftLink` on the bench: a scripted server, a process that starts and dies when told, and a clock that only waits move."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vllm_specbranch import messages
from vllm_specbranch.back_off import HUNG_S
from vllm_specbranch.draft_link import DraftLink
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.placement import LONGEST_START_S
from vllm_specbranch.transport import ClientChannel, ServerEndpoint, memory_pair


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Process:
    """A server process that starts when asked and dies when told."""

    running: bool = False
    may_start: bool = True
    num_starts: int = 0
    num_kills: int = 0
    is_stopped: bool = False
    pid: int | None = None
    longest_start_s: float = LONGEST_START_S
    longest_silence_s: float = HUNG_S
    is_shared: bool = False
    refusals: list[bool] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"memory-{self.num_starts}"

    def is_running(self) -> bool:
        return self.running

    def ensure_running(self) -> bool:
        if self.running or not self.may_start:
            return False
        self.running = True
        self.num_starts += 1
        return True

    def kill(self) -> None:
        self.running = False
        self.num_kills += 1

    def refused(self, is_final: bool) -> None:
        self.running = False
        self.may_start = not is_final
        self.refusals.append(is_final)

    def stop(self) -> None:
        self.running = False
        self.is_stopped = True


@dataclass
class Waiting:
    """A channel whose blocking receive moves the clock instead of the world."""

    channel: ClientChannel
    clock: Clock
    blocks_sends: bool = False
    on_wait: Callable[[], None] | None = None

    @property
    def num_dropped(self) -> int:
        return self.channel.num_dropped

    def send(self, message: messages.EngineMessage) -> bool:
        return not self.blocks_sends and self.channel.send(message)

    def recv(self, timeout_ms: float) -> messages.ServerMessage | None:
        if self.on_wait is not None:
            self.on_wait()
        found = self.channel.recv(0.0)
        if found is None:
            self.clock.now_s += timeout_ms / 1e3
        return found

    def drain(self) -> None:
        self.channel.drain()

    def close(self) -> None:
        self.channel.close()


@dataclass
class Bench:
    wants_top_probs: bool = False
    terms: messages.Terms | None = None
    clock: Clock = field(default_factory=Clock)
    process: Process = field(default_factory=Process)
    counters: EngineCounters = field(default_factory=EngineCounters)
    endpoints: list[ServerEndpoint] = field(default_factory=list)
    channels: list[Waiting] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.link = DraftLink(
            self.process,
            vocab_size=50,
            max_model_len=100,
            counters=self.counters,
            wants_top_probs=self.wants_top_probs,
            terms=self.terms,
            open_channel=self.open_channel,
            clock=self.clock,
        )

    def open_channel(self, address: str) -> ClientChannel:
        assert address == self.process.address
        client, endpoint = memory_pair()
        self.endpoints.append(endpoint)
        self.channels.append(Waiting(client, self.clock))
        return self.channels[-1]

    def heard(self) -> list[messages.EngineMessage]:
        found = []
        while (item := self.endpoints[-1].recv(0.0)) is not None:
            self.peer = item[0]
            found.append(item[1])
        return found

    def say(self, message: messages.ServerMessage) -> None:
        assert self.endpoints[-1].send(self.peer, message)

    def bring_up(self) -> None:
        self.link.poll()
        hello = self.heard()[-1]
        assert isinstance(hello, messages.Hello)
        self.say(messages.Ready(hello.session, 64, 10, 4))
        self.link.poll()
        assert self.link.is_up


def batch(number: int) -> messages.DraftBatch:
    return messages.DraftBatch(number, True, [], [])
