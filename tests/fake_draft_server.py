"""A draft server process with a fake model and everything else real.

Run as `python -m tests.fake_draft_server ADDRESS KEYS|insecure RATE [HOST:PORT]`, the rate in messages per second of one peer, the
last for its metrics and health. Says `ready ADDRESS [PORT]` when it listens. Ends like `vllm-specbranch draft-server`.
"""

import sys

from tests.draft_engine import BLOCK_SIZE
from tests.fakes import FakeDraftModel
from vllm_specbranch import standalone
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_loop import serve
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_sessions import Offer, SharedDraftServer
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.http_status import HttpStatus
from vllm_specbranch.keys import INSECURE, load_server_keys
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.rates import Rates
from vllm_specbranch.transport import bind

# Fewer requests than a real one admits: the fake model is pure Python.
OFFER = Offer("identity", "float32", 4, max_requests=64)


def main() -> None:
    address, keys, messages_per_s, *http = sys.argv[1:]
    config = SpecBranchConfig.from_user({"model": "fake", "num_speculative_tokens": 4, "on_miss": "wait:1"})
    model = FakeDraftModel(400, BLOCK_SIZE)
    server = make_server(config, model, KVBlocks(400, BLOCK_SIZE), Limits(), offer=OFFER)
    assert isinstance(server, SharedDraftServer)
    security = INSECURE if keys == INSECURE else load_server_keys(keys)
    endpoint = bind(address, security, Rates(float(messages_per_s)))
    standalone.end_on_signals(server)
    statuses = [HttpStatus(one) for one in http]
    for status in statuses:
        status.watch(server, endpoint)
    sys.stdout.write(" ".join(["ready", endpoint.address, *(str(one.port) for one in statuses)]) + "\n")
    sys.stdout.flush()
    serve(server, endpoint)
    standalone.take_leave(server, endpoint)
    endpoint.close(standalone.LINGER_MS)


if __name__ == "__main__":
    main()
