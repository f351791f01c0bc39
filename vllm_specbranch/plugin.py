"""The entry point that vLLM calls in each of its processes, and the one place that knows which patches exist.

Owns: when patches are applied. Does not own what they do (`vllm_specbranch.patches`). `register` runs in every vLLM
process, `apply_worker_patches` in target workers that use our worker class, `apply_metrics_patches` in processes that make an
engine with our method.
"""

import logging

from vllm_specbranch import patching
from vllm_specbranch.errors import PatchError
from vllm_specbranch.patches import (
    arg_utils,
    gpu_model_runner,
    loggers,
    rejection_sampler,
    sampler,
    sampling_params,
    topk_topp_sampler,
)
from vllm_specbranch.patching import Patch, Process

# Below "vllm", because that is the logger vLLM gives a handler and a level.
logger = logging.getLogger("vllm.specbranch.plugin")


def all_patches() -> tuple[Patch, ...]:
    """Return every patch record. Imports no upstream module."""
    files = (arg_utils, sampling_params, rejection_sampler, topk_topp_sampler, sampler, gpu_model_runner, loggers)
    return tuple(patch for file in files for patch in file.PATCHES)


def register() -> None:
    """Make `method: specbranch` known to vLLM: the entry point of the group `vllm.general_plugins`.

    Called again it does nothing. It never raises: where our patches do not fit, users of other methods must not be
    hurt, so one warning is logged and vLLM stays as it is; choosing `specbranch` then fails in vLLM's own validation.
    """
    try:
        _apply("frontend")
    except PatchError as error:
        logger.warning(
            "vllm-specbranch is installed but switched off: %s. The method 'specbranch' will be refused, as one that is"
            " not in vLLM's own list; all else works as usual.",
            error,
        )


def apply_worker_patches() -> None:
    """Apply the patches of a target worker. Called by our worker class, before the model runner exists.

    Raises:
        PatchError: as `patching.apply`.
    """
    _apply("worker")


def apply_metrics_patches() -> None:
    """Apply the patches of a process that makes an engine with our method. Called before the engine's loggers exist.

    Raises:
        PatchError: as `patching.apply`.
    """
    _apply("metrics")


def _apply(process: Process) -> None:
    import vllm

    patching.apply((patch for patch in all_patches() if patch.process == process), vllm.__version__)
