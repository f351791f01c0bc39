"""What the proposer measures of its engine."""

import pytest

from vllm_specbranch.engine_pace import EnginePace


def step(pace: EnginePace, at_s: float, forward_s: float, slack_s: float, num_tokens: int = 3) -> None:
    pace.begin(at_s, num_tokens)
    pace.sampled(at_s + forward_s)
    pace.sent(at_s + forward_s)
    pace.looked(at_s + forward_s + slack_s)


@pytest.mark.parametrize(("round_s", "expected_ms"), [(0.001, 10.0), (0.008, 32.0), (0.4, 50.0), (1.0, 50.0)])
def test_the_reply_timeout_follows_the_measured_rounds_within_its_bounds(round_s: float, expected_ms: float) -> None:
    pace, fixed = EnginePace(None), EnginePace(7.0)
    assert pace.reply_timeout_ms == 50.0, "before anything was measured"
    for index in range(5):
        step(pace, index * round_s, 0.5 * round_s, 0.1 * round_s)
    assert pace.reply_timeout_ms == pytest.approx(expected_ms)
    assert fixed.reply_timeout_ms == 7.0


def test_a_step_is_told_with_its_tokens_its_time_and_the_slack_after_it() -> None:
    pace = EnginePace(None)
    for index in range(50):
        step(pace, index * 0.01, 0.006, 0.001)
    pace.begin(1.0, 4)
    pace.sampled(1.02)
    message = pace.message
    assert message is not None
    assert (message.num_tokens, message.step_us) == (4, pytest.approx(20_000))
    assert message.slack_us == pytest.approx(1000, rel=0.01)


def test_a_step_with_a_prefill_says_nothing() -> None:
    pace = EnginePace(None)
    step(pace, 0.0, 0.01, 0.001, num_tokens=0)
    assert pace.message is None


def test_a_look_without_commits_is_no_slack() -> None:
    pace = EnginePace(None)
    step(pace, 0.0, 0.01, 0.002)
    pace.looked(100.0)
    pace.begin(200.0, 1)
    pace.sampled(200.01)
    assert pace.message is not None
    assert pace.message.slack_us == pytest.approx(2000)


def answered(pace: EnginePace, sent_s: float, looked_s: float, now_s: float, answer_us: int) -> float:
    pace.begin(sent_s, 2)
    pace.sampled(sent_s)
    pace.sent(sent_s)
    pace.looked(looked_s)
    return pace.answered(now_s, now_s - looked_s, answer_us)


def test_messages_are_what_the_server_did_not_take() -> None:
    pace = EnginePace(None)
    # 4 ms there and back, of which the server worked 3.4.
    assert answered(pace, 1.0, 1.001, 1.004, 3400) == pytest.approx(0.0006)
    # The counter is a sum: 1.5 ms this time, and half a millisecond of waiting is all that was messages.
    assert answered(pace, 2.0, 2.0015, 2.002, 4900) == pytest.approx(0.0005)


def test_messages_that_kept_nobody_waiting_do_not_count() -> None:
    pace = EnginePace(None)
    assert answered(pace, 1.0, 1.01, 1.010002, 300) == pytest.approx(2e-6)
    # More than the time there and back: an engine beside this one, or a reply that came too late.
    assert answered(pace, 2.0, 2.001, 2.002, 9_000) == 0.0


def test_a_server_that_was_started_anew_counts_from_nothing() -> None:
    pace = EnginePace(None)
    answered(pace, 1.0, 1.001, 1.004, 3400)
    assert answered(pace, 2.0, 2.0, 2.002, 1500) == pytest.approx(0.0005)
