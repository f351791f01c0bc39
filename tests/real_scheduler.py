"""Our scheduler on vLLM's real KV-cache manager, and a worker whose state and block table are vLLM's; no model behind them.

What a model would write into the KV cache is a mark per slot: the hash of all tokens up to there. So a worker that reads or writes
a wrong block, one that another request has been given since, or a slot that was never written, is seen at once.
"""

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from vllm import EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import InputBatch

from tests.model_paths import DRAFT, TARGET
from vllm_specbranch import patching
from vllm_specbranch.patches import arg_utils
from vllm_specbranch.scheduler import SpecBranchScheduler, SpecBranchSchedulerOutput

MAX_MODEL_LEN = 64
MAX_NUM_SEQS = 8
VOCAB_SIZE = 100
NULL_BLOCK = 0


def make_config(
    block_size: int,
    gamma: int,
    max_num_batched_tokens: int,
    kv_transfer_config: dict[str, object] | None = None,
    **speculative: object,
) -> VllmConfig:
    """Engine config of the shipped pair with small limits."""
    there = [patch for patch in arg_utils.PATCHES if patching.is_applied(patch)]
    patching.apply(arg_utils.PATCHES, "0.32.0")
    try:
        config: VllmConfig = EngineArgs(
            model=TARGET,
            dtype="float32",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_transfer_config=kv_transfer_config,
            speculative_config={
                "method": "specbranch",
                "model": DRAFT,
                "num_speculative_tokens": gamma,
                **speculative,
            },
        ).create_engine_config()
    finally:
        patching.revert([patch for patch in arg_utils.PATCHES if patch not in there])
    config.cache_config.block_size = block_size
    return config


def make_scheduler(config: VllmConfig, num_blocks: int, num_groups: int = 1) -> SpecBranchScheduler:
    """A scheduler with a pool of so many blocks, one of them vLLM's null block."""
    block_size = config.cache_config.block_size
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    groups = [KVCacheGroupSpec([f"layer {index}"], spec) for index in range(num_groups)]
    return SpecBranchScheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_size,
        log_stats=True,
    )


class Worker:
    """vLLM's `_update_states` on a real `InputBatch`; the KV cache is a mark per slot."""

    def __init__(self, config: VllmConfig, num_blocks: int) -> None:
        self.block_size: int = config.cache_config.block_size
        self.slots: list[int | None] = [None] * (num_blocks * self.block_size)
        runner: Any = gpu_model_runner.GPUModelRunner.__new__(gpu_model_runner.GPUModelRunner)
        runner.__dict__.update(
            requests={},
            num_prompt_logprobs={},
            late_interaction_runner=SimpleNamespace(
                on_requests_finished=lambda names: None, register_request=lambda name, params: None
            ),
            speculative_config=config.speculative_config,
            use_async_spec_decode=False,
            use_async_scheduling=False,
            is_pooling_model=False,
            uses_mrope=False,
            device=torch.device("cpu"),
            _on_request_state_removed=lambda name, state: None,
            _process_encoder_cache_scheduler_output=lambda output: None,
            _may_reorder_batch=lambda output: None,
            input_batch=InputBatch(
                max_num_reqs=MAX_NUM_SEQS,
                max_model_len=MAX_MODEL_LEN,
                max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
                device=torch.device("cpu"),
                vocab_size=VOCAB_SIZE,
                block_sizes=[self.block_size],
                max_num_blocks_per_req=[-(-MAX_MODEL_LEN // self.block_size)],
                num_spec_tokens=config.num_speculative_tokens,
            ),
        )
        self.runner = runner

    def block_ids(self, name: str) -> list[int]:
        """What attention uses for a request of the batch: its row of the block table."""
        batch = self.runner.input_batch
        table = batch.block_table[0]
        row = batch.req_id_to_index[name]
        ids: list[int] = table.get_numpy_array()[row, : table.num_blocks_per_row[row]].tolist()
        assert ids == self.runner.requests[name].block_ids[0], "the two tables of a worker agree"
        return ids

    def execute(self, output: SchedulerOutput, tokens_of: dict[str, list[int]]) -> None:
        """Take in a step; write the marks of its tokens, and read those before.

        Args:
            tokens_of: per request all tokens, committed ones and then the scheduled drafts.
        """
        with mock.patch.object(gpu_model_runner, "get_pp_group", lambda: SimpleNamespace(is_last_rank=True)):
            self.runner._update_states(output)
        computed = {one.req_id: one.num_computed_tokens for one in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        batch = self.runner.input_batch
        assert set(batch.req_id_to_index) == set(output.num_scheduled_tokens)
        for name, row in batch.req_id_to_index.items():
            assert batch.token_ids_cpu[row, : len(tokens_of[name])].tolist() == tokens_of[name]
        for name, num_scheduled in output.num_scheduled_tokens.items():
            marks = prefix_marks(tokens_of[name])
            start = computed[name]
            for position in range(start, start + num_scheduled):
                self.slots[self._slot(name, position)] = marks[position]
        # After all writes: a block with two writers is read wrong by one of them.
        for name, num_scheduled in output.num_scheduled_tokens.items():
            marks = prefix_marks(tokens_of[name])
            for position in range(computed[name] + num_scheduled):
                assert self.slots[self._slot(name, position)] == marks[position], f"{name} reads wrong KV at {position}"

    def commit(self, names: Sequence[str], sampled: Sequence[Sequence[int]]) -> None:
        """Keep what was sampled, as vLLM's model runner does."""
        batch = self.runner.input_batch
        for name, tokens in zip(names, sampled, strict=True):
            row = batch.req_id_to_index[name]
            start = batch.num_tokens_no_spec[row]
            batch.token_ids_cpu[row, start : start + len(tokens)] = tokens
            batch.num_tokens_no_spec[row] = start + len(tokens)
            self.runner.requests[name].output_token_ids.extend(tokens)

    def _slot(self, name: str, position: int) -> int:
        blocks = self.block_ids(name)
        assert position < len(blocks) * self.block_size, f"{name} has no block for {position}"
        block = blocks[position // self.block_size]
        assert block != NULL_BLOCK
        return block * self.block_size + position % self.block_size


def prefix_marks(tokens: Sequence[int]) -> list[int]:
    """For each position a number that stands for the tokens up to it."""
    marks, mark = [], 0
    for token in tokens:
        mark = hash((mark, token))
        marks.append(mark)
    return marks


class Engine:
    """Scheduler and worker in turn; what the target would say is told to each step.

    Args:
        config: as `make_config` makes it.
        num_blocks: of the pool, vLLM's null block among them.
    """

    def __init__(self, config: VllmConfig, num_blocks: int) -> None:
        self.block_size: int = config.cache_config.block_size
        self.scheduler = make_scheduler(config, num_blocks)
        self.manager = self.scheduler.kv_cache_manager
        self.pool = self.manager.block_pool
        self.worker = Worker(config, num_blocks)
        self.num_requests = 0

    def add(self, prompt: Sequence[int], max_tokens: int) -> str:
        """A request comes in; returns its name."""
        init_none_hash(sha256)
        name = f"request {self.num_requests}"
        self.num_requests += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        hasher = get_request_block_hasher(self.block_size, sha256)
        self.scheduler.add_request(Request(name, list(prompt), params, None, block_hasher=hasher))
        return name

    def abort(self, name: str) -> None:
        """A request is taken back by its user."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def draft(self, drafts: dict[str, list[int]]) -> None:
        """Drafts come in for running requests."""
        self.scheduler.update_draft_token_ids(DraftTokenIds(list(drafts), list(drafts.values())))

    def step(self, accepts: dict[str, int] | None = None, next_token: int = 1) -> SpecBranchSchedulerOutput:
        """One engine step: schedule, execute, take in.

        Args:
            accepts: by request, how many of its scheduled draft tokens the target accepts at most; 0 if not named.
            next_token: what it says after them.
        """
        output = self.scheduler.schedule()
        requests, drafts = self.scheduler.requests, output.scheduled_spec_decode_tokens
        names = list(output.num_scheduled_tokens)
        self.worker.execute(output, {name: [*requests[name].all_token_ids, *drafts.get(name, ())] for name in names})
        for name in names:
            assert self.worker.block_ids(name) == self.blocks(name), "worker and scheduler agree"
        sampled: list[list[int]] = []
        for name in names:
            accepted = drafts.get(name, [])[: (accepts or {}).get(name, 0)]
            sampled.append([] if requests[name].is_prefill_chunk else [*accepted, next_token])
        self.worker.commit(names, sampled)
        places = {name: index for index, name in enumerate(names)}
        answer = ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=sampled)
        self.scheduler.update_from_output(output, answer)
        return output

    def blocks(self, name: str) -> list[int]:
        """The scheduler's block ids of a request."""
        ids: list[int] = self.manager.get_block_ids(name)[0]
        return ids

    def check_blocks(self, num_hogged: int = 0) -> None:
        """No block is lost, free and held at once, or counted wrongly.

        Args:
            num_hogged: blocks that the test itself has taken from the pool.
        """
        (manager,) = self.manager.coordinator.single_type_managers
        held = Counter(block.block_id for blocks in manager.req_to_blocks.values() for block in blocks)
        assert NULL_BLOCK not in held
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)) == self.pool.get_num_free_blocks()
        assert not held.keys() & set(free)
        assert len(held) + len(free) + num_hogged == self.pool.num_gpu_blocks - 1
        assert all(self.pool.blocks[block].ref_cnt == count for block, count in held.items())
        assert not manager.req_to_blocks.keys() - self.scheduler.requests.keys()
        for name, num_cached in manager.num_cached_block.items():
            assert num_cached <= len(manager.req_to_blocks[name])
