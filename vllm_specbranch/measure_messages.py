"""What the two sides of a measurement say to each other: JSON lines, one message each.

Owns the types: what engine to run, what to do with it, what came out and when. `measure` asks, `measure_child` answers;
reports read the results. Runs in both processes; imports neither torch nor vLLM.
"""

from typing import Any

import msgspec


class EngineSpec(msgspec.Struct, frozen=True):
    """One engine to measure.

    Attributes:
        name: for messages and tables.
        model: folder of the target model.
        cores: CPU cores of the target, one OpenMP thread on each; empty leaves the process unpinned (GPUs).
        speculative: vLLM's `speculative_config`; None for plain decoding.
        kv_cache_bytes: size of the target's KV cache.
        visible_devices: `CUDA_VISIBLE_DEVICES` of the engine; None leaves it as it is.
        gpu_memory_utilization: vLLM's, for GPUs; None leaves vLLM's default.
    """

    name: str
    model: str
    cores: tuple[int, ...] = ()
    speculative: dict[str, Any] | None = None
    dtype: str = "float32"
    max_model_len: int = 1024
    max_num_seqs: int = 16
    kv_cache_bytes: int = 512 << 20
    enforce_eager: bool = False
    seed: int = 0
    visible_devices: str | None = None
    gpu_memory_utilization: float | None = None


class Encode(msgspec.Struct, tag=True, frozen=True):
    """Command: turn texts into token ids with the target's tokenizer."""

    texts: list[str]


class Run(msgspec.Struct, tag=True, frozen=True):
    """Command: generate `max_tokens` for each prompt, at most `batch_size` prompts at a time.

    Attributes:
        first_seed: seed of the first request, one more for each following; None for requests without seeds.
    """

    prompts: list[list[int]]
    max_tokens: int
    batch_size: int
    temperature: float
    first_seed: int | None = None


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Command: shut the engine down and end."""


class Stage(msgspec.Struct, tag=True, frozen=True):
    """Answer while the engine starts: what it is doing now."""

    text: str


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Answer: the engine has started.

    Attributes:
        facts: what vLLM made of the settings, for the record (threads, asynchronous scheduling, ...).
    """

    facts: dict[str, Any]


class Encoded(msgspec.Struct, tag=True, frozen=True):
    """Answer to `Encode`."""

    token_ids: list[list[int]]


class RequestTrace(msgspec.Struct, frozen=True):
    """What came out for one prompt, and when. Times are seconds since the run began.

    Attributes:
        start_s: when the request was given to the engine.
        output_times_s: when each output arrived; one output is what one engine step made for this request.
        output_sizes: tokens in each output.
    """

    start_s: float
    output_times_s: list[float]
    output_sizes: list[int]
    token_ids: list[int]
    text: str


class RunResult(msgspec.Struct, tag=True, frozen=True):
    """Answer to `Run`.

    Attributes:
        wall_s: from the first request given to the last output.
        num_steps: engine steps.
        requests: in the order of the prompts.
        engine_counters, server_counters: what specbranch counted during this run; empty for other methods.
        server_timings_us: running means of the draft server after this run; empty for other methods.
        num_drafts, num_draft_tokens, num_accepted_tokens: vLLM's own counters of speculative decoding during this run.
    """

    wall_s: float
    num_steps: int
    requests: list[RequestTrace]
    engine_counters: dict[str, float] = {}
    server_counters: dict[str, float] = {}
    server_timings_us: dict[str, float] = {}
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all requests."""
        return sum(len(one.token_ids) for one in self.requests)


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Answer instead of any other: the engine cannot go on, and why."""

    reason: str


Command = Encode | Run | Stop
Answer = Stage | Ready | Encoded | RunResult | Failed
