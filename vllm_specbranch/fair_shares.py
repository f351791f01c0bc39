"""How what several engines share is divided: the rows of a draft step, turns, and who gives when KV blocks run short.

One rule for all (max-min fairness): who wants no more than an equal share gets it all, and what it leaves the others divide alike.
So no engine that wants more has less than another, and nothing stays unused while anybody wants it. Owns no state; knows neither
requests nor blocks. Pure; draft server process.

    wanted:   A a1 a2 a3 a4    B b1    C c1 c2        in turns:   a1 b1 c1 | a2 c2 | a3 | a4
    Cut anywhere, what is left of the line is fair: the first five are two of A, one of B (all that it wants), two of C.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def turn_order(engines: Iterable[bytes], last: bytes) -> list[bytes]:
    """Who comes first, second, ...: round the circle of all names, from the one after `last`."""
    return sorted(engines, key=lambda engine: (engine <= last, engine))


def in_turns(queues: Mapping[bytes, Sequence[Item]], last: bytes) -> list[Item]:
    """One line of all queues in which every leading part is a fair division.

    Args:
        queues: what each engine wants, the most wanted first.
        last: who led the line before; the one after it leads this one.
    """
    ordered = [queues[engine] for engine in turn_order(queues, last)]
    longest = max(map(len, ordered), default=0)
    return [queue[rank] for rank in range(longest) for queue in ordered if rank < len(queue)]


def most_rows(wanted: Collection[int], row_cost: float) -> int:
    """How many rows a draft step may have so that it costs no engine more than its share of the time.

    An engine that alone would need a step of t for its rows gets them in a step of at most `num_engines` x t: as fast as with its
    part of the device for itself. What engines with many rows want beyond that is for later steps; those that want alike do not
    hinder each other.

    Args:
        wanted: rows per engine, those that want some.
        row_cost: time that one more row adds, relative to a step with one row; 0 while it is not known.
    """
    wanted = [count for count in wanted if count]
    total = sum(wanted)
    if len(wanted) < 2 or row_cost <= 0.0:
        return total
    longest = len(wanted) * (1.0 + row_cost * (min(wanted) - 1))
    # A share that a rounding error takes away would be a row. A row that costs more than a step for itself is a measuring error.
    return min(total, max(len(wanted) * min(wanted), 1 + int((longest - 1.0) / row_cost + 1e-6)))


def in_view(items: Sequence[Item], most: int, turn: int) -> Sequence[Item]:
    """At most so many of them, others at each turn; in a row of turns everybody is seen equally often.

    Args:
        turn: goes up by one from one look to the next.
    """
    if len(items) <= most:
        return items
    first = turn * most % len(items)
    return [*items[first : first + most], *items[: max(0, first + most - len(items))]]


def who_gives(held: Mapping[bytes, int]) -> bytes:
    """Whose turn it is to give blocks back: the engine most above an equal share, which is the one that holds most.

    Args:
        held: blocks per engine, with those that it is about to take.
    """
    return max(held, key=lambda engine: (held[engine], engine))
