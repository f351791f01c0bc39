"""Preemptions without a model: vLLM's real scheduler and KV-cache manager, with outcomes drawn at a rate of acceptance.

Exact for its seed and independent of the machine, so that ways of dealing with a shortage can be told apart, which the few
preemptions of a real engine cannot. Owns the ways that are compared. Imports vLLM when used. Runs in the process of a benchmark.
"""

import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Draft tokens take blocks as any tokens do, and vLLM preempts for them; blocks that only rejected ones had needed are taken back
# when a next token finds none, and chunks stay whole; chunks are cut when blocks are short; and both.
WAYS = ("vllm", "reclaim", "cut", "both")


@dataclass(frozen=True, slots=True)
class Load:
    """What is served.

    Attributes:
        prompt_lengths: tokens of each request's prompt.
        num_new_tokens: of each request.
        num_draft_tokens: of each chunk: it is always full.
        acceptance: chance that a draft token is accepted if those before it are.
        pool_share: blocks of the pool, relative to what all running requests would need at their end.
    """

    prompt_lengths: tuple[int, ...]
    num_new_tokens: int
    num_draft_tokens: int
    block_size: int
    max_num_seqs: int
    acceptance: float
    pool_share: float

    @property
    def num_blocks(self) -> int:
        """Of the pool, with vLLM's null block."""
        mean = sum(self.prompt_lengths) / len(self.prompt_lengths) + self.num_new_tokens
        return 1 + int(self.pool_share * self.max_num_seqs * mean / self.block_size)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Every scheduler would say the same of its config; the process hears of other things again afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class VirtualScheduler:
    """Makes schedulers of one engine config, and runs loads through them.

    Args:
        target, draft: folders of the models; only their configs are read.
    """

    def __init__(self, target: Path, draft: Path) -> None:
        self._target, self._draft = str(target), str(draft)

    def run(self, load: Load, way: str, seed: int) -> Counter[str]:
        """Serve a load to its end; returns steps, tokens and the scheduler's counters."""
        from vllm import SamplingParams
        from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
        from vllm.v1.request import Request

        with _without_warnings():
            scheduler = self._scheduler(load, way)
        rng = random.Random(seed)
        for index, length in enumerate(load.prompt_lengths):
            params = SamplingParams(temperature=0.0, max_tokens=load.num_new_tokens, ignore_eos=True)
            scheduler.add_request(Request(str(index), [1] * length, params, None))
        counted: Counter[str] = Counter()
        while scheduler.requests:
            output = scheduler.schedule()
            names = list(output.num_scheduled_tokens)
            sampled = []
            for name in names:
                chunk = output.scheduled_spec_decode_tokens.get(name, [])
                num_accepted = next((n for n in range(len(chunk)) if rng.random() >= load.acceptance), len(chunk))
                sampled.append([] if scheduler.requests[name].is_prefill_chunk else [*chunk[:num_accepted], 1])
                counted.update(num_verified_tokens=len(chunk), num_accepted_tokens=num_accepted)
            places = {name: place for place, name in enumerate(names)}
            scheduler.update_from_output(output, ModelRunnerOutput(names, places, sampled_token_ids=sampled))
            running = [request.request_id for request in scheduler.running]
            scheduler.update_draft_token_ids(DraftTokenIds(running, [[2] * load.num_draft_tokens for _ in running]))
            counted.update(num_steps=1, num_computed_tokens=output.total_num_scheduled_tokens)
        counted.update({name: value for name, value in output.scheduler_status.items() if not isinstance(value, str)})
        return counted

    def _scheduler(self, load: Load, way: str) -> Any:
        import torch
        from vllm import EngineArgs
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_specbranch.scheduler import SpecBranchScheduler

        class Uncut(SpecBranchScheduler):
            def _make_room(self) -> None:
                """Blocks are taken back if they may be; chunks stay whole, whatever room there is for them."""
                self._reclaimer.make_room(self.running)

        config = EngineArgs(
            model=self._target,
            dtype="float32",
            max_model_len=load.num_new_tokens + max(load.prompt_lengths) + 1,
            max_num_seqs=load.max_num_seqs,
            enable_prefix_caching=False,
            speculative_config={
                "method": "specbranch",
                "model": self._draft,
                "num_speculative_tokens": load.num_draft_tokens,
                "reclaim_blocks": way in ("reclaim", "both"),
            },
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = load.num_blocks
        spec = FullAttentionSpec(block_size=load.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        return (Uncut if way in ("vllm", "reclaim") else SpecBranchScheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(load.num_blocks, [], [KVCacheGroupSpec(["all"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=load.block_size,
        )


def sweep(scheduler: VirtualScheduler, loads: Sequence[Load], num_seeds: int) -> Iterator[dict[str, Any]]:
    """Yield per load and way the load itself, and the means over the seeds of what was counted."""
    for load in loads:
        for way in WAYS:
            total: Counter[str] = Counter()
            for seed in range(num_seeds):
                total.update(scheduler.run(load, way, seed))
            means = {name: value / num_seeds for name, value in total.items()}
            facts = {name: value for name, value in asdict(load).items() if name != "prompt_lengths"}
            assert not facts.keys() & means.keys(), "a count has the name of a fact of the load"
            yield {**facts, "num_requests": len(load.prompt_lengths), "way": way, **means}
