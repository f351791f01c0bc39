"""What gives way when the draft KV cache is full. Decides order only. Pure Python, draft server process.

Of several engines the one that holds most gives (`fair_shares.who_gives`), among its own requests in this order:

    narrow    all requests keep one branch
    shorten   the request committed longest ago gives back what was drafted for it; its trunk keeps its KV
    evict     the request committed longest ago gives back all
    give up   none of them has anything to give: the least valuable row is left out, and a last one that does not fit is shortened

Each is counted. None of them forgets a token of a chain that has been drawn (see `DraftRequest.evict`), and what has been shortened
or evicted is drafted for again after its next commit.
"""

from collections.abc import Collection

from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.draft_work import Work
from vllm_specbranch.metrics import DraftServerCounters


def relieve(requests: Collection[DraftRequest], needed: set[int], counters: DraftServerCounters) -> bool:
    """Free some blocks by the first measure that applies: narrow all requests to one branch, else shorten one, else evict one.

    Args:
        requests: all requests of one engine, the one committed longest ago first.
        needed: `id`s of the requests that the blocks are wanted for; they are neither shortened nor evicted.
        counters: updated.

    Returns:
        Whether anything was freed.
    """
    num_dropped = sum(request.narrow() for request in requests if request.num_sequences > 1)
    if num_dropped:
        counters.num_narrowings += num_dropped
        return True
    others = [request for request in requests if not request.is_evicted and id(request) not in needed]
    for request in others:
        if request.num_drafted_blocks:
            request.shorten()
            counters.num_shortenings += 1
            return True
    for request in others:
        request.evict()
        counters.num_evictions += 1
        return True
    return False


def give_up(work: list[Work], engine: bytes, counters: DraftServerCounters) -> list[Work]:
    """Without any other request that could give blocks: leave out a row; when even the last one does not fit, rest its request.

    Args:
        work: rows that do not fit, the most valuable of each engine first.
        engine: whose last row is left out.
        counters: updated.

    Returns:
        The rest of `work`.
    """
    index = max(index for index, one in enumerate(work) if one.request.engine == engine)
    last = work[index].request
    rest = work[:index] + work[index + 1 :]
    if not rest:
        if last.has_kv(last.tree.root):
            last.shorten()
            counters.num_shortenings += 1
        else:
            last.evict()
            counters.num_evictions += 1
    return rest
