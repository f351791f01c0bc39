"""One real engine in its own process, like `generate`, but every request with sampling parameters of its own.

Run by the `run_engine` fixture as `python -m tests.e2e.sampling OUT`. All requests of a job go to the engine at once, so its
batches are mixed. Answers come with all that vLLM returns: text, reasons, log probabilities, how many draft tokens were verified.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.e2e.generate import settled_status


def main() -> None:
    spec = json.load(sys.stdin)
    from vllm import LLM

    llm = LLM(**spec["engine"])
    is_ours = "speculative_config" in spec["engine"]
    result: dict[str, Any] = {"jobs": [run_job(llm, job, is_ours) for job in spec["jobs"]]}
    result["status"] = settled_status(llm) if is_ours else {}
    Path(sys.argv[1]).write_text(json.dumps(result))
    del llm


def run_job(llm: Any, job: dict[str, Any], is_ours: bool) -> dict[str, Any]:
    if "refused" in job:
        return {"refusals": [refusal_by_engine(llm, job["prompt"], one) for one in job["refused"]]}
    if "refused_by" in job:
        return refusals_by_config(llm, job)
    before = counters(llm) if is_ours else {}
    requests: dict[str, dict[str, Any]] = job["requests"]
    outputs = llm.generate(
        [{"prompt_token_ids": one["prompt"]} for one in requests.values()],
        [sampling_params(one["params"]) for one in requests.values()],
        lora_request=[lora_request(one.get("lora")) for one in requests.values()],
        use_tqdm=False,
    )
    after = counters(llm) if is_ours else {}
    return {
        "answers": {name: answer(output) for name, output in zip(requests, outputs, strict=True)},
        "counters": {name: after[name] - before[name] for name in before},
    }


def counters(llm: Any) -> dict[str, float]:
    """What the proposer has counted so far."""
    engine: dict[str, float] = llm.collective_rpc("specbranch_status")[0]["engine"]
    return engine


def sampling_params(given: dict[str, Any]) -> Any:
    """vLLM's sampling parameters from plain values; keys of `logit_bias` may be strings, as JSON has no others."""
    from vllm.sampling_params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams

    given = dict(given)
    for name, kind in (
        ("structured_outputs", StructuredOutputsParams),
        ("repetition_detection", RepetitionDetectionParams),
    ):
        if name in given:
            given[name] = kind(**given[name])
    if "logit_bias" in given:
        given["logit_bias"] = {int(token): bias for token, bias in given["logit_bias"].items()}
    return SamplingParams(**given)


def lora_request(path: str | None) -> Any:
    from vllm.lora.request import LoRARequest

    return None if path is None else LoRARequest("random", 1, path)


def answer(output: Any) -> dict[str, Any]:
    return {
        "prompt_logprobs": positions(output.prompt_logprobs),
        "outputs": [
            {
                "token_ids": list(one.token_ids),
                "text": one.text,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
                "logprobs": positions(one.logprobs),
                "cumulative_logprob": one.cumulative_logprob,
                "num_draft_tokens": one.spec_decode_metrics.num_draft_tokens if one.spec_decode_metrics else 0,
            }
            for one in output.outputs
        ],
    }


def positions(logprobs: Any) -> list[dict[str, list[Any]] | None] | None:
    """Per position the candidates as id -> [log probability, rank, text]; None for the first token of a prompt."""
    if logprobs is None:
        return None
    return [
        None
        if one is None
        else {str(token): [each.logprob, each.rank, each.decoded_token] for token, each in one.items()}
        for one in logprobs
    ]


def refusal_by_engine(llm: Any, prompt: list[int], params: dict[str, Any]) -> list[str] | None:
    """How the running engine refuses a request that comes together with a good one; None if it does not."""
    prompts = [{"prompt_token_ids": prompt}, {"prompt_token_ids": prompt}]
    try:
        llm.generate(prompts, [sampling_params({"max_tokens": 4}), sampling_params(params)], use_tqdm=False)
    except Exception as error:
        return described(error)
    return None


def refusals_by_config(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """How vLLM's front end and its model runner refuse things under a config, without an engine of their own.

    `refused_by` are engine arguments beside the engine's own model; None stands for the config of the engine that runs here.
    """
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.sample.logits_processor import build_logitsprocs

    config = llm.llm_engine.vllm_config
    if job["refused_by"] is not None:
        config = EngineArgs(model=config.model_config.model, **job["refused_by"]).create_engine_config()
    processor = InputProcessor(config)
    refusals: list[list[str] | None] = []
    for params in job["params"]:
        try:
            processor._validate_params(sampling_params(params), ("generate",))
            refusals.append(None)
        except Exception as error:
            refusals.append(described(error))
    try:
        build_logitsprocs(config, torch.device("cpu"), False, False, ["some.module:SomeLogitsProcessor"])
        custom = None
    except Exception as error:
        custom = described(error)
    return {"refusals": refusals, "custom_logits_processors": custom}


def described(error: Exception) -> list[str]:
    return [f"{type(error).__module__}.{type(error).__qualname__}", str(error)]


if __name__ == "__main__":
    main()
