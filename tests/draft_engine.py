"""The engine's side of a draft server in memory, which checks every reply."""

from array import array
from dataclasses import dataclass, field

from tests.fakes import FakeDraftModel
from vllm_specbranch import messages
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_server import DraftServer, Reply
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.planner import Planner

PEER = b"engine"
BLOCK_SIZE = 4


@dataclass
class Clock:
    """Time stands still unless a test moves it; each reading takes a microsecond."""

    now_s: float = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-6
        return self.now_s


@dataclass
class Engine:
    """The other side: keeps the true sequences and checks every reply against the draft model's own chain, greedy or drawn."""

    server: DraftServer
    model: FakeDraftModel
    gamma: int
    top_k: int
    planner: Planner
    threshold: float
    clock: Clock
    samplings: dict[str, messages.Sampling | None] = field(default_factory=dict)
    sequences: dict[str, list[int]] = field(default_factory=dict)
    drafts: dict[str, list[int]] = field(default_factory=dict)
    hits: dict[str, bool] = field(default_factory=dict)
    round: int = 0
    num_ahead: int = 0
    in_flight: bool = False

    def tell(self, message: messages.EngineMessage) -> list[Reply]:
        """Give the server a message, while a forward is under way if `in_flight`."""
        batch = self.server.begin_step() if self.in_flight else None
        replies = self.server.handle(PEER, message)
        if batch is not None:
            replies += self.server.finish_step(batch, self.server.run_forward(batch))
        return replies

    def open(self, name: str, tokens: list[int], sampling: messages.Sampling | None = None) -> None:
        self.sequences[name] = list(tokens)
        self.samplings[name] = sampling
        self.drafts[name] = []
        assert self.tell(messages.StepBegin([messages.Open(name, tokens, sampling)], [])) == []

    def close(self, name: str) -> None:
        del self.sequences[name], self.drafts[name]
        self.tell(messages.StepBegin([], [name]))

    def chain(self, name: str, context: list[int], num_tokens: int) -> list[int]:
        """What the draft model says or draws after a context, computed without tree or KV."""
        return self.model.chain(context, num_tokens, self.top_k, self.samplings[name])

    def run(self, num_steps: int) -> None:
        """Let the server draft ahead."""
        for _ in range(num_steps):
            replies, worked = self.server.step()
            assert replies == []
            self.server.check_integrity()
            if not worked:
                break

    def commit(
        self,
        outcomes: dict[str, tuple[int, list[int]]],
        max_wait_ms: float = 1e4,
        most_steps: int = 500,
        pace: messages.Pace | None = None,
        round_s: float = 0.0,
        head_class: int | None = None,
    ) -> None:
        """Commit `tokens` at `position` per request, `round_s` after whatever was before, collect the reply, check it."""
        self.clock.now_s += round_s
        self.round += 1
        commits = []
        for name, (position, tokens) in outcomes.items():
            self.sequences[name] = self.sequences[name][:position] + tokens
            commits.append(messages.Commit(name, position, tokens, len(self.drafts[name]), head_class))
        replies = self.tell(messages.CommitBatch(self.round, max_wait_ms, commits, pace))
        for _ in range(most_steps):
            if self.take_ahead(replies, head_class):
                break
            more, _ = self.server.step()
            replies += more
        self.server.check_integrity()
        self.take_ahead(replies, head_class)
        assert len(replies) == 1, "a commit batch is answered once, in bounded work"
        peer, batch = replies[0]
        assert peer == PEER
        assert isinstance(batch, messages.DraftBatch)
        assert batch.round == self.round
        assert batch.unknown == []
        assert {draft.request_id for draft in batch.drafts} == set(outcomes)
        for draft in batch.drafts:
            sequence = self.sequences[draft.request_id]
            assert draft.position == len(sequence)
            assert len(draft.tokens) <= self.gamma
            assert draft.tokens == self.chain(draft.request_id, sequence, len(draft.tokens))
            self.check_rules(draft, sequence, head_class)
            self.drafts[draft.request_id] = draft.tokens
            self.hits[draft.request_id] = draft.hit

    def take_ahead(self, replies: list[Reply], head_class: int | None = None) -> bool:
        """Check and drop what was sent ahead of the reply; returns whether the reply has come."""
        while replies and isinstance(batch := replies[0][1], messages.DraftBatch) and not batch.is_final:
            replies.pop(0)
            assert batch.round == self.round
            for draft in batch.drafts:
                assert self.samplings[draft.request_id] is not None, "greedy drafts need no haste"
                sequence = self.sequences[draft.request_id]
                assert draft.tokens == self.chain(draft.request_id, sequence, len(draft.tokens))
                self.check_rules(draft, sequence, head_class)
                self.num_ahead += 1
        return bool(replies)

    def check_rules(self, draft: messages.Draft, sequence: list[int], head_class: int | None = None) -> None:
        """Rule 1: q is what each token was drawn from. Rule 2: no token beyond a place where the stop rule ends the chunk."""
        sampling = self.samplings[draft.request_id]
        ids, probs = array("i"), array("f")
        assert head_class != 0 or not draft.tokens
        for index in range(len(draft.tokens)):
            candidates = self.model.predict([*sequence, *draft.tokens[:index]], self.top_k, sampling)
            assert head_class == 2 or self.planner.score(candidates) >= self.threshold
            ids.extend(candidates.token_ids)
            probs.extend(candidates.probs)
        expected = (b"", b"") if sampling is None else (ids.tobytes(), probs.tobytes())
        assert (draft.q_ids, draft.q_probs) == expected

    def follow(self, name: str, num_accepted: int, then: int | None = None) -> tuple[int, list[int]]:
        """An outcome that accepts part of the chunk; then the draft's own next token, or `then`."""
        sequence, draft = self.sequences[name], self.drafts[name]
        accepted = draft[:num_accepted]
        final = self.chain(name, sequence + accepted, 1)[0] if then is None else then
        return len(sequence), [*accepted, final]


def make_engine(num_blocks: int = 400, limits: Limits | None = None, **keys: object) -> Engine:
    user: dict[str, object] = {
        "model": "draft",
        "policy": "specbranch",
        "num_speculative_tokens": 4,
        "max_branches": 4,
    } | keys
    if user.get("policy") == "pearl":
        del user["max_branches"]
    config = SpecBranchConfig.from_user(user)
    model = FakeDraftModel(num_blocks, BLOCK_SIZE)
    planner = Planner(config)
    clock = Clock()
    server = make_server(config, model, KVBlocks(num_blocks, BLOCK_SIZE), limits or Limits(), clock)
    replies = server.handle(PEER, messages.Hello("s", model.vocab_size, 500, False, None))
    assert replies == [(PEER, messages.Ready("s", model.max_model_len, num_blocks, BLOCK_SIZE))]
    threshold = 0.0 if config.stop_rule == "none" else config.stop_threshold
    return Engine(server, model, config.num_speculative_tokens, planner.num_candidates, planner, threshold, clock)
