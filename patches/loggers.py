"""A hook into vLLM's statistics: our metrics, on its `/metrics`.

vLLM's own way to add a logger (the group `vllm.stat_logger_plugins`) is not for us: what is registered there is made for every
engine, whatever its method, and switches statistics on where the user has switched them off.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_specbranch.patching import Patch


def _add_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        # Ours is the only speculative config with this field.
        if getattr(vllm_config.speculative_config, "specbranch", None) is not None:
            from vllm_specbranch import stat_logger

            stat_logger.join(self)

    return __init__


PATCHES = (
    Patch(
        symbol="vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        kind="wrap",
        process="metrics",
        why="Our metrics belong on `/metrics` of the engines that use our method, and of no others.",
        remove_when="vLLM lets a speculative method bring a stat logger of its own.",
        fingerprints={"0.32.0": "47afa5278ef89cb8a79629b518f8b912b79f8d2da07453467e55f7c717a2acfd"},
        make=_add_ours,
    ),
)
