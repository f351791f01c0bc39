"""What gives way when the draft KV cache is full: branches first, then whole requests. Decides order only. Pure Python."""

from collections.abc import Collection

from vllm_specbranch.draft_request import DraftRequest
from vllm_specbranch.metrics import DraftServerCounters


def relieve(requests: Collection[DraftRequest], needed: set[int], counters: DraftServerCounters) -> bool:
    """Free some blocks by the first measure that applies: narrow all requests to one branch, else evict one.

    Args:
        requests: all requests, the one committed longest ago first.
        needed: `id`s of the requests that the blocks are wanted for; they are not evicted.
        counters: updated.

    Returns:
        Whether anything was freed.
    """
    num_dropped = sum(request.narrow() for request in requests if request.num_sequences > 1)
    if num_dropped:
        counters.num_narrowings += num_dropped
        return True
    for request in requests:
        if not request.is_evicted and id(request) not in needed:
            request.evict()
            counters.num_evictions += 1
            return True
    return False
