"""Run a vLLM engine in a child process on given cores, and measure it: the side that answers.

Owns the one engine of this process: loads it, drives it step by step so that every output has a time, reads the
counters. The types and the parent's side are in `measure`. Run as `python -m vllm_specbranch.measure_child FD`; not
for people.
"""

import contextlib
import gc
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import msgspec

from vllm_specbranch.measure_messages import (
    Answer,
    Command,
    Encode,
    Encoded,
    EngineSpec,
    Failed,
    Ready,
    RequestTrace,
    Run,
    RunResult,
    Stage,
    Stop,
)
from vllm_specbranch.observed_engine import Observation, ObservedEngine

_VLLM_COUNTERS = {
    "vllm:spec_decode_num_drafts": "num_drafts",
    "vllm:spec_decode_num_draft_tokens": "num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "num_accepted_tokens",
    "vllm:num_preemptions": "num_preemptions",
}
_ACCEPTED_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
# A maximum since the start, not a count.
_NOT_COUNTED = ("longest_wait_s",)


class Reading(NamedTuple):
    """Counters at one moment: specbranch's own, vLLM's, and both by position in the chunk."""

    engine: dict[str, float]
    server: dict[str, float]
    server_timings_us: dict[str, float]
    vllm: dict[str, int]
    accepted: dict[int, int]
    drafted: dict[int, int]


class Counters:
    """The counters of one engine, read before and after a run."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def read(self) -> Reading:
        """Return what they are now."""
        status: dict[str, Any] = {}
        # Other methods have vLLM's own workers, which do not know this call.
        if hasattr(self._worker(), "specbranch_status"):
            (status,) = self._llm.collective_rpc("specbranch_status")
        engine = {name: value for name, value in status.get("engine", {}).items() if name not in _NOT_COUNTED}
        engine |= {name: value for name, value in status.get("scheduler", {}).items() if not isinstance(value, str)}
        own, accepted = self._vllm_counters()
        return Reading(
            engine=engine,
            server=status.get("server", {}),
            server_timings_us=status.get("server_timings_us", {}),
            vllm=own,
            accepted=status.get("accepted_by_position", dict(enumerate(accepted))),
            # vLLM exports no such count. `draft_model` drafts at all positions each time; for `ngram` this is an upper bound.
            drafted=status.get("drafted_by_position", dict.fromkeys(range(len(accepted)), own["num_drafts"])),
        )

    def _worker(self) -> Any:
        return self._llm.llm_engine.model_executor.driver_worker.worker

    def _vllm_counters(self) -> tuple[dict[str, int], list[int]]:
        """Return (the counters by name, accepted draft tokens by position)."""
        totals, accepted = dict.fromkeys(_VLLM_COUNTERS.values(), 0), []
        for metric in self._llm.get_metrics():
            if metric.name in _VLLM_COUNTERS:
                totals[_VLLM_COUNTERS[metric.name]] += metric.value
            elif metric.name == _ACCEPTED_BY_POSITION:
                accepted = list(metric.values)
        return totals, accepted


def _difference(after: dict[Any, Any], before: dict[Any, Any]) -> dict[Any, Any]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


def _by_position(counts: dict[int, int]) -> list[int]:
    return [counts.get(position, 0) for position in range(max(counts, default=-1) + 1)]


def run(llm: Any, command: Run, observed: ObservedEngine | None = None) -> RunResult:
    """Generate for every prompt, with at most `batch_size` requests in the engine, and note when what comes out."""
    assert observed is not None or command.emulation is None, "emulation needs an observed engine"
    counters = Counters(llm)
    # A collection in the middle of a run would be counted to whoever is running.
    gc.collect()
    before = counters.read()
    if observed is not None:
        observed.start(command.emulation)
    started_s = time.perf_counter()
    if command.record is not None:
        gamma = llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens
        llm.collective_rpc("start_recording", args=(gamma,))
    traces, wall_s, num_steps = _drive(llm.llm_engine, command, started_s)
    if command.record is not None:
        where = (command.record.path, command.record.first_prompt, command.temperature)
        llm.collective_rpc("save_recording", args=where)
    after = counters.read()
    forwards = Observation()
    if observed is not None:
        forwards = observed.stop(started_s, started_s + wall_s, command.emulation)
    return RunResult(
        wall_s=wall_s,
        num_steps=num_steps,
        requests=traces,
        engine_counters=_difference(after.engine, before.engine),
        server_counters=_difference(after.server, before.server),
        server_timings_us=after.server_timings_us,
        target_forwards=forwards.target,
        draft_forwards=forwards.draft,
        num_overruns=forwards.num_overruns,
        accepted_by_position=_by_position(_difference(after.accepted, before.accepted)),
        drafted_by_position=_by_position(_difference(after.drafted, before.drafted)),
        **_difference(after.vllm, before.vllm),
    )


def _drive(engine: Any, command: Run, started_s: float) -> tuple[list[RequestTrace], float, int]:
    """Return (traces in the order of the prompts, wall seconds, engine steps). Times are since `started_s`."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    def parameters(index: int) -> SamplingParams:
        return SamplingParams(
            temperature=command.temperature,
            seed=None if command.first_seed is None else command.first_seed + index,
            max_tokens=command.max_tokens,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )

    traces = [RequestTrace(0.0, [], [], [], "") for _ in command.prompts]
    waiting = list(reversed(range(len(command.prompts))))
    texts: dict[int, list[str]] = {index: [] for index in waiting}
    num_running = num_steps = 0
    now_s = 0.0
    while waiting or num_running:
        while waiting and num_running < command.batch_size:
            index = waiting.pop()
            traces[index] = RequestTrace(time.perf_counter() - started_s, [], [], [], "")
            engine.add_request(str(index), {"prompt_token_ids": command.prompts[index]}, parameters(index))
            num_running += 1
        outputs = engine.step()
        now_s = time.perf_counter() - started_s
        num_steps += 1
        for output in outputs:
            index = int(output.request_id)
            (completion,) = output.outputs
            if completion.token_ids:
                traces[index].output_times_s.append(now_s)
                traces[index].output_sizes.append(len(completion.token_ids))
                traces[index].token_ids.extend(completion.token_ids)
            texts[index].append(completion.text)
            num_running -= output.finished
    named = [msgspec.structs.replace(trace, text="".join(texts[index])) for index, trace in enumerate(traces)]
    return named, now_s, num_steps


def load(spec: EngineSpec) -> Any:
    """Start the engine. vLLM is already imported, and this process already on its cores."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "dtype": spec.dtype,
        "max_model_len": spec.max_model_len,
        "max_num_seqs": spec.max_num_seqs,
        "kv_cache_memory_bytes": spec.kv_cache_bytes,
        # Repetitions of one prompt must cost the same each time.
        "enable_prefix_caching": False,
        "enforce_eager": spec.enforce_eager,
        "speculative_config": spec.speculative,
        "seed": spec.seed,
        # vLLM counts accepted draft tokens only with its statistics on; they are on for every engine alike.
        "disable_log_stats": False,
    }
    if spec.gpu_memory_utilization is not None:
        arguments["gpu_memory_utilization"] = spec.gpu_memory_utilization
    return LLM(spec.model, **arguments | spec.arguments)


def pin(cores: tuple[int, ...]) -> None:
    """Move every thread of this process to `cores`; new threads inherit that. Nothing to do for no cores."""
    for thread in os.listdir("/proc/self/task") if cores else ():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def _facts(llm: Any, load_s: float) -> dict[str, Any]:
    import torch

    config = llm.llm_engine.vllm_config
    return {
        "load_s": load_s,
        "torch_threads": torch.get_num_threads(),
        "cores": sorted(os.sched_getaffinity(0)),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "compilation_mode": str(config.compilation_config.mode),
        "device": str(config.device_config.device_type),
        "dtype": str(config.model_config.dtype),
        "block_size": config.cache_config.block_size,
        "context": config.model_config.max_model_len,
    }


class Child:
    """The loop of the child process.

    Args:
        answers: where answers go.
        commands: where lines come from; its end ends this process, whatever it is doing.
    """

    def __init__(self, answers: BinaryIO, commands: BinaryIO) -> None:
        self._answers = answers
        self._commands = commands
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._observed: ObservedEngine | None = None

    def serve(self) -> None:
        """Load the engine, then answer commands until told to stop."""
        spec = msgspec.json.decode(self._commands.readline(), type=EngineSpec)
        threading.Thread(target=self._read, name="commands", daemon=True).start()
        with self._failures_told():
            llm = self._start(spec)
            while self._obey(llm, msgspec.json.decode(self._inbox.get(), type=Command)):
                pass
            llm.llm_engine.engine_core.shutdown()
            if self._observed is not None:
                self._observed.close()

    def _start(self, spec: EngineSpec) -> Any:
        started_s = time.perf_counter()
        self._answer(Stage("importing vLLM"))
        # On all cores, because engines start side by side; memory is first touched after the move to the cores.
        import vllm  # noqa: F401

        pin(spec.cores)
        self._answer(Stage("loading and compiling"))
        self._observed = ObservedEngine(spec.without) if spec.observe else None
        llm = load(spec)
        if self._observed is not None:
            self._observed.attach(llm)
        self._answer(Ready(_facts(llm, time.perf_counter() - started_s)))
        return llm

    def _obey(self, llm: Any, command: Command) -> bool:
        match command:
            case Encode(texts):
                tokenizer = llm.get_tokenizer()
                self._answer(Encoded([list(tokenizer.encode(text)) for text in texts]))
            case Run():
                self._answer(run(llm, command, self._observed))
            case Stop():
                return False
        return True

    def _answer(self, answer: Answer) -> None:
        self._answers.write(msgspec.json.encode(answer) + b"\n")
        self._answers.flush()

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Tell the parent why before the error ends this process; the traceback goes to the log."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._answer(Failed(" ".join(str(error).split()) or type(error).__name__))
            raise

    def _read(self) -> None:
        while line := self._commands.readline():
            self._inbox.put(line)
        # The parent is gone. The draft server sees its own lifeline close when this process ends.
        os._exit(0)


def main() -> None:
    """Serve one parent."""
    # Ctrl-C goes to the whole process group: the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(int(sys.argv[1]), "wb") as answers:
        Child(answers, sys.stdin.buffer).serve()
    # All is shut down; what is left is the slow teardown of torch and of vLLM's modules.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
