"""What the commands that start engines of a pair all ask for: prompts, sizes, cores.

Owns the shared part of `DemoSettings`, `TuneSettings` and `TrainHeadSettings`. Pure data. Runs in the process of the command.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a user asked for, of both models; see the help of each command.

    Attributes:
        prompts: file of prompts; None for those that ship with the package.
        max_tokens: new tokens per prompt.
        dtype: of both models.
        target_cores, draft_cores: CPU cores of each; None leaves the choice to `lineup.place`.
        max_model_len: longest prompt and output together, in tokens.
        kv_cache_bytes: of the target's KV cache.
        enforce_eager: do not compile the models.
    """

    prompts: Path | None = None
    max_tokens: int = 96
    dtype: str = "auto"
    target_cores: tuple[int, ...] | None = None
    draft_cores: tuple[int, ...] | None = None
    max_model_len: int = 1024
    kv_cache_bytes: int = 1 << 29
    enforce_eager: bool = False
