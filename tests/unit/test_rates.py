"""How fast a peer may send: bursts, floods, and many peers."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.rates import BURST_S, MAX_SOURCES, PENALTY_S, Rates


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def make(messages_per_s: float = 100.0, bytes_per_s: float = 1e6) -> tuple[Rates, Clock]:
    clock = Clock()
    return Rates(messages_per_s, bytes_per_s, clock), clock


def test_who_keeps_to_the_rate_is_never_dropped() -> None:
    rates, clock = make()
    for _ in range(1000):
        clock.now_s += 0.0101
        assert rates.admits("a", 9000)
    assert rates.num_dropped == 0


def test_a_burst_passes_and_a_flood_does_not() -> None:
    rates, clock = make()
    burst = int(BURST_S * 100)
    assert all(rates.admits("a", 10) for _ in range(burst))
    assert not any(rates.admits("a", 10) for _ in range(1000))
    assert rates.num_dropped == 1000
    assert rates.admits("b", 10), "others are none the worse"
    clock.now_s += PENALTY_S
    assert rates.admits("a", 10), "after the penalty it is listened to again, however much it sent meanwhile"


def test_bytes_count_too() -> None:
    rates, clock = make()
    assert rates.admits("a", int(BURST_S * 1e6))
    assert not rates.admits("a", 1000)
    clock.now_s += PENALTY_S + 1
    assert rates.admits("a", 1000)


def test_more_peers_than_can_be_known_take_no_more_memory() -> None:
    rates, clock = make()
    for index in range(3 * MAX_SOURCES):
        clock.now_s += 1e-3
        assert rates.admits(f"peer {index}", 1)
        assert rates.admits("the one that is always there", 1) or index > 100
    assert rates.num_sources == MAX_SOURCES


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.integers(0, 500_000)), max_size=200))
def test_never_more_than_the_rate_and_one_burst(sent: list[tuple[float, int]]) -> None:
    rates, clock = make()
    admitted = num_bytes = 0
    for pause_s, size in sent:
        clock.now_s += pause_s
        if rates.admits("a", size):
            admitted += 1
            num_bytes += size
    assert admitted <= 100 * (clock.now_s + BURST_S) + 1e-6
    assert num_bytes <= 1e6 * (clock.now_s + BURST_S) + 1e-6
