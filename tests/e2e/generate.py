"""One real engine in its own process: reads a job list as JSON from standard input, writes the answers as JSON to a file.

Run by the `run_engine` fixture as `python -m tests.e2e.generate OUT`. A job generates some prompts in batches of a size, greedily
or with the sampling parameters it gives; it may kill or stop the draft server while tokens are being made. In its own process, so
that the in-process engine and the multi-process one are tested alike, and nothing is shared between engines.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from tests.e2e.head_probe import change_head, watch_features, watched_features


def main() -> None:
    spec = json.load(sys.stdin)
    llm = make_engine(spec)
    result = run_jobs(llm, spec)
    result["children"] = [child.pid for child in psutil.Process().children(recursive=True)]
    Path(sys.argv[1]).write_text(json.dumps(result))
    if spec.get("kill_engine"):
        kill_engine(result["children"], stop_driver=spec.get("stop_driver", False))
    del llm


def make_engine(spec: dict[str, Any]) -> Any:
    from vllm import LLM

    return LLM(**spec["engine"], disable_log_stats=False)


def run_jobs(llm: Any, spec: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"jobs": [run_job(llm, job) for job in spec["jobs"]]}
    result["status"] = settled_status(llm) if spec["engine"].get("speculative_config") else {}
    result["metrics"] = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return result


def settled_status(llm: Any) -> dict[str, Any]:
    """The worker's report once vLLM has told the workers that the last request is finished.

    It does so in the step after, which a multi-process engine makes by itself and an in-process one when it is asked to.
    """
    until = time.monotonic() + 5.0
    while True:
        status: dict[str, Any] = llm.collective_rpc("specbranch_status")[0]
        if not status["num_requests"] or time.monotonic() > until:
            return status
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            llm.llm_engine.step()
        time.sleep(0.1)


def run_job(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    common = {"max_tokens": job["max_tokens"], "ignore_eos": True}
    sampling = job.get("sampling") or [{"temperature": 0.0}] * len(job["prompts"])
    params = [SamplingParams(**common | one) for one in sampling]
    prompts = [{"prompt_token_ids": tokens} for tokens in job["prompts"]]
    answers: list[list[int]] = []
    if job.get("once_up"):
        wait_until_up(llm)
    if job.get("with_ranks"):
        llm.collective_rpc(record_verification)
    if job.get("slow_down_s"):
        llm.collective_rpc(slow_down, args=(job["slow_down_s"],))
    if job.get("head"):
        llm.collective_rpc(change_head, args=(job["head"],))
    if job.get("with_features"):
        llm.collective_rpc(watch_features)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if job.get("busy") else None
    disturbance = Disturbance(llm, job["disturb"]) if "disturb" in job else None
    started_s = time.perf_counter()
    for start in range(0, len(prompts), job["batch_size"]):
        end = start + job["batch_size"]
        outputs = llm.generate(prompts[start:end], params[start:end], use_tqdm=False)
        answers += [list(output.outputs[0].token_ids) for output in outputs]
        if disturbance is not None and start == 0:
            disturbance.start()
    seconds = time.perf_counter() - started_s
    if busy is not None:
        busy.kill()
        busy.wait()
    result = {"answers": answers, "seconds": seconds}
    if disturbance is not None:
        result["events"] = disturbance.finish()
        time.sleep(job["disturb"].get("then_wait_s", 0.0))
    meet(job)
    if job.get("with_ranks"):
        result["verified_by_rank"] = llm.collective_rpc(verified_by_rank)
    if job.get("with_features"):
        result["features"] = llm.collective_rpc(watched_features)
    if job.get("with_status"):
        result["status"] = llm.collective_rpc("specbranch_status")[0]
    return result


def wait_until_up(llm: Any, timeout_s: float = 120.0) -> None:
    """Wait for the draft server. The line to it is looked after in the engine's steps, so there have to be some."""
    from vllm import SamplingParams

    until = time.monotonic() + timeout_s
    while not llm.collective_rpc("specbranch_status")[0]["is_up"]:
        assert time.monotonic() < until, "the draft server is not back"
        llm.generate([{"prompt_token_ids": [1, 2, 3]}], SamplingParams(max_tokens=1), use_tqdm=False)
        time.sleep(0.2)


def meet(job: dict[str, Any], timeout_s: float = 240.0) -> None:
    """Say that a job is done by making a file, and wait for what another process says so; for engines that run at once."""
    if "then_touch" in job:
        Path(job["then_touch"]).touch()
    until = time.monotonic() + timeout_s
    while "then_wait_for" in job and not Path(job["then_wait_for"]).exists():
        assert time.monotonic() < until, f"{job['then_wait_for']} never came"
        time.sleep(0.1)


def record_verification(worker: Any) -> None:
    """Keep what each step's verification samples; runs in a target worker."""
    sampler = worker.model_runner.rejection_sampler
    forward, worker.verified = sampler.forward, []

    def recording(metadata: Any, draft_probs: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(metadata, draft_probs, *args, **kwargs)
        worker.verified.append((output.sampled_token_ids.tolist(), draft_probs is not None))
        return output

    sampler.forward = recording


def slow_down(worker: Any, seconds: float) -> None:
    """Make every step of the target so much longer, as a larger model would be, for good; runs in a target worker.

    Whether a draft comes in time, and whether it is worth waiting for, does not hang on the machine's other work then.
    """
    runner = worker.model_runner
    execute = runner.execute_model

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return execute(*args, **kwargs)

    runner.execute_model = slow


def verified_by_rank(worker: Any) -> list[tuple[list[list[int]], bool]]:
    """Per step (sampled tokens per request, -1 for none; whether there were draft probabilities); runs in a target worker."""
    verified: list[tuple[list[list[int]], bool]] = worker.verified
    return verified


class Disturbance(threading.Thread):
    """Does something to the draft server after a delay, while the engine generates."""

    def __init__(self, llm: Any, plan: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._plan = plan
        self._pid = plan.get("pid") or llm.collective_rpc("specbranch_status")[0]["server_pid"]
        self._events: list[str] = []

    def run(self) -> None:
        time.sleep(self._plan["after_s"])
        for name, pause_s in self._plan["signals"]:
            os.kill(self._pid, getattr(signal, name))
            self._events.append(name)
            time.sleep(pause_s)

    def finish(self) -> list[str]:
        self.join(60.0)
        return self._events


def kill_engine(children: list[int], *, stop_driver: bool) -> None:
    """Die as hard as possible, and take the engine core along; the draft side has to find out by itself.

    Args:
        stop_driver: stop what has Ray place the draft server first, so that it cannot.
    """
    if stop_driver:
        (driver,) = (one for one in psutil.Process().children(recursive=True) if is_ray_driver(one))
        driver.suspend()
    for pid in children:
        if psutil.pid_exists(pid) and not is_of_the_draft_side(psutil.Process(pid)):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def is_ray_driver(process: psutil.Process) -> bool:
    try:
        return "vllm_specbranch.ray_driver" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


def is_of_the_draft_side(process: psutil.Process) -> bool:
    """Whether it is a draft server, or descends from what has Ray place one."""
    try:
        line = [process, *process.parents()]
        return any(name in " ".join(one.cmdline()) for one in line for name in ("draft_main", "ray_driver"))
    except psutil.NoSuchProcess:
        return True


if __name__ == "__main__":
    main()
