"""Random days of our scheduler on vLLM's real KV-cache manager, with vLLM's worker state and block table on the other side.

After every step the block ids of both sides are the same, every slot that attention would read holds what its request wrote there,
and every block is either free or counted by the tables that hold it.
"""

import random
from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from vllm.config import VllmConfig
from vllm.v1.core.sched.interface import PauseState

from tests.real_scheduler import Engine, make_config
from tests.strategies import pick, picks
from vllm_specbranch.reclaim import BlockReclaimer, TargetBlocks

BLOCK_SIZE = 4
GAMMA = 6
MAX_PROMPT = 24
MAX_NEW_TOKENS = 20
# The longest request with a full chunk needs 13 blocks; one more is vLLM's null block.
NUM_BLOCKS = st.integers(14, 40)
MIN_REQUESTS = 4
MAX_REQUESTS = 7


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and go, drafts come in and are accepted or not; blocks are taken back when short, or whenever possible."""

    config: ClassVar[VllmConfig]
    seen: ClassVar[Counter[str]]

    @initialize(num_blocks=NUM_BLOCKS)
    def start(self, num_blocks: int) -> None:
        self.engine = Engine(self.config, num_blocks)

    @property
    def reclaimer(self) -> Any:
        return self.engine.scheduler._reclaimer

    # See `test_kv_blocks_machine`: no rule has a precondition.

    @rule(family=st.integers(0, 2), length=st.integers(1, MAX_PROMPT), max_tokens=st.integers(1, MAX_NEW_TOKENS))
    def add(self, family: int, length: int, max_tokens: int) -> None:
        """One of three long texts, so that later ones find blocks of earlier ones in the prefix cache."""
        if len(self.engine.scheduler.requests) < MAX_REQUESTS:
            self.engine.add([family, *range(length - 1)], max_tokens)

    @rule(number=picks())
    def abort(self, number: int) -> None:
        requests = self.engine.scheduler.requests
        if requests:
            self.engine.abort(pick(number, list(requests)))

    @rule(seed=st.integers(0, 2**16), chunk=st.integers(0, GAMMA), eager=st.booleans())
    def steps(self, seed: int, chunk: int, eager: bool) -> None:
        """Some steps with chunks up to a length; `eager` takes back whatever could be before each."""
        rng = random.Random(seed)
        for _ in range(rng.randint(1, 12)):
            while len(self.engine.scheduler.requests) < MIN_REQUESTS:
                self.add(rng.randrange(3), rng.randint(1, MAX_PROMPT), rng.randint(1, MAX_NEW_TOKENS))
            running = [one.request_id for one in self.engine.scheduler.running]
            self.engine.draft({name: [7] * rng.randint(0, chunk) for name in running})
            if eager:
                for request in self.engine.scheduler.running:
                    self.reclaimer._take(request)
            output = self.engine.step({name: rng.choice([0, 0, 1, GAMMA]) for name in running}, rng.randrange(3))
            self.engine.check_blocks()
            self.seen["steps"] += 1
            self.seen["preemptions"] += len(output.preempted_req_ids or ())
            self.seen["prefix hits"] += sum(one.num_computed_tokens > 0 for one in output.scheduled_new_reqs)
            self.seen["draft tokens"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))

    @rule(number=picks())
    def pause(self, number: int) -> None:
        """A step in which nothing is scheduled, after blocks have been taken from somebody."""
        for request in self.engine.scheduler.running[: 1 + number % 3]:
            self.reclaimer._take(request)
        self.engine.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        self.engine.step()
        self.seen["taken, not scheduled"] += len(self.reclaimer._changed)
        self.engine.scheduler.set_pause_state(PauseState.UNPAUSED)

    @rule(number=picks())
    def reset(self, number: int) -> None:
        """Now and then all running requests are preempted from outside, and come back at once."""
        if number % 4 == 0:
            self.seen["resets"] += self.engine.scheduler.reset_prefix_cache(reset_running_requests=True)

    @invariant()
    def blocks_are_sound(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_blocks()

    def teardown(self) -> None:
        """When all requests are gone, all blocks are free."""
        if not hasattr(self, "engine"):
            return
        counters = self.engine.scheduler._counters.as_dict()
        self.seen.update({name: counters[name] for name in ("num_reclaimed_blocks", "num_short_steps")})
        for name in list(self.engine.scheduler.requests):
            self.engine.abort(name)
        self.engine.step()
        assert self.engine.pool.get_num_free_blocks() == self.engine.pool.num_gpu_blocks - 1
        assert not self.reclaimer._changed


def run_machine(num_examples: int, phases: tuple[Phase, ...] = tuple(Phase)) -> Counter[str]:
    """Run the machine; returns what happened in all runs together."""
    SchedulerMachine.config = make_config(BLOCK_SIZE, GAMMA, max_num_batched_tokens=16)
    SchedulerMachine.seen = Counter()
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=30,
            deadline=None,
            phases=phases,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return SchedulerMachine.seen


def test_no_block_is_lost_freed_twice_or_read_after_it_was_given_away() -> None:
    seen = run_machine(120)
    print(dict(seen))
    assert seen["steps"] > 1_000
    assert seen["num_reclaimed_blocks"] > 100
    for name in ("preemptions", "taken, not scheduled", "num_short_steps", "resets", "prefix hits", "draft tokens"):
        assert seen[name] > 15, name


# Each of the dangers that the design names, made real: the machine must see it.


def without_resending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockReclaimer, "resend", lambda self, scheduled, requests: self._changed.clear())


def forgetting_who_is_not_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    resend = BlockReclaimer.resend

    def resend_and_forget(self: Any, scheduled: Any, requests: Any) -> None:
        resend(self, scheduled, requests)
        self._changed.clear()

    monkeypatch.setattr(BlockReclaimer, "resend", resend_and_forget)


def resending_new_blocks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def resend(self: Any, scheduled: Any, requests: Any) -> None:
        scheduled.resumed_req_ids.update(self._changed.intersection(scheduled.req_ids))
        scheduled.new_block_ids[:] = [ids or ([],) for ids in scheduled.new_block_ids]
        self._changed.difference_update(scheduled.req_ids)

    monkeypatch.setattr(BlockReclaimer, "resend", resend)


def below_what_is_computed_and_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_kept(self: Any, request: Any, num_tokens: int, manager: Any, blocks: Any) -> int:
        return min(len(blocks), max(0, -(-num_tokens // manager.block_size) - 1))

    monkeypatch.setattr(TargetBlocks, "_num_kept", num_kept)


def taking_and_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(self: Any, request: Any, num_tokens: int) -> int:
        (manager,) = self._managers
        blocks = manager.req_to_blocks.get(request.request_id, [])
        taken = blocks[self._num_kept(request, num_tokens, manager, blocks) :]
        self._pool.free_blocks(reversed(taken))
        return len(taken)

    monkeypatch.setattr(TargetBlocks, "take_surplus", take)


def taking_and_losing(monkeypatch: pytest.MonkeyPatch) -> None:
    take = TargetBlocks.take_surplus

    def take_and_lose(self: Any, request: Any, num_tokens: int) -> int:
        count = take(self, request, num_tokens)
        self._pool.get_new_blocks(count)
        return count

    monkeypatch.setattr(TargetBlocks, "take_surplus", take_and_lose)


@pytest.mark.parametrize(
    "spoil",
    [
        without_resending,
        forgetting_who_is_not_scheduled,
        resending_new_blocks_only,
        below_what_is_computed_and_cached,
        taking_and_keeping,
        taking_and_losing,
    ],
)
def test_the_machine_sees(spoil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    with pytest.raises((AssertionError, ExceptionGroup)) as caught:
        run_machine(60, (Phase.generate,))
    print(spoil.__name__, repr(caught.value)[:200])
