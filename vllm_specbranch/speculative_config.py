"""From a user's settings to the speculative config that vLLM carries to all its processes.

Owns: everything about the settings that needs the models or the engine's own arguments (vocabulary, context, worker and
scheduler class). Does not own the settings themselves (`config`). Runs where engine arguments become a config: the
frontend, and each API server process; the classes are unpickled in every process.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import InstanceOf
from vllm import envs
from vllm.config.speculative import SpeculativeConfig
from vllm.config.utils import config
from vllm.platforms import current_platform

from vllm_specbranch.config import METHOD, SpecBranchConfig, load_bare_word_settings
from vllm_specbranch.draft_check import DraftModelSpec, check_draft_model
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_check import feature_layers
from vllm_specbranch.keys import client_security
from vllm_specbranch.plugin import apply_metrics_patches
from vllm_specbranch.ray_cluster import check_ray, connected_address

logger = logging.getLogger("vllm.specbranch.speculative_config")

PROPOSER = "vllm_specbranch.proposer.Proposer"
SCHEDULER = "vllm_specbranch.scheduler.SpecBranchScheduler"
CPU_WORKER = "vllm_specbranch.worker.SpecBranchCPUWorker"
GPU_WORKER = "vllm_specbranch.worker.SpecBranchGPUWorker"


@config
class SpecBranchSpeculativeConfig(SpeculativeConfig):
    """vLLM's speculative config with ours inside. At rest vLLM sees the method `custom_class` with our proposer."""

    specbranch: InstanceOf[SpecBranchConfig] = None  # type: ignore[assignment]
    """The validated settings. The default is for the dataclass only: `build_speculative_config` always gives it."""
    draft: InstanceOf[DraftModelSpec] = None  # type: ignore[assignment]
    """The draft model as the draft server has to load it."""
    feature_layers: tuple[int, ...] = ()
    """After which layers the target's forward returns its hidden states, for the length head; none without one."""

    ray_address: str | None = None
    """The Ray cluster that the engine was made in, if any: processes that it starts cannot find that by themselves."""

    def compute_hash(self) -> str:
        """Upstream's, which stands for the target's graph and names the compiled one, and the hidden states that the graph returns.

        Upstream counts these for its own methods only.
        """
        upstream: str = super().compute_hash()
        if not self.feature_layers:
            return upstream
        return hashlib.sha256(f"{upstream} hidden states after {self.feature_layers}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"SpecBranchSpeculativeConfig({self.specbranch!r}, {self.draft!r})"


def build_speculative_config(
    engine_args: Any, target_model_config: Any, target_parallel_config: Any
) -> SpecBranchSpeculativeConfig:
    """Check the settings against engine and models, before any weights load.

    Mutates: `target_parallel_config.worker_cls` and `engine_args.scheduler_cls`, which become ours. The user's
    settings stay as they are, so the same arguments give the same result when they are used again.

    Args:
        engine_args: vLLM's `EngineArgs`, with method `specbranch`.
        target_model_config: the target's `ModelConfig`.
        target_parallel_config: the target's `ParallelConfig`.

    Raises:
        ConfigError: a setting that cannot work, alone or with this engine.
    """
    settings = SpecBranchConfig.from_user(_user_settings(engine_args, target_model_config.model))
    _check_engine(engine_args, target_parallel_config)
    if settings.is_remote:
        assert settings.draft_keys is not None, "checked with the settings"
        client_security(settings.draft_keys)
    elif settings.is_on_ray:
        check_ray()
    else:
        settings = _place_on_device(settings, target_parallel_config)
    draft = check_draft_model(settings, target_model_config, str(engine_args.load_format))
    layers = feature_layers(settings, target_model_config, draft)
    if draft.max_model_len < target_model_config.max_model_len:
        logger.info(
            "The draft model takes %d tokens, the target %d: requests beyond %d tokens are decoded without drafts.",
            draft.max_model_len,
            target_model_config.max_model_len,
            draft.max_model_len,
        )
    _take_class(target_parallel_config, "worker_cls", ("auto",), _worker_class())
    _take_class(engine_args, "scheduler_cls", (None,), SCHEDULER)
    apply_metrics_patches()
    return SpecBranchSpeculativeConfig(
        method="custom_class",
        model=PROPOSER,
        num_speculative_tokens=settings.num_speculative_tokens,
        target_model_config=target_model_config,
        target_parallel_config=target_parallel_config,
        specbranch=settings,
        draft=draft,
        feature_layers=layers,
        ray_address=connected_address(),
    )


def _user_settings(engine_args: Any, target_model: str) -> dict[str, object]:
    given = engine_args.speculative_config
    if not isinstance(given, Mapping):  # None with --spec-method, or the bare word
        given = {} if given is None else {"method": given}
    merged: dict[str, object] = {key.replace("-", "_"): value for key, value in given.items()}
    for flag, key in (("spec_method", "method"), ("spec_model", "model"), ("spec_tokens", "num_speculative_tokens")):
        value = getattr(engine_args, flag)
        if value is None:
            continue
        if key in merged:
            name = "--" + flag.replace("_", "-")
            raise ConfigError(value, f"one of {name} and the key {key!r} of --speculative-config, not both", name)
        merged[key] = value
    if set(merged) == {"method"} or ("model" not in merged and not isinstance(given, Mapping)):
        merged = load_bare_word_settings(target_model) | merged
    return merged


def _check_engine(engine_args: Any, parallel_config: Any) -> None:
    """Refuse what would break later, or be refused later in the name of `custom_class`, which the user never typed."""
    stages = parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ConfigError(stages, f"1 with method {METHOD!r}", "pipeline_parallel_size")
    if engine_args.async_scheduling:
        raise ConfigError(True, f"false or unset with method {METHOD!r}", "async_scheduling")
    runner_field = "VLLM_USE_V2_MODEL_RUNNER"
    if envs.VLLM_USE_V2_MODEL_RUNNER:
        raise ConfigError(True, f"0 or unset with method {METHOD!r}, which needs the V1 model runner", runner_field)
    if engine_args.watermark_config is not None:
        allowed = f"none with method {METHOD!r}: it needs the V2 model runner"
        raise ConfigError(engine_args.watermark_config, allowed, "watermark_config")


def _place_on_device(settings: SpecBranchConfig, parallel_config: Any) -> SpecBranchConfig:
    """Give the draft server a GPU that the target does not use; on a CPU machine there is nothing to choose here."""
    if current_platform.is_cpu():
        if settings.draft_device is not None:
            raise ConfigError(settings.draft_device, "unset on a CPU machine (see draft_cpu_cores)", "draft_device")
        return settings
    if settings.draft_device is not None:
        return settings
    num_used = parallel_config.world_size * parallel_config.data_parallel_size_local
    num_visible = current_platform.device_count()
    own = num_used + (parallel_config.data_parallel_rank_local or 0)
    if own >= num_visible:
        allowed = (
            f"the index of a GPU for the draft server: the target takes {num_used} of {num_visible} visible ones (naming one of "
            "those shares it; then lower gpu_memory_utilization and draft_gpu_memory_utilization)"
        )
        raise ConfigError(None, allowed, "draft_device")
    return replace(settings, draft_device=int(current_platform.visible_device_id_to_physical_device_id(own)))


def _worker_class() -> str:
    if current_platform.is_cpu():
        return CPU_WORKER
    if current_platform.is_cuda_alike():
        return GPU_WORKER
    raise ConfigError(current_platform.device_type, f"a cpu, cuda or rocm device with method {METHOD!r}", "device")


def _take_class(holder: Any, field: str, unset: tuple[object, ...], ours: str) -> None:
    given = getattr(holder, field)
    if given not in (*unset, ours):
        raise ConfigError(given, f"unset with method {METHOD!r}, which brings its own", field)
    setattr(holder, field, ours)
