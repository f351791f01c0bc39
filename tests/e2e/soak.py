"""A random day of one engine in its own process, twice: requests come, are aborted, end; everything is counted.

Run by the `run_engine` fixture as `python -m tests.e2e.soak OUT`. The engine runs in this process, so that steps, arrivals and
aborts follow the seed of the job and nothing else. For plain vLLM the same job generates the greedy requests only, undisturbed.
"""

import ctypes
import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.generate import settled_status

GREEDY_SHARE = 0.5
ABORT_SHARE = 0.15
# A step in which nothing is running is possible only for so long.
MOST_IDLE_STEPS = 1000


def make_requests(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The requests of a day: `prompt`, `params`, `arrival` (engine step), `abort` (steps after it, or None), `priority`."""
    rng = random.Random(job["seed"])
    texts, context = job["prompts"], job["context"]
    requests = []
    arrival = 0
    for _ in range(job["num_requests"]):
        arrival += rng.choice([0, 0, 0, 0, 1, 2])
        tokens = [token for _ in range(3) for token in rng.choice(texts)]
        length = rng.choice([1, 2, 17, 31, 32, 33, 64, rng.randrange(1, 150), context - 1, context - 20])
        prompt = (tokens * (context // len(tokens) + 1))[:length]
        params: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 5, 17, 40, 80]), "ignore_eos": rng.random() < 0.7}
        if rng.random() < GREEDY_SHARE:
            params["temperature"] = 0.0
        else:
            params |= sampled_params(rng)
        abort = rng.choice([0, 1, 2, 7, 20]) if rng.random() < ABORT_SHARE else None
        requests.append(
            {"prompt": prompt, "params": params, "arrival": arrival, "abort": abort, "priority": rng.randrange(3)}
        )
    return requests


def sampled_params(rng: random.Random) -> dict[str, Any]:
    """Random parameters of a sampled request."""
    params: dict[str, Any] = {"temperature": rng.choice([0.3, 0.7, 1.0, 1.5])}
    choices = {
        "top_p": lambda: rng.choice([0.5, 0.9]),
        "top_k": lambda: rng.choice([1, 5, 100]),
        "seed": lambda: rng.randrange(1000),
        "presence_penalty": lambda: 0.7,
        "frequency_penalty": lambda: 0.3,
        "repetition_penalty": lambda: 1.2,
        "logprobs": lambda: rng.choice([0, 2]),
        "min_tokens": lambda: 1,
        "n": lambda: rng.choice([2, 3]),
        "allowed_token_ids": lambda: list(range(20, 900)),
        "stop_token_ids": lambda: [297, 331, 11],
    }
    for name, make in choices.items():
        if rng.random() < 0.2:
            params[name] = make()
    return params


def plain_day(llm: Any, requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers of the greedy requests that nobody aborts, by number."""
    from vllm import SamplingParams

    wanted = [number for number, one in enumerate(requests) if one["params"]["temperature"] == 0.0]
    outputs = llm.generate(
        [{"prompt_token_ids": requests[number]["prompt"]} for number in wanted],
        [SamplingParams(**requests[number]["params"]) for number in wanted],
        priority=[0] * len(wanted),
        use_tqdm=False,
    )
    return {"answers": {number: list(one.outputs[0].token_ids) for number, one in zip(wanted, outputs, strict=True)}}


class Day:
    """Drives the engine step by step through the requests of a day."""

    def __init__(self, llm: Any, requests: list[dict[str, Any]]) -> None:
        self._llm = llm
        self._engine = llm.llm_engine
        self._requests = requests
        self._finished: dict[str, Any] = {}
        self._aborts: dict[int, list[str]] = {}
        self._num_aborted = 0
        self.memory: list[dict[str, int]] = []

    def run(self) -> dict[str, Any]:
        """Until every request has ended."""
        waiting = list(enumerate(self._requests))
        step = idle = 0
        while waiting or self._engine.has_unfinished_requests():
            while waiting and waiting[0][1]["arrival"] <= step:
                self._arrive(step, *waiting.pop(0))
            gone = self._aborts.pop(step, [])
            if gone:
                self._engine.abort_request(gone)
                self._num_aborted += len(gone)
            outputs = self._engine.step()
            idle = 0 if outputs else idle + 1
            assert idle < MOST_IDLE_STEPS, f"nothing comes out of {self._engine.get_num_unfinished_requests()} requests"
            self._finished |= {one.request_id: one for one in outputs if one.finished}
            step += 1
            if step % 50 == 0:
                self._measure()
        return {
            "answers": {
                int(name): [list(part.token_ids) for part in one.outputs] for name, one in self._finished.items()
            },
            "reasons": {
                int(name): [part.finish_reason for part in one.outputs] for name, one in self._finished.items()
            },
            "num_logprobs": {
                int(name): [None if part.logprobs is None else len(part.logprobs) for part in one.outputs]
                for name, one in self._finished.items()
            },
            "num_aborted": self._num_aborted,
            "num_steps": step,
            "memory": self.memory,
        }

    def _arrive(self, step: int, number: int, request: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = {"prompt_token_ids": request["prompt"]}
        params = SamplingParams(**request["params"], output_kind=RequestOutputKind.FINAL_ONLY)
        self._engine.add_request(str(number), prompt, params, priority=request["priority"])
        if request["abort"] is not None:
            self._aborts.setdefault(step + request["abort"], []).append(str(number))

    def _measure(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        self.memory.append({str(one.pid): one.memory_info().rss for one in processes})


def num_free_blocks(llm: Any) -> tuple[int, int]:
    """(free KV blocks of the target, all but the null block)."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks(), pool.num_gpu_blocks - 1


def main() -> None:
    spec = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**spec["engine"], disable_log_stats=False)
    (job,) = spec["jobs"]
    requests = make_requests(job)
    if not spec["engine"].get("speculative_config"):
        result = plain_day(llm, requests)
    else:
        # The same day twice: by the second one every shape has been seen and every cache is warm.
        first = Day(llm, requests).run()
        result = Day(llm, requests).run()
        result["first_day"] = first
        result["status"] = settled_status(llm)
        result["blocks"] = num_free_blocks(llm)
        result["metrics"] = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    Path(sys.argv[1]).write_text(json.dumps(result))
    del llm


if __name__ == "__main__":
    main()
