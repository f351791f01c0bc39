"""The replay: its counts against a simulation written here, the wire as the engine uses it, and what takes time.

Its bound: test_replay_bounds; its memory: test_draft_memory.
"""

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.made_recordings import (
    POLICIES,
    agree_lists,
    config,
    draft_step_ms,
    fake,
    gammas,
    patient,
    ratios,
    recordings_of,
    run,
)
from vllm_specbranch import messages, replay
from vllm_specbranch.errors import SpecBranchError
from vllm_specbranch.replay import Recording, Replayed, Times


def pearl_rounds(agrees: Sequence[Sequence[bool]], gamma: int, ratio: float) -> tuple[int, int, float]:
    """(rounds, hits, time in draft steps) of PEARL, simulated without any token: what is on the chain, and when.

    `fed` nodes of the chain have a prediction, the root first; a step feeds one more, up to one chunk below the branch point.
    """
    now, step_end, rounds, hits = 0.0, None, 0, 0
    for agree in agrees:
        done = fed = chunk = 0
        is_stale = True
        while done < len(agree):
            end = now + ratio
            # Draft while the target computes. A step under way when the tree is replaced ends in vain.
            while True:
                if step_end is None and now < end and fed < chunk + gamma + 2:
                    step_end, is_stale = now + 1.0, False
                if step_end is None or step_end > end:
                    break
                now, step_end = step_end, None
                fed += not is_stale
            now = end
            accepted = 0
            while accepted < chunk and done + accepted < len(agree) and agree[done + accepted]:
                accepted += 1
            at = done + accepted
            hit = accepted == chunk and at < len(agree) and agree[at] and fed > chunk
            # With all that is wanted committed and nothing known beyond, the last token is the last accepted one.
            hit = hit or (at == len(agree) and accepted > 0)
            rounds, hits, done = rounds + 1, hits + hit, at + 1
            if hit:
                fed -= accepted + 1
                chunk = min(gamma, fed)
            else:
                fed, chunk, is_stale = 0, 0, True
        is_stale = True
    return rounds, hits, now


@patient
@given(agree_lists, gammas, ratios)
def test_pearl_is_as_simulated(agrees: list[list[bool]], gamma: int, ratio: float) -> None:
    times = Times(ratio * draft_step_ms, draft_step_ms, draft_token_cost=0.0)
    result = run(config(gamma, policy="pearl", reply_timeout_ms=10_000.0), recordings_of(agrees), times)
    rounds, hits, time = pearl_rounds(agrees, gamma, ratio)
    assert (result.num_rounds, result.server["num_hits"]) == (rounds, hits)
    assert result.time_s == time * draft_step_ms / 1e3
    assert result.num_forwards == result.num_rounds == result.server["num_rounds"]
    assert result.wait_s == 0.0


@patient
@given(agree_lists, gammas, ratios)
def test_steady_decoding_is_all_but_the_rounds_that_end_a_prefill(
    agrees: list[list[bool]], gamma: int, ratio: float
) -> None:
    times = Times(ratio * draft_step_ms, draft_step_ms, draft_token_cost=0.0)
    recordings = recordings_of(agrees)
    result = run(config(gamma, policy="pearl", reply_timeout_ms=10_000.0), recordings, times)
    prefills_s = len(recordings) * ratio * draft_step_ms / 1e3
    assert result.steady_s == result.time_s - prefills_s
    assert result.num_steady_tokens == result.num_tokens - len(recordings)


def test_a_batch_that_is_not_full_is_not_steady() -> None:
    recordings = recordings_of([[True] * 8, [True] * 20])
    times = Times(500.0, draft_step_ms)
    alone, full = (run(config(policy="pearl"), recordings, times, batch_size) for batch_size in (3, 2))
    assert (alone.steady_s, alone.num_steady_tokens) == (0.0, 0)
    assert alone.steady_tokens_per_s == alone.tokens_per_s
    # Until the shorter one ends; the longer one is not steady alone.
    assert 14 <= full.num_steady_tokens < 20 and 0 < full.steady_s < full.time_s


@patient
@given(agree_lists, st.sampled_from(POLICIES), st.integers(1, 3))
def test_the_server_is_told_the_recorded_path(
    agrees: list[list[bool]], policy: dict[str, object], batch_size: int
) -> None:
    recordings = recordings_of(agrees)
    told: dict[str, list[int]] = {}
    original = replay.VirtualServer.handle

    def listen(server: replay.VirtualServer, message: messages.EngineMessage) -> None:
        if isinstance(message, messages.StepBegin):
            told.update({one.request_id: list(one.tokens) for one in message.opens})
        if isinstance(message, messages.CommitBatch):
            assert message.max_wait_ms > 0.0
            for commit in message.commits:
                assert commit.position == len(told[commit.request_id])
                assert commit.num_draft_tokens <= 4
                told[commit.request_id] += commit.tokens
        original(server, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.VirtualServer, "handle", listen)
        result = run(config(**policy), recordings, Times(5.0, 1.0), batch_size)
    assert told == {f"r{index}": [*one.prompt, *one.tokens] for index, one in enumerate(recordings)}
    assert result.num_accepted_tokens <= result.num_draft_tokens
    # A chunk may end with the path, which has no token after it then.
    short = result.num_rounds + result.num_accepted_tokens - result.num_tokens
    assert 0 <= short <= len(recordings)
    assert result.server["num_hits"] + result.server["num_misses"] == result.num_rounds


@patient
@given(agree_lists, gammas, st.sampled_from(POLICIES), st.integers(1, 3), st.sampled_from([3, 40]))
def test_deterministic_counts_do_not_depend_on_time(
    agrees: list[list[bool]], gamma: int, policy: dict[str, object], batch_size: int, num_prompt_tokens: int
) -> None:
    chosen = config(gamma, deterministic=True, **policy)
    recordings = recordings_of(agrees, num_prompt_tokens=num_prompt_tokens)
    results = [run(chosen, recordings, Times(target_ms, 1.0), batch_size) for target_ms in (1.0, 3.7, 50.0)]
    # Not its steps: a last one may be under way.
    names = (
        "num_rounds",
        "num_hits",
        "num_misses",
        "num_kept_tokens",
        "num_rollback_tokens",
        "num_branch_tokens_dropped",
    )
    counts = [[one.server[name] for name in names] + [one.num_forwards, one.num_draft_tokens] for one in results]
    assert counts == counts[:1] * 3
    assert [one.time_s for one in results] == sorted(one.time_s for one in results)


@patient
@given(st.lists(st.booleans(), min_size=2, max_size=30), gammas)
def test_tokens_beyond_the_end_decide_the_last_round_only(agree: list[bool], gamma: int) -> None:
    whole, cut = recordings_of([agree]), recordings_of([agree], num_beyond=len(agree) // 2)
    times = Times(5.0, 1.0)
    result = run(config(gamma, policy="pearl"), cut, times)
    assert result.num_tokens == cut[0].num_tokens
    assert result.num_rounds <= run(config(gamma, policy="pearl"), whole, times).num_rounds


# --- time ------------------------------------------------------------------------------------------------------------


def test_times_of_forwards() -> None:
    times = Times(10.0, 2.0, target_token_cost=0.1, draft_token_cost=0.5, overhead_ms=1.0)
    assert (times.round_ms(1), times.round_ms(3)) == (11.0, 13.0)
    assert (times.step_ms(1), times.step_ms(3)) == (2.0, 4.0)
    assert times.c == 5.5


def test_a_late_reply_costs_the_timeout_once() -> None:
    """With a draft step longer than the reply timeout nothing ever comes in time; rounds go on without drafts."""
    recordings = recordings_of([[True] * 6])
    chosen = config(on_miss="wait:2", reply_timeout_ms=20.0)
    result = run(chosen, recordings, Times(10.0, 1000.0))
    assert result.num_late_replies >= 1
    assert result.num_rounds == 6 and result.num_draft_tokens == 0
    assert result.wait_s == pytest.approx(0.02)
    assert result.time_s == pytest.approx(0.08)


def test_waiting_is_counted() -> None:
    recordings = recordings_of([[False] * 6])
    result = run(
        config(policy="specbranch", on_miss="wait:1", stop_rule="none", max_branches=1),
        recordings,
        Times(10.0, 1.0, draft_token_cost=0.0),
    )
    assert result.wait_s == pytest.approx(5 * 1e-3)
    assert result.time_s == pytest.approx(6 * 10e-3 + result.wait_s)


def test_a_commit_does_not_wait_for_the_step_under_way() -> None:
    """The step under way when the first token comes is finished, and the reply sent before its end."""
    recordings = recordings_of([[True] * 3])
    result = run(config(on_miss="go", stop_rule="none"), recordings, Times(1.5, 1.0, draft_token_cost=0.0))
    assert result.wait_s == 0.0 and result.num_late_replies == 0


def test_foreign_tokens_are_refused() -> None:
    model, kv = fake()
    with pytest.raises(SpecBranchError, match="outside the vocabulary"):
        replay.replay(config(), model, kv, [Recording((99,), (1,), 1)], Times(5.0, 1.0))


def test_waiting_is_the_proposers() -> None:
    proposer = pytest.importorskip("vllm_specbranch.proposer")
    assert proposer.WAIT_SHARE == replay.WAIT_SHARE


def test_a_recording_has_tokens() -> None:
    with pytest.raises(AssertionError):
        Recording((1,), (), 1)


def test_rates() -> None:
    result = Replayed(num_requests=1, num_tokens=9, num_rounds=5, time_s=3.0)
    assert (result.tokens_per_s, result.mean_acceptance_length) == (3.0, 2.0)
    assert Replayed(num_requests=1, num_tokens=1, num_rounds=1).mean_acceptance_length != 0


def test_classes_of_a_length_head_come_with_the_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    """After every round the class said after its newest token; none where there is no head."""
    seen: list[tuple[int, int | None]] = []
    handle = replay.VirtualServer.handle

    def spy(self: replay.VirtualServer, message: messages.EngineMessage) -> None:
        if isinstance(message, messages.CommitBatch):
            seen.extend((one.position + len(one.tokens), one.head_class) for one in message.commits)
        handle(self, message)

    monkeypatch.setattr(replay.VirtualServer, "handle", spy)
    (plain,) = recordings_of([[True, False, True, True, False, True] * 3])
    said = tuple(index % 3 for index in range(len(plain.tokens)))
    told = dataclasses.replace(plain, classes=said)
    for recording, expected in ((plain, [None] * 3), (told, said)):
        seen.clear()
        run(config(policy="specbranch"), [recording], Times(1000.0, draft_step_ms))
        assert len(seen) > 3
        for end, head_class in seen:
            assert head_class == expected[(end - len(plain.prompt) - 1) % 3]


def test_classes_that_are_missing_are_a_fault() -> None:
    with pytest.raises(AssertionError, match="after every token"):
        Recording((1,), (2, 3), 1, (0,))
