"""From the settings to the line to a draft server, wherever that runs: a child process of this engine, under Ray, or at addresses.

Owns the choice and what is passed on; knows no messages beyond the handshake's terms. Runs in the target's worker (output rank).
"""

from functools import partial

from vllm.platforms import current_platform

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_check import DraftModelSpec
from vllm_specbranch.draft_identity import draft_identity
from vllm_specbranch.draft_link import DraftLink
from vllm_specbranch.draft_model import DraftModelSettings
from vllm_specbranch.keys import client_security
from vllm_specbranch.messages import Terms
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.placement import ServerProcess
from vllm_specbranch.ray_messages import TargetPlace
from vllm_specbranch.ray_placement import RayServer
from vllm_specbranch.remote_server import RemoteServer
from vllm_specbranch.transport import connect

# Rows of one draft step: enough for a few branches of few requests, or for one branch of many.
MIN_ROWS = 64
MAX_ROWS = 256
MAX_STEP_TOKENS = 512


def make_link(
    config: SpecBranchConfig,
    draft: DraftModelSpec,
    *,
    vocab_size: int,
    max_model_len: int,
    max_num_seqs: int,
    counters: EngineCounters,
    target: TargetPlace | None = None,
) -> DraftLink:
    """The line to this engine's draft server, which is not started yet.

    Args:
        config: the user's settings.
        draft: the draft model.
        vocab_size, max_model_len, max_num_seqs: of the target.
        counters: updated by the link.
        target: where the target runs, for a draft server that Ray places.

    Raises:
        ConfigError: the keys cannot be used on this machine.
    """
    link = partial(
        DraftLink,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        wants_top_probs=config.head_layers is not None,
        counters=counters,
    )
    if config.is_remote:
        assert config.draft_keys is not None, "checked with the settings"
        return link(
            RemoteServer(config.draft_addresses),
            terms=Terms(draft_identity(draft.model), draft.dtype, config.num_speculative_tokens),
            open_channel=partial(connect, security=client_security(config.draft_keys)),
        )
    settings, on_cpu = _model_settings(config, draft, max_num_seqs), current_platform.is_cpu()
    if target is not None:
        server = RayServer(config, settings, target, on_cpu=on_cpu)
        return link(server, open_channel=server.open_channel)
    return link(ServerProcess(config, settings, on_cpu=on_cpu))


def _model_settings(config: SpecBranchConfig, draft: DraftModelSpec, max_num_seqs: int) -> DraftModelSettings:
    return DraftModelSettings(
        model=draft.model,
        max_model_len=draft.max_model_len,
        dtype=draft.dtype,
        quantization=draft.quantization,
        revision=draft.revision,
        trust_remote_code=draft.trust_remote_code,
        load_format=draft.load_format,
        enforce_eager=draft.enforce_eager,
        kv_cache_bytes=config.draft_kv_cache_bytes,
        gpu_memory_utilization=config.draft_gpu_memory_utilization,
        max_num_rows=max(MIN_ROWS, min(MAX_ROWS, max_num_seqs)),
        max_num_tokens=MAX_STEP_TOKENS,
        seed=draft.seed,
    )
