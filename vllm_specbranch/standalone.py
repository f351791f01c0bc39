"""`vllm-specbranch draft-server`: a draft server on its own, for engines that reach it over TCP.

Owns the life of the process: settings, cores, loading, the line that says it is ready, and its end: on SIGTERM it answers what is
open, takes leave of its engines, and exits. It is nobody's child: who started it restarts it.
"""

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_specbranch.addresses import is_tcp
from vllm_specbranch.config import SpecBranchConfig, limit_threads
from vllm_specbranch.draft_identity import draft_identity
from vllm_specbranch.draft_loop import serve
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_model import DraftModel, DraftModelSettings
from vllm_specbranch.draft_sessions import MAX_ENGINES, MAX_REQUESTS_PER_ENGINE, Offer, SharedDraftServer
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.http_status import HttpStatus
from vllm_specbranch.keys import INSECURE, ServerSecurity, load_server_keys
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.transport import ServerEndpoint, bind

logger = logging.getLogger("vllm.specbranch.standalone")

MAX_ROWS = 256
MAX_STEP_TOKENS = 512
# Where the user sets no limit, the model's own is taken.
NO_LIMIT = 2**31 - 1
# How long the last messages may take to leave.
LINGER_MS = 1000
FAREWELL = "this draft server ends"


@dataclass(frozen=True)
class StandaloneSettings:
    """What the command was given.

    Attributes:
        bind: `tcp://host:port` to listen at.
        keys: directory of keys; None for the word `insecure`.
        draft: keys of `speculative_config`, as a user gives them.
        dtype: of the draft model; engines with another are refused.
        max_engines, max_requests: most engines at a time, and most open requests of one.
        http: `host:port` for metrics and health; None for none.
    """

    bind: str
    keys: Path | None
    draft: Mapping[str, object]
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_engines: int = MAX_ENGINES
    max_requests: int = MAX_REQUESTS_PER_ENGINE
    http: str | None = None


def run(settings: StandaloneSettings, write: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code.

    Raises:
        ConfigError: settings that cannot work.
        WireError: an address cannot be used, or is taken.
    """
    with contextlib.ExitStack() as stack:
        return _run(settings, write, stack)


def _run(settings: StandaloneSettings, write: Callable[[str], None], stack: contextlib.ExitStack) -> int:
    config = _draft_settings(settings.draft)
    security: ServerSecurity = INSECURE if settings.keys is None else load_server_keys(settings.keys)
    if not is_tcp(settings.bind):
        raise ConfigError(settings.bind, "tcp://host:port", "--bind")
    # Both are looked at before minutes are spent on a model.
    status = None
    if settings.http is not None:
        status = stack.enter_context(contextlib.closing(HttpStatus(settings.http)))
        write(f"/metrics, /health and /ready at port {status.port}\n")
    bind(settings.bind, security).close()
    if config.draft_cpu_cores:
        _take_cores(config.draft_cpu_cores)
    if security == INSECURE:
        logger.warning("Whoever reaches %s can use this draft server and read what travels.", settings.bind)
    server = _load(config, settings)
    endpoint = bind(settings.bind, security)
    try:
        end_on_signals(server)
        if status is not None:
            status.watch(server, endpoint)
        write(f"draft server ready at {endpoint.address}: {config.model}, {server.kv.num_blocks} KV blocks\n")
        serve(server, endpoint)
        take_leave(server, endpoint)
    finally:
        endpoint.close(LINGER_MS)
    write("draft server ended\n")
    return 0


def take_leave(server: SharedDraftServer, endpoint: ServerEndpoint) -> None:
    """Answer what is open and say farewell to everybody."""
    for peer, reply in server.drain(FAREWELL):
        endpoint.send(peer, reply)


def _draft_settings(given: Mapping[str, object]) -> SpecBranchConfig:
    """The settings of the draft side, as for an engine that starts its server itself.

    Raises:
        ConfigError: one that cannot be, or that is not for a server that engines share.
    """
    config = SpecBranchConfig.from_user(given)
    if config.draft_placement != "process":
        raise ConfigError(config.draft_placement, "unset: it belongs to the engine", "draft_placement")
    if config.deterministic:
        raise ConfigError(True, "false: what several engines share cannot be the same at every run", "deterministic")
    if config.trained_head is not None:
        raise ConfigError(config.trained_head, "'online' or unset: a trained head belongs to the engine", "length_head")
    if config.draft_device is not None:
        raise ConfigError(config.draft_device, "unset: choose the device with CUDA_VISIBLE_DEVICES", "draft_device")
    return config


def _take_cores(cores: tuple[int, ...]) -> None:
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        allowed = f"cores of this machine that this process may use ({error})"
        raise ConfigError(list(cores), allowed, "draft_cpu_cores") from error
    limit_threads(len(cores))


def _load(config: SpecBranchConfig, settings: StandaloneSettings) -> SharedDraftServer:
    import torch

    if config.draft_cpu_cores:
        # The environment comes too late for an OpenMP that was preloaded, as vLLM's images do: it has counted all cores.
        torch.set_num_threads(len(config.draft_cpu_cores))
    model = DraftModel.load(
        DraftModelSettings(
            model=config.model,
            max_model_len=config.max_model_len or NO_LIMIT,
            dtype=settings.dtype,
            quantization=config.quantization,
            revision=config.revision,
            trust_remote_code=settings.trust_remote_code,
            enforce_eager=config.enforce_eager,
            kv_cache_bytes=config.draft_kv_cache_bytes,
            gpu_memory_utilization=config.draft_gpu_memory_utilization,
            max_num_rows=MAX_ROWS,
            max_num_tokens=MAX_STEP_TOKENS,
        )
    )
    offer = Offer(
        draft_identity(model.path),
        model.dtype,
        config.num_speculative_tokens,
        settings.max_engines,
        settings.max_requests,
    )
    limits = Limits(MAX_ROWS, MAX_STEP_TOKENS, MAX_STEP_TOKENS // 2)
    server = make_server(config, model, KVBlocks(model.num_blocks, model.block_size), limits, offer=offer)
    assert isinstance(server, SharedDraftServer)
    return server


def end_on_signals(server: SharedDraftServer) -> None:
    """Let SIGTERM and SIGINT end the serving loop, once the draft step under way is done."""

    def stop(number: int, frame: object) -> None:
        del number, frame
        server.is_stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
