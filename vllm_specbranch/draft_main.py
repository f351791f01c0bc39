"""Entry of the draft server process: read the spec, take the cores, load the draft model, serve.

Owns the process's life. The parent holds the other end of standard input; when that closes, for whatever reason, this process
ends and takes its sockets with it. Run as `python -m vllm_specbranch.draft_main`; not for people.
"""

import logging
import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from vllm_specbranch.addresses import ipc_path
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_deterministic import DeterministicDraftServer
from vllm_specbranch.draft_loop import serve
from vllm_specbranch.draft_model import DraftModel
from vllm_specbranch.draft_sampling import RandomNumber, uniform
from vllm_specbranch.draft_server import DraftServer
from vllm_specbranch.draft_sessions import Offer, SharedDraftServer
from vllm_specbranch.draft_steps import Model
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.keys import load_server_keys
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.placement import EXIT_CONFIG, ServerSpec
from vllm_specbranch.planner import Planner
from vllm_specbranch.transport import bind

logger = logging.getLogger("vllm.specbranch.draft_main")

PARENT_CHECK_S = 2.0


def _end_with_parent(directory: Path, parent: int) -> None:
    """Wait for the lifeline to close, then end this process at once, even in the middle of a load or a draft step.

    The parent's pid is watched too: a fork of the parent may hold the lifeline open beyond its death.
    """
    while os.getppid() == parent:
        readable, _, _ = select.select([sys.stdin], [], [], PARENT_CHECK_S)
        if readable and not os.read(sys.stdin.fileno(), 1024):
            break
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


def _take_cores(cores: tuple[int, ...]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        allowed = f"cores of this machine that this process may use ({error})"
        raise ConfigError(list(cores), allowed, "draft_cpu_cores") from error


def main() -> None:
    """Serve until the parent closes the lifeline or sends Shutdown."""
    # The engine decides when this process ends, not who interrupts it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()
    spec = ServerSpec.from_json(sys.stdin.buffer.readline())
    directory = Path(spec.keys) if spec.keys else Path(ipc_path(spec.address)).parent
    threading.Thread(target=_end_with_parent, args=(directory, parent), name="lifeline", daemon=True).start()
    try:
        _serve(spec)
    except ConfigError as error:
        logger.error("%s", error)
        sys.exit(EXIT_CONFIG)


def _serve(spec: ServerSpec) -> None:
    if spec.cores:
        _take_cores(spec.cores)
    # Bound before the model loads: what the engine sends meanwhile is answered then.
    endpoint = bind(spec.address, load_server_keys(spec.keys) if spec.keys else None)
    try:
        model = DraftModel.load(spec.model)
        kv = KVBlocks(model.num_blocks, model.block_size)
        limits = Limits(spec.model.max_num_rows, spec.model.max_num_tokens, spec.model.max_num_tokens // 2)
        server = make_server(spec.config, model, kv, limits)
        logger.info("Draft server ready: %d KV blocks of %d tokens, cores %s", kv.num_blocks, kv.block_size, spec.cores)
        serve(server, endpoint)
    finally:
        endpoint.close()


def make_server(
    config: SpecBranchConfig,
    model: Model,
    kv: KVBlocks,
    limits: Limits,
    clock: Callable[[], float] = time.perf_counter,
    random_number: RandomNumber = uniform,
    offer: Offer | None = None,
) -> DraftServer:
    """The draft server that the settings ask for.

    Args:
        config, model, kv, limits, clock, random_number: as for `DraftServer`.
        offer: of a server that several engines share; None for one that belongs to the engine that started it.
    """
    kind: Callable[..., DraftServer] = DraftServer
    if offer is not None:
        kind = partial(SharedDraftServer, offer=offer)
    elif config.deterministic:
        kind = partial(DeterministicDraftServer, chunk_tokens=config.num_speculative_tokens)
    return kind(model, kv, Planner(config), limits, clock, random_number)


if __name__ == "__main__":
    main()
