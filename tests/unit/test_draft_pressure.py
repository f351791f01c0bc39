"""Draft KV pressure: in which order things give way, and a state machine over the real server with a pool of a few dozen blocks.

After every rule: no block is lost, held twice or freed twice (`check_integrity`), none is read after it was freed (freed blocks
are poisoned, and the model refuses to read poison), every commit was answered with the draft model's own tokens, and the counters
add up.
"""

from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.draft_engine import PEER, Engine, make_engine
from vllm_specbranch import messages
from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_steps import Batch
from vllm_specbranch.draft_work import Limits

POISON = -1
PROMPTS = st.lists(st.integers(0, 49), min_size=1, max_size=40)
SAMPLINGS = st.one_of(
    st.none(),
    st.builds(messages.Sampling, st.sampled_from([0.3, 1.0]), st.sampled_from([1, 4, 50]), st.integers(0, 2**62)),
)


def poison_what_is_free(engine: Engine) -> None:
    """Overwrite the KV of all blocks that no table holds."""
    kv = engine.server.kv
    held = {block for sequence in list(kv._tables) for block in kv.block_ids(sequence)}
    for block, content in enumerate(engine.model._kv):
        if block not in held:
            content[:] = [POISON] * len(content)


def requests_of(engine: Engine) -> Iterator[DraftRequest]:
    return iter(engine.server._requests.values())


class Pressed(RuleBasedStateMachine):
    """An engine with up to six requests, and blocks for about two."""

    @initialize(
        policy=st.sampled_from(["pearl", "specbranch", "fanout", "best_first"]),
        on_miss=st.sampled_from(["auto", "go", "wait:3"]),
        stop_rule=st.sampled_from(["none", "confidence"]),
        num_blocks=st.integers(10, 36),
        deterministic=st.booleans(),
    )
    def begin(self, policy: str, on_miss: str, stop_rule: str, num_blocks: int, deterministic: bool) -> None:
        self.engine = make_engine(
            num_blocks,
            Limits(8, 64, 20),
            policy=policy,
            on_miss=on_miss,
            stop_rule=stop_rule,
            deterministic=deterministic,
            num_speculative_tokens=6,
        )
        self.takes_in_flight = not deterministic
        self.takes_classes = policy != "pearl"
        self.batch: Batch | None = None
        self.number = 0
        self.before = self.engine.server.counters.as_dict()

    def land(self) -> None:
        """End the forward under way, before something that begins others."""
        if self.batch is not None:
            batch, self.batch = self.batch, None
            assert self.engine.server.finish_step(batch, self.engine.server.run_forward(batch)) == []

    @precondition(lambda self: len(self.engine.sequences) < 6)
    @rule(prompt=PROMPTS, sampling=SAMPLINGS)
    def open(self, prompt: list[int], sampling: messages.Sampling | None) -> None:
        self.number += 1
        self.engine.open(f"r{self.number}", prompt, sampling)

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        if self.engine.sequences:
            self.engine.close(data.draw(st.sampled_from(sorted(self.engine.sequences))))

    @rule(count=st.integers(1, 12))
    def draft(self, count: int) -> None:
        self.land()
        for _ in range(count):
            replies, worked = self.engine.server.step()
            assert replies == []
            poison_what_is_free(self.engine)
            if not worked:
                break

    @precondition(lambda self: self.takes_in_flight and self.batch is None)
    @rule()
    def leave_a_forward_under_way(self) -> None:
        self.batch = self.engine.server.begin_step()

    @rule(data=st.data(), is_patient=st.booleans(), head_class=st.sampled_from([None, None, 0, 1, 2]))
    def commit(self, data: st.DataObject, is_patient: bool, head_class: int | None) -> None:
        """Any outcome for some of the requests; `Engine.commit` checks the answer."""
        engine = self.engine
        names = [name for name in sorted(engine.sequences) if data.draw(st.booleans())]
        outcomes = {}
        for name in names:
            length = len(engine.sequences[name])
            if length > 2 and data.draw(st.integers(0, 9)) == 0:
                outcomes[name] = (
                    data.draw(st.integers(1, length - 1)),
                    data.draw(st.lists(st.integers(0, 49), min_size=1, max_size=3)),
                )
            else:
                num_accepted = data.draw(st.integers(0, len(engine.drafts[name])))
                outcomes[name] = engine.follow(name, num_accepted, data.draw(st.sampled_from([None, None, 7])))
        self.land()
        if outcomes:
            engine.commit(
                outcomes, max_wait_ms=1e4 if is_patient else 0.0, head_class=head_class if self.takes_classes else None
            )

    @invariant()
    def nothing_is_lost(self) -> None:
        server = self.engine.server
        server.kv.check_integrity()
        if self.batch is None:
            server.check_integrity()
            poison_what_is_free(self.engine)
        now = server.counters.as_dict()
        assert all(now[name] >= value for name, value in self.before.items())
        self.before = now
        assert now["num_hits"] + now["num_misses"] == now["num_rounds"]
        assert now["num_refused_messages"] == now["num_unknown_requests"] == 0
        if any(request.is_evicted and server._fits(request) for request in requests_of(self.engine)):
            assert now["num_evictions"]
        if any(request.is_shortened for request in requests_of(self.engine)):
            assert now["num_shortenings"]

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.land()
        for name in list(self.engine.sequences):
            self.engine.close(name)
        self.engine.run(100)
        assert self.engine.server.kv.num_held == 0


TestPressed = Pressed.TestCase
TestPressed.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_branches_go_first_then_drafted_depth_then_requests() -> None:
    engine = make_engine(16, policy="specbranch", stop_rule="none", branch_rule="fixed", num_speculative_tokens=8)
    counters = engine.server.counters
    order: list[str] = []
    for index in range(6):
        engine.open(f"r{index}", [index, *range(1, 12)])
        for _ in range(60):
            before = counters.as_dict()
            engine.run(1)
            now = counters.as_dict()
            order += [
                name for name in ("num_narrowings", "num_shortenings", "num_evictions") if now[name] > before[name]
            ]
    firsts = list(dict.fromkeys(order))
    assert firsts == ["num_narrowings", "num_shortenings", "num_evictions"]


def test_a_shortened_request_keeps_its_trunk_and_its_chain_and_goes_on_after_its_commit() -> None:
    engine = make_engine(policy="specbranch", stop_rule="none", on_miss="go")
    engine.open("a", list(range(12)))
    engine.run(100)
    request = engine.server._requests[PEER, "a"]
    request.narrow()
    chain = [request.tree.node(one).token for one in request.tree.path(request.tree.leaves()[0])]
    num_held, num_drafted = engine.server.kv.num_held, request.num_drafted_blocks
    assert num_drafted > 0
    request.shorten()
    assert engine.server.kv.num_held == num_held - num_drafted == 3, "12 tokens of prompt in blocks of 4"
    kept = [request.tree.node(one).token for one in request.tree.path(request.tree.leaves()[0])]
    assert kept[: len(chain)] == chain
    engine.server.check_integrity()
    before = engine.server.counters.num_steps
    engine.run(10)
    assert engine.server.counters.num_steps == before, "it rests"
    engine.commit({"a": engine.follow("a", 0)})
    assert engine.hits["a"] and len(engine.drafts["a"]) == 4, "what had been drafted is submitted without its KV"
    engine.run(10)
    assert request.num_drafted_blocks > 0 or request.num_sequences > 1, "and is drafted on from"


@pytest.mark.parametrize("deterministic", [False, True])
def test_two_requests_that_wait_for_the_same_blocks_are_both_answered(deterministic: bool) -> None:
    engine = make_engine(10, policy="specbranch", stop_rule="none", on_miss="wait:4", deterministic=deterministic)
    for name in ("a", "b"):
        engine.open(name, list(range(15)))
    engine.run(100)
    for _ in range(20):
        engine.commit({name: engine.follow(name, 0, 49) for name in ("a", "b")})
        engine.run(3)
        if len(engine.sequences["a"]) > 24:
            break
    assert engine.server.counters.num_shortenings > 0
