"""Which engines are compared, and where each of them runs.

Owns the choice of cores or devices and the specs made from it. Starts nothing. Runs in the process of the demo or a benchmark;
imports neither torch nor vLLM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllm_specbranch.config import METHOD
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.measure_messages import EngineSpec

# Of each GPU, for all engines that are alive on it together.
GPU_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Placement:
    """Where target and draft run: on CPU cores, or on CUDA devices.

    Attributes:
        target_cores, draft_cores: empty on GPUs.
        target_device, draft_device: None on CPUs.
    """

    target_cores: tuple[int, ...] = ()
    draft_cores: tuple[int, ...] = ()
    target_device: int | None = None
    draft_device: int | None = None

    @property
    def is_shared(self) -> bool:
        """Whether target and draft run on the same cores or device, and so wait for each other."""
        if self.target_device is not None:
            return self.target_device == self.draft_device
        return bool(set(self.target_cores) & set(self.draft_cores))

    def describe(self, with_draft: bool) -> str:
        """The cores or devices of an engine without, or with, a draft server."""
        if self.target_device is not None:
            target, draft = f"GPU {self.target_device}", f"GPU {self.draft_device}"
        else:
            target, draft = _cores(self.target_cores), _cores(self.draft_cores)
        if not with_draft:
            return target
        return f"{target}, shared" if self.is_shared else f"{target} + {draft}"


def _cores(cores: Sequence[int]) -> str:
    return ("core " if len(cores) == 1 else "cores ") + ",".join(map(str, cores))


def place(
    available: Sequence[int],
    num_gpus: int,
    target_cores: tuple[int, ...] | None = None,
    draft_cores: tuple[int, ...] | None = None,
) -> Placement:
    """Choose where target and draft run: each its own core or GPU where there are two.

    Args:
        available: cores of this process.
        num_gpus: that vLLM would use; 0 for a CPU build.
        target_cores, draft_cores: what the user wants; None for one core each.

    Raises:
        ConfigError: a core that is not available.
    """
    for option, wanted in (("--target-cores", target_cores), ("--draft-cores", draft_cores)):
        if wanted is not None and not set(wanted) <= set(available):
            raise ConfigError(",".join(map(str, wanted)), f"cores of {list(available)}", option)
    if num_gpus:
        return Placement(target_device=0, draft_device=min(1, num_gpus - 1))
    target = target_cores or tuple(available[:1])
    free = [core for core in available if core not in target]
    return Placement(target_cores=target, draft_cores=draft_cores or tuple(free[:1]) or target)


@dataclass(frozen=True, slots=True)
class Lineup:
    """Makes the specs of engines that differ in their method only.

    Attributes:
        target, draft: folders of the models.
        num_engines: how many are alive at once; they share a GPU's memory.
        observe, arguments: of every spec; see `EngineSpec`.
    """

    target: str
    draft: str
    placement: Placement
    dtype: str = "float32"
    max_model_len: int = 1024
    max_num_seqs: int = 16
    kv_cache_bytes: int = 256 << 20
    enforce_eager: bool = False
    seed: int = 0
    num_engines: int = 3
    observe: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    def plain(
        self, name: str = "plain", cores: tuple[int, ...] | None = None, *, async_scheduling: bool | None = None
    ) -> EngineSpec:
        """Plain vLLM.

        Args:
            async_scheduling: on or off; None leaves vLLM's default.
        """
        arguments = {} if async_scheduling is None else {"async_scheduling": async_scheduling}
        return self._spec(name, None, cores, arguments)

    def ngram(
        self,
        num_tokens: int,
        name: str = "ngram",
        cores: tuple[int, ...] | None = None,
        *,
        lookup_max: int = 4,
        lookup_min: int | None = None,
    ) -> EngineSpec:
        """vLLM's prompt look-up, which needs no draft model.

        Args:
            lookup_max, lookup_min: longest and shortest n-gram that is looked up; vLLM takes `lookup_max` for a minimum of None.
        """
        ngram = {"method": "ngram", "num_speculative_tokens": num_tokens, "prompt_lookup_max": lookup_max}
        if lookup_min is not None:
            ngram["prompt_lookup_min"] = lookup_min
        return self._spec(name, ngram, cores)

    def draft_model(
        self, num_tokens: int, name: str = "draft_model", cores: tuple[int, ...] | None = None
    ) -> EngineSpec:
        """vLLM's own sequential speculative decoding; target and draft take turns on the same cores."""
        return self._spec(
            name, {"method": "draft_model", "model": self.draft, "num_speculative_tokens": num_tokens}, cores
        )

    def specbranch(self, num_tokens: int, name: str = METHOD, **settings: Any) -> EngineSpec:
        """This project. `settings` are further keys of `speculative_config`."""
        ours: dict[str, Any] = {"method": METHOD, "model": self.draft, "num_speculative_tokens": num_tokens}
        if self.placement.target_device is None:
            ours["draft_cpu_cores"] = list(self.placement.draft_cores)
        else:
            ours["draft_device"] = self.placement.draft_device
            ours["draft_gpu_memory_utilization"] = self._gpu_share()
        return self._spec(name, ours | settings, None)

    def _spec(
        self,
        name: str,
        speculative: dict[str, Any] | None,
        cores: tuple[int, ...] | None,
        arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> EngineSpec:
        device = self.placement.target_device
        return EngineSpec(
            name=name,
            model=self.target,
            cores=self.placement.target_cores if cores is None else cores,
            speculative=speculative,
            dtype=self.dtype,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            kv_cache_bytes=self.kv_cache_bytes,
            enforce_eager=self.enforce_eager,
            seed=self.seed,
            visible_devices=None if device is None else str(device),
            gpu_memory_utilization=None if device is None else self._gpu_share(),
            observe=self.observe,
            arguments=self.arguments | dict(arguments),
        )

    def _gpu_share(self) -> float:
        # The draft server is one more on the same GPU.
        return round(GPU_SHARE / (self.num_engines + 1), 3)


def require_model(path: Path, field: str) -> Path:
    """Return the folder of a model, made absolute.

    Raises:
        ConfigError: not a folder with config.json.
    """
    folder = path.expanduser().absolute()
    if not (folder / "config.json").is_file():
        raise ConfigError(str(path), "the folder of a model (with config.json in it)", field)
    return folder
