"""What the two sides of a measurement say to each other: JSON lines, one message each.

Owns the types: what engine to run, what to do with it, what came out and when. `measure` asks, `measure_child` answers;
reports read the results. Runs in both processes; imports neither torch nor vLLM.
"""

from typing import Any

import msgspec


class Emulation(msgspec.Struct, frozen=True):
    """Durations that forwards are stretched to, by sleeping, so that two cores behave like two accelerators.

    A forward that takes longer than that by itself is not shortened.

    Attributes:
        target_forward_ms: a forward of the target with one token.
        draft_step_ms: a forward of the draft model with one token.
        target_token_cost, draft_token_cost: what each further token of the batch costs, relative to one token alone.
    """

    target_forward_ms: float
    draft_step_ms: float
    target_token_cost: float = 0.0
    draft_token_cost: float = 0.02


class Forward(msgspec.Struct, frozen=True, array_like=True):
    """One forward of a model. Times are seconds since the run began.

    Attributes:
        num_tokens: query tokens of the whole batch.
    """

    start_s: float
    end_s: float
    num_tokens: int


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
        observe: note every forward of both models (`RunResult.target_forwards`, `draft_forwards`), and allow `Run.emulation`.
        without: parts of the draft server to do without (`draft_ablations.PARTS`); only for an engine that is observed.
        arguments: further arguments of `LLM`; they win over those made of this spec.
        plugins: whether vLLM loads its plugins, of which this project is one.
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
    observe: bool = False
    without: tuple[str, ...] = ()
    arguments: dict[str, Any] = {}
    plugins: bool = True


class Encode(msgspec.Struct, tag=True, frozen=True):
    """Command: turn texts into token ids with the target's tokenizer."""

    texts: list[str]


class Record(msgspec.Struct, frozen=True):
    """Ask for the rounds of a run, for a length head to be trained on; for an engine with `recording_worker.RecordingExtension`.

    Attributes:
        path: of the shard to write.
        first_prompt: index of the run's first prompt.
    """

    path: str
    first_prompt: int


class Run(msgspec.Struct, tag=True, frozen=True):
    """Command: generate `max_tokens` for each prompt, at most `batch_size` prompts at a time.

    Attributes:
        first_seed: seed of the first request, one more for each following; None for requests without seeds.
        emulation: stretch the forwards of this run; only for an engine that is observed.
        record: what to write of its rounds; None for nothing.
    """

    prompts: list[list[int]]
    max_tokens: int
    batch_size: int
    temperature: float
    first_seed: int | None = None
    emulation: Emulation | None = None
    record: Record | None = None


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
        engine_counters, server_counters: what specbranch counted during this run, its scheduler's among the engine's; empty for
            other methods.
        server_timings_us: running means of the draft server after this run; empty for other methods.
        target_forwards, draft_forwards: of an engine that is observed, by their start; the draft's are those of the draft
            server, or of vLLM's `draft_model`.
        num_overruns: of these, how many lasted longer than 1.1 times their emulated duration; 0 without emulation.
        accepted_by_position, drafted_by_position: draft tokens accepted, and verified, at each place of the chunk.
        num_drafts, num_draft_tokens, num_accepted_tokens: vLLM's own counters of speculative decoding during this run.
        num_preemptions: vLLM's own count of requests that lost their KV blocks during this run.
    """

    wall_s: float
    num_steps: int
    requests: list[RequestTrace]
    engine_counters: dict[str, float] = {}
    server_counters: dict[str, float] = {}
    server_timings_us: dict[str, float] = {}
    target_forwards: list[Forward] = []
    draft_forwards: list[Forward] = []
    num_overruns: int = 0
    accepted_by_position: list[int] = []
    drafted_by_position: list[int] = []
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Generated tokens of all requests."""
        return sum(len(one.token_ids) for one in self.requests)


class Failed(msgspec.Struct, tag=True, frozen=True):
    """Answer instead of any other: the engine cannot go on, and why."""

    reason: str


Command = Encode | Run | Stop
Answer = Stage | Ready | Encoded | RunResult | Failed
