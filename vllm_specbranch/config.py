"""The settings: a frozen `SpecBranchConfig`, its validation and its defaults.

Owns every user-facing key of `speculative_config` and is the only reader of environment variables. Knows nothing of vLLM or
torch: what needs the models (vocabulary, context) is checked in `speculative_config.py`. Runs in every process.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vllm_specbranch import setting_values as values
from vllm_specbranch.addresses import is_tcp
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.setting_values import OnMiss

METHOD = "specbranch"
CONFIG_FILE_NAME = "specbranch.json"
CONFIG_ENV = "VLLM_SPECBRANCH_CONFIG"

PolicyName = Literal["pearl", "specbranch", "fanout", "best_first"]
BranchRule = Literal["adaptive", "fixed"]
StopRule = Literal["confidence", "adaedl", "none"]
SampleMethod = Literal["probabilistic", "greedy"]

# DESIGN: "from measured rounds, at most 50 ms".
MAX_AUTO_REPLY_TIMEOUT_MS = 50.0

# Of 1 - sqrt(0.2 H): about 2.5 nats.
ADAEDL_THRESHOLD = 0.3

# `length_head` of this value needs no file: the draft server learns the classes while it serves.
ONLINE_HEAD = "online"

# What differs from the defaults of `SpecBranchConfig`, which are those of `best_first`. PEARL submits all it has, has no second
# candidate, and goes on empty after a miss; SpecBranch ends a chunk early, since its forks are at the end of the chunk only.
_POLICY_DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "pearl": {"on_miss": "go", "max_branches": 1},
    "specbranch": {"stop_rule": "confidence", "max_branches": 8},
    "fanout": {"max_branches": 16},
}

# What a draft server decides that engines share; an engine that did not start it cannot.
_SERVER_KEYS = (
    "policy",
    "max_branches",
    "branch_rule",
    "stop_rule",
    "stop_threshold",
    "on_miss",
    "draft_device",
    "draft_cpu_cores",
    "draft_kv_cache_bytes",
    "draft_gpu_memory_utilization",
    "enforce_eager",
)

# What only a draft server that Ray places can do with.
_RAY_KEYS = ("draft_ray_num_cpus", "draft_ray_num_gpus", "draft_ray_resources")

# What the processes of one engine should agree about, wherever Ray puts them: where models come from, and what is logged.
_SHARED_PREFIXES = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_")
_SHARED_NAMES = ("VLLM_CACHE_ROOT", "VLLM_LOGGING_LEVEL", "VLLM_USE_MODELSCOPE")
# Secrets stay where they are: what is told to Ray, Ray keeps. Their names are many, and have one of these words in them.
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
# How vLLM says which cores a worker's threads run on.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY")

EXAMPLE_SETTINGS = '{"model": "path or hub id of the draft model", "num_speculative_tokens": 8}'


@dataclass(frozen=True)
class SpecBranchConfig:
    """The validated settings of one engine; the keys are those of `speculative_config`.

    Attributes:
        model: the draft model, a path or hub id.
        num_speculative_tokens: most draft tokens in a chunk (the papers' gamma), 1..64.
        policy: `pearl` (arXiv:2408.11850), `specbranch` (arXiv:2506.01979), `fanout` (SSD, arXiv:2603.03251) or `best_first`.
        max_branches: most branches at a branch point (k_max of arXiv:2506.01979), 1..64; of a request with `fanout`, `best_first`.
        branch_rule: of `specbranch`: fewer branches where the draft is sure of itself (`adaptive`), or always `max_branches`.
        stop_rule: what ends a chunk: the draft's top probability (`confidence`), a bound on the acceptance probability from its
            entropy (`adaedl`, arXiv:2410.18351), or its length alone (`none`).
        stop_threshold: value of the rule below which the chunk ends (the paper's epsilon), 0..1; alone it means `confidence`. The
            default is low because small drafts are unsure more often than wrong: on the shipped pair 0.1 accepts far more.
        on_miss: see `OnMiss`.
        draft_sample_method: drafts of requests with temperature > 0: drawn from the draft's own distribution at that temperature
            (`probabilistic`), or its most likely tokens (`greedy`). Both are lossless.
        draft_top_m: to how many tokens that distribution is truncated, 1..1024.
        length_head: what says how far the next draft will be accepted (section 5 of the design): the folder of a trained head,
            `online` for one that is learned while serving, or None.
        head_layers: of how many last layers the target's hidden states are taken (K of arXiv:2506.01979). A trained head names its
            own K; given without one, the features are computed for whoever records them, and nothing else uses them.
        deterministic: the same drafts at every run of the same batch: a fixed number of draft steps per round, no rule that looks
            at load or time, and the reply is awaited. Slower; see section 10 of the design.
        draft_placement: where the draft server runs: `process` is a child process on this machine, `ray` an actor that Ray places
            and restarts, `tcp://host:port` the address of one that runs on its own (`vllm-specbranch draft-server`), whose own
            settings decide how it drafts; several of them (a list, or separated by commas) are used one at a time, the next one
            when one does not answer.
        draft_keys: with an address: the directory of the keys (`vllm-specbranch keys`), or the word `insecure`.
        draft_ray_num_cpus, draft_ray_num_gpus: with `ray`: how many CPUs and GPUs (0..1) of its node the actor takes; None means
            one GPU unless the target runs on CPUs.
        draft_ray_resources: with `ray`: (name, amount) of custom resources that the actor takes.
        draft_device: index of the CUDA device that the draft server sees; None leaves the choice to placement.
        draft_cpu_cores: CPU cores of the draft server; None means all cores that the target does not use.
        draft_kv_cache_bytes: size of the draft KV cache; None means a default that fits the device.
        draft_gpu_memory_utilization: share of the draft's GPU memory to use, 0..1; GPUs only.
        reply_timeout_ms: longest wait for drafts in one engine step; None means derived from measured rounds.
        quantization, revision, max_model_len: of the draft model, as in vLLM.
        draft_tensor_parallel_size: 1 is the only value that works today.
        enforce_eager: run the draft model without compilation.
        reclaim_blocks: the target's scheduler takes back KV blocks that only rejected draft tokens had needed, rather than
            preempt a request for want of them; see section 6 of the design.
    """

    model: str
    num_speculative_tokens: int = 8
    policy: PolicyName = "best_first"
    max_branches: int = 32
    branch_rule: BranchRule = "adaptive"
    stop_rule: StopRule = "none"
    stop_threshold: float = 0.1
    on_miss: OnMiss = OnMiss("auto")  # noqa: RUF009 - frozen
    draft_sample_method: SampleMethod = "probabilistic"
    draft_top_m: int = 64
    length_head: str | None = None
    head_layers: int | None = None
    deterministic: bool = False
    draft_placement: str = "process"
    draft_keys: str | None = None
    draft_ray_num_cpus: float = 1.0
    draft_ray_num_gpus: float | None = None
    draft_ray_resources: tuple[tuple[str, float], ...] = ()
    draft_device: int | None = None
    draft_cpu_cores: tuple[int, ...] | None = None
    draft_kv_cache_bytes: int | None = None
    draft_gpu_memory_utilization: float = 0.9
    reply_timeout_ms: float | None = None
    quantization: str | None = None
    revision: str | None = None
    max_model_len: int | None = None
    draft_tensor_parallel_size: int = 1
    enforce_eager: bool = False
    reclaim_blocks: bool = True

    @classmethod
    def from_user(cls, settings: Mapping[str, object]) -> "SpecBranchConfig":
        """Validate a user's `speculative_config`.

        Args:
            settings: the dict as given, with or without `method`; left unchanged.

        Raises:
            ConfigError: an unknown key, a missing `model`, or a value out of its range.
        """
        given = {key: value for key, value in settings.items() if key != "method"}
        unknown = sorted(set(given) - set(_PARSERS))
        if unknown:
            raise ConfigError(given[unknown[0]], "one of the keys " + ", ".join(sorted(_PARSERS)), unknown[0])
        if given.get("model") in (None, ""):
            raise ConfigError(given.get("model"), "the path or hub id of the draft model (required)", "model")
        policy = _PARSERS["policy"](given.get("policy", cls.policy), "policy")
        defaults: dict[str, object] = dict(_POLICY_DEFAULTS.get(str(policy), {}))
        if given.get("stop_threshold") is not None:
            # Who gives a threshold wants a rule that uses it.
            defaults["stop_rule"] = "confidence"
        if given.get("stop_rule") == "adaedl":
            # Another scale: 0.1 would be an entropy of 4 nats.
            defaults["stop_threshold"] = ADAEDL_THRESHOLD
        parsed: dict[str, Any] = {
            key: _PARSERS[key](value, key) for key, value in (defaults | given).items() if value is not None
        }
        config = cls(**parsed)
        config._check_policy()
        config._check_placement([key for key, value in given.items() if value is not None])
        return config

    def _check_policy(self) -> None:
        if self.policy == "pearl" and self.max_branches != 1:
            raise ConfigError(self.max_branches, "1 with policy 'pearl', which has a single chain", "max_branches")
        if self.policy != "specbranch" and self.branch_rule != "adaptive":
            raise ConfigError(self.branch_rule, "'adaptive' unless policy is 'specbranch'", "branch_rule")
        if self.policy == "pearl" and self.length_head is not None:
            raise ConfigError(self.length_head, "none with policy 'pearl', which submits all it has", "length_head")

    def _check_placement(self, given: Collection[str]) -> None:
        if self.is_on_ray:
            if self.draft_device is not None:
                allowed = "unset with draft_placement 'ray': Ray chooses the device (see draft_ray_num_gpus)"
                raise ConfigError(self.draft_device, allowed, "draft_device")
        else:
            for key in _RAY_KEYS:
                if key in given:
                    raise ConfigError(getattr(self, key), "unset unless draft_placement is 'ray'", key)
        if not self.is_remote:
            if self.draft_keys is not None:
                raise ConfigError(self.draft_keys, "unset unless draft_placement is 'tcp://host:port'", "draft_keys")
            return
        if self.draft_keys is None:
            allowed = f"a directory of keys or 'insecure' with draft_placement {self.draft_placement!r}"
            raise ConfigError(None, allowed, "draft_keys")
        if self.deterministic:
            allowed = "false with a draft server that other engines may use as well"
            raise ConfigError(self.deterministic, allowed, "deterministic")
        if self.length_head == ONLINE_HEAD:
            allowed = "a trained head's folder, or unset: `vllm-specbranch draft-server` has a setting for learning while serving"
            raise ConfigError(self.length_head, allowed, "length_head")
        for key in _SERVER_KEYS:
            if key in given:
                allowed = "unset with a draft server of its own: it is a setting of `vllm-specbranch draft-server`"
                raise ConfigError(getattr(self, key), allowed, key)

    @property
    def is_remote(self) -> bool:
        """Whether the draft server is one that this engine does not start."""
        return is_tcp(self.draft_placement)

    @property
    def is_on_ray(self) -> bool:
        """Whether Ray places the draft server."""
        return self.draft_placement == "ray"

    @property
    def draft_addresses(self) -> tuple[str, ...]:
        """Where draft servers are that this engine does not start, in the order in which they are tried."""
        return tuple(self.draft_placement.split(",")) if self.is_remote else ()

    @property
    def trained_head(self) -> str | None:
        """The folder of the trained head; None if there is none, or one that is learned while serving."""
        return None if self.length_head == ONLINE_HEAD else self.length_head


def load_bare_word_settings(target_model: str) -> dict[str, object]:
    """Settings for `--speculative-config specbranch`, from a file.

    The file is the one that `VLLM_SPECBRANCH_CONFIG` names, else `specbranch.json` beside the target's config. A relative
    `model` in it that exists beside the file is taken from there.

    Raises:
        ConfigError: no such file, or not a JSON object; the message says what to write.
    """
    named = os.environ.get(CONFIG_ENV)
    path = Path(named) if named else Path(target_model) / CONFIG_FILE_NAME
    field = CONFIG_ENV if named else "--speculative-config"
    advice = f"with a file {path} that holds for example {EXAMPLE_SETTINGS}"
    if not named:
        advice += f' (or {CONFIG_ENV} set to such a file, or the settings themselves as JSON with "method": "{METHOD}")'
    value = named or METHOD
    try:
        settings = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(value, advice, field) from error
    except ValueError as error:
        raise ConfigError(value, f"a file of valid JSON ({path}: {error})", field) from error
    if not isinstance(settings, dict):
        raise ConfigError(value, f"a JSON object in {path}, for example {EXAMPLE_SETTINGS}", field)
    model = settings.get("model")
    if isinstance(model, str) and not Path(model).is_absolute() and (path.parent / model).is_dir():
        settings["model"] = str((path.parent / model).resolve())
    return settings


def child_environment(
    overrides: Mapping[str, str], removed: tuple[str, ...], defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The environment of a child process: ours, less `removed`, with `overrides`, and `defaults` for what is not there."""
    kept = {key: value for key, value in os.environ.items() if key not in removed}
    return dict(defaults or {}) | kept | dict(overrides)


def shared_environment() -> dict[str, str]:
    """What a process of this engine should have of our environment wherever it runs. No secrets."""
    names = [name for name in os.environ if name.startswith(_SHARED_PREFIXES) or name in _SHARED_NAMES]
    return {name: os.environ[name] for name in names if not any(word in name.upper() for word in _SECRETS)}


def thread_environment() -> dict[str, str]:
    """The variables by which vLLM says now how many threads a worker has, and on which cores."""
    return {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}


def limit_threads(count: int) -> None:
    """Let OpenMP use so many threads in this process; to be called before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = str(count)


def target_core_settings() -> str | None:
    """The cores that OpenMP gives the target, in whichever variables vLLM wrote them; None if this process is not bound.

    With several target workers the user's own list, where there is one, names the cores of all of them.
    """
    bound = [os.environ[name] for name in ("OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY") if os.environ.get(name)]
    if not bound:
        return None
    return " ".join([*bound, os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")])


def cache_directory() -> Path:
    """Where this package may keep what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-specbranch"


_PARSERS: dict[str, Callable[[object, str], object]] = {
    "model": values.text,
    "num_speculative_tokens": values.integer(1, 64),
    "policy": values.choice("pearl", "specbranch", "fanout", "best_first"),
    "max_branches": values.integer(1, 64),
    "branch_rule": values.choice("adaptive", "fixed"),
    "stop_rule": values.choice("confidence", "adaedl", "none"),
    "stop_threshold": values.number(0.0, 1.0),
    "on_miss": values.on_miss,
    "draft_sample_method": values.choice("probabilistic", "greedy"),
    "draft_top_m": values.integer(1, 1024),
    "length_head": values.text,
    "head_layers": values.integer(1, 64),
    "deterministic": values.flag,
    "draft_placement": values.placement,
    "draft_keys": values.text,
    "draft_ray_num_cpus": values.number(0.0, 4096.0),
    "draft_ray_num_gpus": values.number(0.0, 1.0),
    "draft_ray_resources": values.resources,
    "draft_device": values.integer(0, None),
    "draft_cpu_cores": values.cores,
    "draft_kv_cache_bytes": values.integer(1, None),
    "draft_gpu_memory_utilization": values.number(0.01, 1.0),
    "reply_timeout_ms": values.number(1.0, 10_000.0),
    "quantization": values.text,
    "revision": values.text,
    "max_model_len": values.integer(1, None),
    "draft_tensor_parallel_size": values.integer(1, 1),
    "enforce_eager": values.flag,
    "reclaim_blocks": values.flag,
}

assert set(_PARSERS) == {field.name for field in fields(SpecBranchConfig)}
