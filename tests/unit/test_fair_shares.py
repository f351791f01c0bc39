"""Fair division among engines: nobody has less than another and wants more, nothing is left over, and turns go round."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch.fair_shares import in_turns, in_view, most_rows, turn_order, who_gives

NAMES = [b"a", b"b", b"c", b"d", b"e"]
names = st.sampled_from(NAMES)
demands = st.dictionaries(names, st.integers(0, 12), max_size=5)
row_costs = st.floats(0.001, 2.0)


def queues_of(wanted: dict[bytes, int]) -> dict[bytes, list[tuple[bytes, int]]]:
    return {name: [(name, rank) for rank in range(count)] for name, count in wanted.items()}


def step_s(num_rows: int, row_cost: float) -> float:
    return 1.0 + row_cost * (num_rows - 1)


@given(demands, names)
def test_every_leading_part_of_the_line_is_a_fair_division(wanted: dict[bytes, int], last: bytes) -> None:
    line = in_turns(queues_of(wanted), last)
    assert len(line) == sum(wanted.values())
    for length in range(len(line) + 1):
        given_to = {name: [item for item in line[:length] if item[0] == name] for name in wanted}
        for name, items in given_to.items():
            assert items == queues_of(wanted)[name][: len(items)], "each engine's most wanted first"
            if len(items) < wanted[name]:
                assert all(len(others) <= len(items) + 1 for others in given_to.values()), (
                    "nobody has more, but one's turn"
                )


@given(st.lists(names, min_size=1, unique=True), names)
def test_turns_go_round(engines: list[bytes], last: bytes) -> None:
    led = []
    for _ in engines:
        assert sorted(turn_order(engines, last)) == sorted(engines)
        last = turn_order(engines, last)[0]
        led.append(last)
    assert sorted(led) == sorted(engines), "everybody once"


@given(demands, row_costs)
def test_a_step_takes_no_engine_more_than_its_share_of_the_time(wanted: dict[bytes, int], row_cost: float) -> None:
    rows = [count for count in wanted.values() if count]
    total, count = sum(rows), most_rows(rows, row_cost)
    if not rows:
        assert count == 0
        return
    longest = len(rows) * step_s(min(rows), row_cost)
    assert count <= total
    assert count == total or len(rows) > 1
    assert step_s(count, row_cost) <= longest * (1 + 1e-5) or row_cost > 1
    if count < total:
        assert step_s(count + 1, row_cost) > longest, "no time is left unused that somebody wants"
        line = in_turns(queues_of(wanted), b"")[:count]
        least = min((name for name in wanted if wanted[name]), key=lambda name: wanted[name])
        assert sum(name == least for name, _ in line) == wanted[least], "who wants least gets it all"


@given(st.integers(1, 5), st.integers(1, 30), row_costs)
def test_engines_that_want_alike_do_not_hinder_each_other(num_engines: int, count: int, row_cost: float) -> None:
    assert most_rows([count] * num_engines, row_cost) == num_engines * count


def test_rows_are_not_limited_before_their_cost_is_known() -> None:
    assert most_rows([1, 1000, 0], 0.0) == 1001
    assert most_rows([1, 1000, 0], 0.1) == 11
    assert most_rows([1000], 0.1) == 1000
    assert most_rows([], 0.1) == 0


@given(st.integers(0, 40), st.integers(1, 12), st.integers(0, 100))
def test_everybody_comes_into_view_equally_often(count: int, most: int, turn: int) -> None:
    items = list(range(count))
    seen = [item for number in range(count) for item in in_view(items, most, turn + number)]
    assert all(len(set(in_view(items, most, turn + number))) == min(most, count) for number in range(count))
    assert {item: seen.count(item) for item in items} == dict.fromkeys(items, min(most, count))


@given(st.dictionaries(names, st.integers(0, 100), min_size=1))
def test_who_holds_most_gives(held: dict[bytes, int]) -> None:
    giver = who_gives(held)
    share = sum(held.values()) / len(held)
    assert held[giver] == max(held.values())
    assert held[giver] >= share, "nobody gives who is below its share"


@given(
    st.lists(st.tuples(names, st.integers(1, 20)), min_size=1, max_size=60),
    st.integers(1, 60),
)
def test_whatever_engines_take_nobody_below_its_share_ever_gives(
    takes: list[tuple[bytes, int]], num_blocks: int
) -> None:
    """A pool in which a taker makes room as the draft server does: who would hold most gives, or takes less."""
    held = dict.fromkeys({name for name, _ in takes}, 0)
    for name, count in takes:
        wanted = count
        while wanted and sum(held.values()) + wanted > num_blocks:
            giver = who_gives({one: held[one] + (wanted if one == name else 0) for one in held})
            if giver == name:
                wanted -= 1
            else:
                assert held[giver] * len(held) >= num_blocks, "at its share, or above it"
                held[giver] -= 1
        held[name] += wanted
        short = wanted < count
        assert not short or all(held[name] >= one - 1 for one in held.values()), "who got less has no less than others"


def test_nobody_is_asked_to_give_where_nobody_is() -> None:
    with pytest.raises(ValueError, match="empty"):
        who_gives({})
