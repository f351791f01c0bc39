"""Replay: how many rounds, hits and rollback tokens a policy needs on recorded greedy outputs, and how long that should take.

The draft server, its planner, its token tree, its KV blocks and the draft model are the real ones; time is not. A draft step takes
what `Times` says, and the target is a clock: a round's outcome is read off the recorded path. So what comes out is exact for every
policy, and free of the engine's own overhead: the distance to it is ours to lose.

    virtual time   |--- target forward ---|-- overhead --|--- target forward ---|
    draft server   step step step step step step ...       (a step in flight when a commit arrives is finished)
                                          ^ commit, and the reply, at once or after a wait for more draft tokens

Owns virtual time and the engine's side of the wire. Runs in the process of `tune` or a benchmark.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_specbranch import messages
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_server import DraftServer, Reply
from vllm_specbranch.draft_steps import Batch, Model
from vllm_specbranch.draft_work import MAX_DECODE_TOKENS, Limits
from vllm_specbranch.engine_pace import EnginePace
from vllm_specbranch.errors import SpecBranchError
from vllm_specbranch.kv_blocks import BlockCopy, KVBlocks
from vllm_specbranch.token_tree import Candidates

PEER = b"replay"
# As in `proposer`, which loads vLLM; a test holds the two together.
WAIT_SHARE = 0.5
# A server that waits without drafting (for want of blocks, say) is asked again after this share of a draft step.
POLL_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Times:
    """What forwards cost in virtual time; costs of a further token are relative to a forward with one token.

    Attributes:
        slack_ms: what the engine does between sending an outcome and looking for the reply; drafting goes on meanwhile.
        overhead_ms: what it does between the reply and the next forward.
    """

    target_forward_ms: float
    draft_step_ms: float
    target_token_cost: float = 0.0
    draft_token_cost: float = 0.02
    slack_ms: float = 0.0
    overhead_ms: float = 0.0

    @property
    def c(self) -> float:
        """Target rounds per draft step: the ratio that decides how much can be drafted during a round."""
        return self.round_ms(1) / self.draft_step_ms

    def forward_ms(self, num_tokens: int) -> float:
        """One forward of the target with `num_tokens` query tokens, over the whole batch."""
        return self.target_forward_ms * (1.0 + self.target_token_cost * (num_tokens - 1))

    def round_ms(self, num_tokens: int) -> float:
        """A forward and what the engine adds to it."""
        return self.forward_ms(num_tokens) + self.slack_ms + self.overhead_ms

    def step_ms(self, num_tokens: int) -> float:
        """One draft step of `num_tokens` query tokens."""
        return self.draft_step_ms * (1.0 + self.draft_token_cost * (num_tokens - 1))


@dataclass(frozen=True, slots=True)
class Recording:
    """The target's own greedy output.

    Attributes:
        prompt: token ids.
        tokens: token ids that followed.
        num_tokens: how many of them are to be generated; those beyond decide the last round's outcome only.
        classes: what a length head says of the next draft after each of `tokens`, as the newest; empty without a head.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    num_tokens: int
    classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert self.prompt and 1 <= self.num_tokens <= len(self.tokens), "a recording needs a prompt and its output"
        assert len(self.classes) in (0, len(self.tokens)), "a length head says something after every token, or nothing"


@dataclass(slots=True)
class Replayed:
    """What a replay counted. Rounds are counted per request, the one that ends its prefill included, as the draft server does.

    Attributes:
        num_tokens: generated.
        num_forwards: of the target; with one request at a time as many as rounds.
        num_draft_tokens, num_accepted_tokens: verified, and of those accepted.
        time_s: virtual time from the first forward to the end of the last.
        wait_s: of that, time in which the target waited for drafts.
        num_late_replies: that came after the reply timeout, so that the round went on without drafts.
        steady_s, num_steady_tokens: of `time_s` and `num_tokens`, the rounds of a full batch without a prefill; none for a
            calculated row.
        finished_s: virtual time at which each request ended, in the order of their ends.
        server: the draft server's counters; empty for a calculated row.
    """

    num_requests: int = 0
    num_tokens: int = 0
    num_rounds: int = 0
    num_forwards: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    time_s: float = 0.0
    wait_s: float = 0.0
    num_late_replies: int = 0
    steady_s: float = 0.0
    num_steady_tokens: int = 0
    finished_s: list[float] = field(default_factory=list)
    server: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_s(self) -> float:
        """In virtual time."""
        return self.num_tokens / self.time_s

    @property
    def steady_tokens_per_s(self) -> float:
        """The same of steady decoding; of the whole where there was none."""
        return self.num_steady_tokens / self.steady_s if self.steady_s else self.tokens_per_s

    @property
    def mean_acceptance_length(self) -> float:
        """Generated tokens per round, without the first token of each request and the round that made it."""
        rounds = self.num_rounds - self.num_requests
        return (self.num_tokens - self.num_requests) / rounds if rounds else math.nan


@dataclass(slots=True)
class VirtualClock:
    """The server's clock. Only the replay moves it."""

    now_s: float = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now_s


class _TimedModel:
    """The draft model; a forward moves the clock."""

    def __init__(self, model: Model, clock: VirtualClock, times: Times) -> None:
        self._model = model
        self._clock = clock
        self._times = times
        self.vocab_size = model.vocab_size
        self.max_model_len = model.max_model_len

    def forward(self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        """The model's, in time."""
        self._clock.now_s += self.duration_s(rows)
        return self.predict(rows, copies, top_k)

    def predict(self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        """The model's, in no time."""
        return self._model.forward(rows, copies, top_k)

    def duration_s(self, rows: Sequence[Row]) -> float:
        """A chunk of a prefill counts as one token: what is replayed is decoding."""
        sizes = (len(row.token_ids) for row in rows)
        return self._times.step_ms(sum(1 if size > MAX_DECODE_TOKENS else size for size in sizes)) / 1e3


class VirtualServer:
    """The real draft server in virtual time.

    Attributes:
        inbox: replies that have been made, as (when, reply).
    """

    def __init__(self, config: SpecBranchConfig, model: Model, kv: KVBlocks, limits: Limits, times: Times) -> None:
        self.clock = VirtualClock()
        self._model = _TimedModel(model, self.clock, times)
        self._poll_s = POLL_SHARE * times.draft_step_ms / 1e3
        self._server: DraftServer = make_server(config, self._model, kv, limits, self.clock)
        self._in_flight: tuple[Batch, list[Candidates], float] | None = None
        self.inbox: deque[tuple[float, messages.DraftBatch]] = deque()

    @property
    def counters(self) -> dict[str, int]:
        """Of the server."""
        return self._server.counters.as_dict()

    def handle(self, message: messages.EngineMessage) -> None:
        """Give the server a message now."""
        self._deliver(self._server.handle(PEER, message))

    def advance(self, until_s: float, *, to_reply: bool = False) -> None:
        """Let the server draft until `until_s`, or until it has made a reply."""
        move = self._move_in_flight if self._server.takes_messages_in_flight else self._move_by_turns
        while self.clock.now_s < until_s and not (to_reply and self.inbox):
            move(until_s)

    def _move_in_flight(self, until_s: float) -> None:
        """To the end of the forward under way, or to `until_s`; see `draft_loop._serve_in_flight`."""
        if self._in_flight is None:
            batch = self._server.begin_step()
            if batch is None:
                self._deliver(self._server.replies_due())
                self._idle(until_s, is_owing=self._server.has_pending)
                return
            end_s = self.clock.now_s + self._model.duration_s(batch.rows)
            self._in_flight = (batch, self._model.predict(batch.rows, batch.copies, batch.top_k), end_s)
        batch, candidates, end_s = self._in_flight
        self.clock.now_s = min(end_s, until_s)
        if end_s <= until_s:
            self._in_flight = None
            self._deliver(self._server.finish_step(batch, candidates))

    def _move_by_turns(self, until_s: float) -> None:
        """One whole draft step, even beyond `until_s`; see `draft_loop._serve_by_turns`."""
        before_s = self.clock.now_s
        replies, worked = self._server.step()
        self._deliver(replies)
        if self.clock.now_s == before_s:
            self._idle(until_s, is_owing=worked)

    def _idle(self, until_s: float, *, is_owing: bool) -> None:
        """Let time pass without a forward; a server that owes something is asked again soon."""
        if math.isinf(until_s) and not is_owing and not self.inbox:
            raise SpecBranchError("the replayed draft server owes a reply and has nothing to do")
        if not (self.inbox and math.isinf(until_s)):
            self.clock.now_s = min(until_s, self.clock.now_s + self._poll_s) if is_owing else until_s

    def close(self) -> None:
        """End the forward under way, check that the server is sound, and give its KV blocks back."""
        if self._in_flight is not None:
            self._move_in_flight(math.inf)
        self._server.check_integrity()
        # A peer that says hello anew has no requests.
        self._server.handle(
            PEER, messages.Hello("over", self._model.vocab_size, self._model.max_model_len, False, None)
        )

    def _deliver(self, replies: Sequence[Reply]) -> None:
        for _, reply in replies:
            if isinstance(reply, messages.Refused | messages.Failure):
                raise SpecBranchError(f"the draft server does not take what is replayed: {reply.reason}")
            if isinstance(reply, messages.DraftBatch) and reply.is_final:
                self.inbox.append((self.clock.now_s, reply))


@dataclass(slots=True)
class _Request:
    """One recording on its way: `num_done` tokens are committed, `chunk` is what the next round verifies."""

    name: str
    recording: Recording
    num_done: int = 0
    chunk: list[int] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return self.num_done >= self.recording.num_tokens

    def verify(self) -> messages.Commit:
        """One round: the accepted part of the chunk, and the target's own token after it."""
        position = len(self.recording.prompt) + self.num_done
        ahead = self.recording.tokens[self.num_done :]
        num_accepted = 0
        for ours, theirs in zip(self.chunk, ahead, strict=False):
            if ours != theirs:
                break
            num_accepted += 1
        tokens = list(ahead[: num_accepted + 1])
        self.num_done += len(tokens)
        classes = self.recording.classes
        head_class = classes[self.num_done - 1] if classes else None
        commit = messages.Commit(self.name, position, tokens, len(self.chunk), head_class)
        self.chunk = []
        return commit


class _Engine:
    """The engine in virtual time: rounds in lockstep over at most `batch_size` requests."""

    def __init__(
        self, config: SpecBranchConfig, server: VirtualServer, recordings: Sequence[Recording], times: Times
    ) -> None:
        self._config = config
        self._server = server
        self._times = times
        self._waiting = deque(_Request(f"r{index}", one) for index, one in enumerate(recordings))
        self._running: list[_Request] = []
        self._closes: list[str] = []
        self._round = 0
        self._pace = EnginePace(config.reply_timeout_ms)
        self._is_late = False
        self.now_s = 0.0
        self.result = Replayed(len(recordings), sum(one.num_tokens for one in recordings))

    def run(self, batch_size: int) -> Replayed:
        """All requests to their ends."""
        while self._waiting or self._running:
            self._begin(batch_size)
            members, before, begun_s = list(self._running), self._num_done(self._running), self.now_s
            is_steady = len(members) == batch_size and all(one.num_done for one in members)
            self._verify()
            self._pass(self._times.slack_ms)
            if self._running:
                self._collect()
            self._pass(self._times.overhead_ms)
            if is_steady:
                self.result.steady_s += self.now_s - begun_s
                self.result.num_steady_tokens += self._num_done(members) - before
        self.result.time_s = self.now_s
        if self._config.deterministic:
            # The engine waits for every reply, and this server takes in a message only when it is through with the one before.
            self._collect()
        self.result.server = self._server.counters
        return self.result

    @staticmethod
    def _num_done(requests: Sequence[_Request]) -> int:
        """Tokens that count: a last round may commit more than is wanted."""
        return sum(min(one.num_done, one.recording.num_tokens) for one in requests)

    def _pass(self, duration_ms: float) -> None:
        """The engine is busy with itself."""
        self.now_s += duration_ms / 1e3
        self._server.advance(self.now_s)

    def _begin(self, batch_size: int) -> None:
        """Opens and closes go out, and the forward begins."""
        opens = []
        while self._waiting and len(self._running) < batch_size:
            request = self._waiting.popleft()
            self._running.append(request)
            opens.append(messages.Open(request.name, list(request.recording.prompt), None))
        if opens or self._closes:
            self._server.handle(messages.StepBegin(opens, self._closes))
            self._closes = []

    def _verify(self) -> None:
        """The forward, and its outcomes; those of requests that end with it go out too, as the engine sends them."""
        num_tokens = sum(1 + len(request.chunk) for request in self._running)
        is_prefill = any(not request.num_done for request in self._running)
        self._pace.begin(self.now_s, 0 if is_prefill else num_tokens)
        self.now_s += self._times.forward_ms(num_tokens) / 1e3
        self._pace.sampled(self.now_s)
        self._server.advance(self.now_s)
        commits = [request.verify() for request in self._running]
        result = self.result
        result.num_forwards += 1
        result.num_rounds += len(commits)
        result.num_draft_tokens += sum(one.num_draft_tokens for one in commits)
        result.num_accepted_tokens += sum(min(one.num_draft_tokens, len(one.tokens) - 1) for one in commits)
        self._round += 1
        max_wait_ms = WAIT_SHARE * self._pace.reply_timeout_ms
        self._server.handle(messages.CommitBatch(self._round, max_wait_ms, commits, self._pace.message))
        self._pace.sent(self.now_s)
        self._closes = [request.name for request in self._running if request.is_finished]
        result.finished_s += [self.now_s] * len(self._closes)
        self._running = [request for request in self._running if not request.is_finished]

    def _collect(self) -> None:
        """Wait for the reply; as `DraftLink.receive`, after a late one nothing is waited for until the server speaks again."""
        asked_s = self.now_s
        self._pace.looked(asked_s)
        reply: messages.DraftBatch | None = None
        while reply is None:
            if not self._server.inbox:
                patience_s = math.inf if self._config.deterministic else self._pace.reply_timeout_ms / 1e3
                until_s = asked_s + (0.0 if self._is_late else patience_s)
                self._server.advance(until_s, to_reply=True)
                if not self._server.inbox:
                    self._is_late, self.now_s = True, until_s
                    self.result.num_late_replies += 1
                    break
            made_s, batch = self._server.inbox.popleft()
            self._is_late = False
            if batch.round == self._round:
                reply, self.now_s = batch, max(self.now_s, made_s)
        self.result.wait_s += self.now_s - asked_s if self._running else 0.0
        chunks = {draft.request_id: draft for draft in reply.drafts} if reply is not None else {}
        for request in self._running:
            draft = chunks.get(request.name)
            if draft is not None:
                assert draft.position == len(request.recording.prompt) + request.num_done
                request.chunk = draft.tokens


def replay(
    config: SpecBranchConfig,
    model: Model,
    kv: KVBlocks,
    recordings: Sequence[Recording],
    times: Times,
    batch_size: int = 1,
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Replayed:
    """Replay recordings with the settings of an engine.

    Args:
        config: the settings; with `deterministic`, counts are those of the real engine whatever the times are.
        model: the draft model; a `draft_memory.RememberingModel` makes further replays of the same recordings quicker.
        kv: its block pool, empty.
        recordings: one per request.
        times: of forwards.
        batch_size: requests in the engine at the same time.
        limits: sizes of a draft step.

    Mutates: `kv`, which is empty again afterwards.

    Raises:
        SpecBranchError: the server refuses what is replayed, such as tokens outside the draft's vocabulary.
    """
    server = VirtualServer(config, model, kv, limits, times)
    server.handle(messages.Hello("replay", model.vocab_size, model.max_model_len, False, None))
    result = _Engine(config, server, recordings, times).run(batch_size)
    server.close()
    return result
