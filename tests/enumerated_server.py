"""The real draft server inside the exact enumeration: requests from their first output token to their last, path by path.

Owns `Serving` (how a server is set up, and what befalls it) and the engine's side of the wire, played in memory: open, commit, wait
for the reply, verify by the reference's rule with just the q that came. The server, its planner, its token tree, its KV blocks and
`draw` are the real ones. Not real are its model, which looks its distributions up by the context that it reads back through paged
KV; its clock, which a reading moves by a microsecond; and its random numbers, one `LazyUniform` per (key, prefix).

    reply -> free draft steps, as many as the world says -> verification -> CommitBatch -> draft steps up to the reply or a limit
"""

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any, cast

from tests.draft_engine import PEER, Clock
from tests.fakes import FakeDraftModel
from tests.reference_round import (
    Drafted,
    Explorer,
    Generation,
    LazyUniform,
    Prefix,
    Row,
    Rules,
    Table,
    World,
    autoregressive,
    max_difference,
)
from vllm_specbranch import messages
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_server import Reply
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.token_tree import Candidates

MODEL_VOCAB_SIZE = 10  # The ids above those of the output are prompts: one id per request, repeated.
GRAIN = 16  # Probabilities are multiples of 1/16, which float32 and float64 have exactly, and so do their sums.
MOST_STEPS = 200  # More draft steps for one reply are a hang.


@dataclass(frozen=True)
class Serving:
    """A draft server, what it drafts for, and what befalls it.

    Attributes:
        rules: horizon, top m, and what befalls a chunk between server and verification (lost replies, trims, lost records); gamma
            is the server's as well.
        settings: of the server, beside gamma, as a user gives them.
        num_prompt_tokens: of each request.
        num_requests: that share the server, each with its own stream of numbers.
        num_blocks, block_size: the draft KV pool.
        limits: sizes of a draft step.
        free_steps: `[..]` weight of each number of draft steps that the target leaves time for.
        patience: `[..]` weight of each number of draft steps that the engine waits for a reply; then it uses what was sent
            ahead, and if that is nothing it does not wait in the next round. None: it waits for the reply.
        max_wait_ms: as in `CommitBatch`.
        in_flight: every message finds a forward under way.
        head_classes: `[3]` weight of each class that a length head gives a commit; None: there is no head.
        head_seed: of a head whose class is some function of the committed tokens; instead of `head_classes`.
        round_us: (time of a round without tokens, time of each token), which the engine tells the server; None: it does not.
    """

    rules: Rules
    settings: Mapping[str, object] = field(default_factory=dict)
    num_prompt_tokens: int = 1
    num_requests: int = 1
    num_blocks: int = 64
    block_size: int = 2
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    free_steps: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 1.0)
    patience: tuple[float, ...] | None = None
    max_wait_ms: float = 1e4
    in_flight: bool = False
    head_classes: tuple[float, float, float] | None = None
    head_seed: int | None = None
    round_us: tuple[float, float] | None = None


class TableModel(FakeDraftModel):
    """A draft model whose distributions are given, by what follows the prompt, and certain beyond the horizon.

    Args:
        tables: one per prompt id, the greatest id first.
    """

    def __init__(self, serving: Serving, tables: Sequence[Table]) -> None:
        super().__init__(serving.num_blocks, serving.block_size, MODEL_VOCAB_SIZE)
        self._serving = serving
        self._tables = tables

    def predict(self, context: Sequence[int], top_k: int, sampling: messages.Sampling | None = None) -> Candidates:
        assert sampling is not None
        count = self._serving.num_prompt_tokens
        prompt, output = context[:count], tuple(context[count:])
        assert len(set(prompt)) == 1 and len(prompt) == count, f"another prompt: {prompt}"
        table = self._tables[MODEL_VOCAB_SIZE - 1 - prompt[0]]
        row = table(output) if len(output) < self._serving.rules.horizon else certain(len(table(())))
        return best_first(row, sampling.top_m)


@cache
def certain(vocab_size: int) -> Row:
    """All on token 0: what no one asks for is no fork."""
    return (1.0, *[0.0] * (vocab_size - 1))


@cache
def best_first(row: Row, top_m: int) -> Candidates:
    """A row as the draft model gives it; exact, so it must not have more than `top_m` tokens."""
    ids = sorted(range(len(row)), key=lambda token: -row[token])[:top_m]
    assert sum(row[token] for token in ids) == 1.0
    return Candidates(tuple(ids), tuple(row[token] for token in ids))


def exact_table(seed: str, vocab_size: int, top_m: int | None = None) -> Table:
    """A distribution for any prefix, in multiples of 1/16, of at most `top_m` tokens: with ties, zeros and certain tokens."""

    @cache
    def table(prefix: Prefix) -> Row:
        random = Random(f"{seed} {prefix}")
        support = random.sample(range(vocab_size), top_m or vocab_size)
        cuts = sorted(random.choice((0, 2, 4, 5, 7, 8, 9, 12, 15)) for _ in support[1:])
        shares = [high - low for low, high in zip([0, *cuts], [*cuts, GRAIN], strict=True)]
        weights = dict(zip(support, shares, strict=True))
        return tuple(weights.get(token, 0) / GRAIN for token in range(vocab_size))

    return table


class Served(Generation):
    """One request whose chunks come from the server; its verification is the reference's."""

    def __init__(self, world: World, target: Table, draft: Table, rules: Rules) -> None:
        super().__init__(world, target, draft, rules)
        self.reply: messages.Draft | None = None

    @property
    def is_finished(self) -> bool:
        return len(self.output) == self.rules.horizon

    def chain(self) -> list[Drafted]:
        """The chunk that came, with the q that came."""
        reply, self.reply = self.reply, None
        if reply is None:
            return []
        ids, probs = array("i", reply.q_ids), array("f", reply.q_probs)
        width = len(ids) // max(1, len(reply.tokens))
        chunk = []
        prefix = self.output
        for index, token in enumerate(reply.tokens[: self.rules.horizon - len(prefix)]):
            here = slice(index * width, (index + 1) * width)
            chunk.append(Drafted(prefix, token, dict(zip(ids[here], probs[here], strict=True))))
            prefix += (token,)
        return chunk

    def submitted(self) -> list[Drafted]:
        chunk = self.chain()
        if not chunk or self.world.happens(self.rules.lost_replies):
            return []
        return self.admitted(chunk)

    def next_round(self) -> tuple[int, list[int]]:
        """Verify what came; returns (draft tokens verified, tokens committed)."""
        chunk = self.submitted()
        tokens = self.verified(chunk)
        self.commit(tokens)
        return len(chunk), tokens


class Engine:
    """The engine's side of one path.

    Args:
        seen: counts what happened, over all paths.
    """

    def __init__(self, world: World, serving: Serving, requests: Sequence[Served], seen: Counter[str]) -> None:
        self._world = world
        self._serving = serving
        self._requests = {f"r{index}": request for index, request in enumerate(requests)}
        self._seen = seen
        self._round = 0
        self._has_given_up = False
        self._numbers: dict[tuple[int, int], LazyUniform] = {}
        model = TableModel(serving, [request.draft for request in requests])
        kv = KVBlocks(serving.num_blocks, serving.block_size)
        config = settings_of(serving)
        self.server = make_server(config, model, kv, serving.limits, Clock(), cast(Any, self._number))

    def _number(self, key: int, prefix: int) -> LazyUniform:
        """The real stream has one number per key and prefix; the real `draw` only compares it."""
        return self._numbers.setdefault((key, prefix), LazyUniform(self._world))

    def run(self) -> tuple[Prefix, ...]:
        """All requests to their ends; returns their outputs."""
        self.server.handle(PEER, messages.Hello("s", MODEL_VOCAB_SIZE, 500, False, None))
        self._tell(messages.StepBegin([self._open(name) for name in self._requests], []))
        while not all(request.is_finished for request in self._requests.values()):
            self._take_steps(self._world.choose(self._serving.free_steps))
            self._next_round()
        self.server.check_integrity()
        self._seen.update(self.server.counters.as_dict())
        return tuple(request.output for request in self._requests.values())

    def _tell(self, message: messages.EngineMessage) -> list[Reply]:
        """Give the server a message, while a forward is under way if the case wants that."""
        batch = self.server.begin_step() if self._serving.in_flight else None
        replies = self.server.handle(PEER, message)
        if batch is not None:
            replies += self.server.finish_step(batch, self.server.run_forward(batch))
        return replies

    def _open(self, name: str) -> messages.Open:
        index = list(self._requests).index(name)
        prompt = [MODEL_VOCAB_SIZE - 1 - index] * self._serving.num_prompt_tokens
        return messages.Open(name, prompt, messages.Sampling(1.0, self._serving.rules.top_m, index))

    def _take_steps(self, count: int) -> None:
        for _ in range(count):
            _, worked = self.server.step()
            if not worked:
                break

    def _next_round(self) -> None:
        self._round += 1
        commits: list[messages.Commit] = []
        closes: list[str] = []
        num_tokens = 0
        for name, request in self._requests.items():
            if request.is_finished:
                continue
            position = self._serving.num_prompt_tokens + len(request.output)
            num_draft_tokens, tokens = request.next_round()
            num_tokens += 1 + num_draft_tokens
            self._seen[f"{num_draft_tokens} draft tokens"] += 1
            if request.is_finished:
                closes.append(name)
            else:
                commits.append(
                    messages.Commit(name, position, tokens, num_draft_tokens, self._head_class(request.output))
                )
        if closes:
            self._tell(messages.StepBegin([], closes))
        if commits:
            pace = None
            if self._serving.round_us is not None:
                base_us, token_us = self._serving.round_us
                # One token more than there are: rounds without drafts say nothing of the slope, and so short a text has few others.
                pace = messages.Pace(num_tokens + 1, base_us + token_us * num_tokens, 0.0)
            self._collect(messages.CommitBatch(self._round, self._serving.max_wait_ms, commits, pace))

    def _head_class(self, output: Prefix) -> int | None:
        weights, seed = self._serving.head_classes, self._serving.head_seed
        found = None if weights is None else self._world.choose(weights)
        if seed is not None:
            found = Random(f"{seed} {output}").randrange(3)
        self._seen[f"class {found}"] += 1
        return found

    def _collect(self, batch: messages.CommitBatch) -> None:
        """Send a batch; take the reply, or what was sent ahead of it when the engine waits no longer."""
        if self._has_given_up:
            self._has_given_up = False
            self._tell(batch)
            return
        weights = self._serving.patience
        patience = MOST_STEPS if weights is None else self._world.choose(weights)
        is_answered = self._take(self._tell(batch))
        for _ in range(patience):
            if is_answered:
                break
            replies, _ = self.server.step()
            is_answered = self._take(replies)
        assert is_answered or patience < MOST_STEPS, "a commit batch is answered in bounded work"
        self._seen["late replies"] += not is_answered
        self._has_given_up = not is_answered and self.gives_up()

    def gives_up(self) -> bool:
        """Whether a late reply costs the next round its drafts, for which nobody waits then: only if nothing came ahead of it.

        Were it enough that the reply is late, a chunk would be lost because of tokens of the one before, of which some may not have
        been verified.
        """
        return all(request.reply is None for request in self._requests.values())

    def _take(self, replies: Sequence[Reply]) -> bool:
        """Note the drafts of this round; returns whether they are the last."""
        for _, batch in replies:
            assert isinstance(batch, messages.DraftBatch), f"no reply: {batch}"
            if batch.round != self._round:
                continue
            assert batch.unknown == []
            for draft in batch.drafts:
                self._requests[draft.request_id].reply = draft
            if batch.is_final:
                return True
        return False


@cache
def _config(settings: tuple[tuple[str, object], ...]) -> SpecBranchConfig:
    return SpecBranchConfig.from_user(dict(settings))


def settings_of(serving: Serving) -> SpecBranchConfig:
    """The server's settings."""
    user = {"model": "draft", "policy": "specbranch", "num_speculative_tokens": serving.rules.gamma, **serving.settings}
    return _config(tuple(user.items()))


@dataclass(frozen=True)
class Result:
    """What an enumeration found.

    Attributes:
        difference: greatest absolute difference between the probabilities of one outcome, the server's and the target's own.
        num_paths: that were run.
        seen: what happened how often, over all paths: the server's counters, chunks by their length, late replies.
    """

    difference: float
    num_paths: int
    seen: Counter[str]


def enumerate_server(serving: Serving, targets: Sequence[Table], drafts: Sequence[Table]) -> Result:
    """Compare the joint distribution of all outputs with the target's own; one table of each kind per request."""
    seen: Counter[str] = Counter()

    def program(world: World) -> tuple[Prefix, ...]:
        requests = [Served(world, *tables, serving.rules) for tables in zip(targets, drafts, strict=True)]
        return Engine(world, serving, requests, seen).run()

    explorer = Explorer(program)
    outcomes = explorer.run()
    expected: dict[tuple[Prefix, ...], float] = {(): 1.0}
    for target in targets:
        own = autoregressive(target, serving.rules.horizon)
        expected = {(*done, one): high * low for done, high in expected.items() for one, low in own.items()}
    return Result(max_difference(outcomes, expected), explorer.num_paths, seen)
