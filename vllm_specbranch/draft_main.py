"""Entry of the draft server process: read the spec, take the cores, load the draft model, serve.

Owns the process's life. The parent holds the other end of standard input; when that closes, for whatever reason, this process
ends and takes its sockets with it. Run as `python -m vllm_specbranch.draft_main`; not for people.
"""

import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from vllm_specbranch.draft_model import DraftModel
from vllm_specbranch.draft_server import DraftServer, serve
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.placement import ServerSpec
from vllm_specbranch.planner import Planner
from vllm_specbranch.transport import bind, ipc_path

logger = logging.getLogger("vllm.specbranch.draft_main")


def _end_with_parent(address: str) -> None:
    """Wait for the lifeline to close, then end this process at once, even in the middle of a load or a draft step."""
    while sys.stdin.buffer.read(1):
        pass
    shutil.rmtree(Path(ipc_path(address)).parent, ignore_errors=True)
    os._exit(0)


def main() -> None:
    """Serve until the parent closes the lifeline or sends Shutdown."""
    # Ctrl-C goes to the whole process group: the engine decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    spec = ServerSpec.from_json(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, args=(spec.address,), name="lifeline", daemon=True).start()
    if spec.cores:
        os.sched_setaffinity(0, spec.cores)
    # Bound before the model loads: what the engine sends meanwhile is answered then.
    endpoint = bind(spec.address)
    try:
        model = DraftModel.load(spec.model)
        kv = KVBlocks(model.num_blocks, model.block_size)
        limits = Limits(spec.model.max_num_rows, spec.model.max_num_tokens, spec.model.max_num_tokens // 2)
        server = DraftServer(model, kv, Planner(spec.config), limits)
        logger.info("Draft server ready: %d KV blocks of %d tokens, cores %s", kv.num_blocks, kv.block_size, spec.cores)
        serve(server, endpoint)
    finally:
        endpoint.close()


if __name__ == "__main__":
    main()
