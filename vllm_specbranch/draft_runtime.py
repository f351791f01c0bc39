"""The draft model inside vLLM's loader, layers and attention backend, without an engine.

Owns: the vLLM configuration of the draft model, its process set-up, the KV cache tensor, the attention metadata, one
forward. Does not own: rows (`draft_model`), which blocks belong to whom (`kv_blocks`). Runs in the draft server
process.
Written against vLLM 0.32; everything that knows vLLM's worker internals on the draft side is in this file.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import vllm.ir
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec, replace_as
from vllm.v1.worker.utils import customize_attention_spec, select_common_block_size

from vllm_specbranch.draft_model import DraftModelSettings, Row, RowArrays
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.kv_blocks import BlockCopy
from vllm_specbranch.messages import Sampling

SUPPORTED = "a decoder-only text model whose layers all use full or sliding-window attention with one KV shape"
CPU_KV_CACHE_BYTES = 256 << 20


class DraftRuntime:
    """A loaded model, its KV cache and the buffers of one forward. Built by `load`."""

    def __init__(self, config: VllmConfig, settings: DraftModelSettings, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.vocab_size: int = config.model_config.get_vocab_size()
        self.max_model_len: int = config.model_config.max_model_len
        self.block_size: int = config.cache_config.block_size
        self.dtype: str = str(config.model_config.dtype).removeprefix("torch.")
        # The folder, where vLLM has made one of a hub id.
        self.path: str = config.model_config.model
        self._model: Any = get_model(vllm_config=config)
        layers: dict[str, Any] = config.compilation_config.static_forward_context
        spec, owners = _kv_owners(config, layers, settings.model)
        self._layer_names = list(owners)
        backend = layers[self._layer_names[0]].get_attn_backend()
        layout = _resolve_layout(config, backend, spec)
        self._builder: Any = backend.get_builder_cls()(spec, self._layer_names, config, device)
        max_num_blocks = -(-self.max_model_len // self.block_size)
        self._arrays = RowArrays(settings.max_num_rows, settings.max_num_tokens, max_num_blocks, self.block_size)
        self._buffers = _DeviceBuffers(self._arrays, device)
        self._compile(settings.max_num_tokens)
        num_layers = len(set(owners.values()))
        budget = settings.kv_cache_bytes or default_kv_cache_bytes(
            settings, device, spec.page_size_bytes * num_layers * max_num_blocks
        )
        if settings.kv_cache_bytes is None:
            fitting = budget // (spec.page_size_bytes * num_layers) * self.block_size
            self.max_model_len = max(self.block_size, min(self.max_model_len, fitting))
        self._kv = _allocate_kv(spec, layout, num_layers, budget, self.max_model_len, device)
        self.num_blocks = int(self._kv.shape[1])
        for index, owner in enumerate(dict.fromkeys(owners.values())):
            for name in (name for name in owners if owners[name] == owner):
                layers[name].bind_kv_cache(self._kv[index])
        self.forward([Row([0], 0, [0])], [], 1)

    @classmethod
    def load(cls, settings: DraftModelSettings) -> "DraftRuntime":
        """Set this process up for one model of world size one, then load it. See `DraftModel.load`."""
        config = _vllm_config(settings)
        _check_supported(config, settings.model)
        device = torch.device(current_platform.device_type)
        with set_current_vllm_config(config):
            _set_up_process(config, device)
            return cls(config, settings, device)

    def _compile(self, num_tokens: int) -> None:
        """Compile for the generic shape (and reach peak activation memory) with one forward that touches no KV."""
        ids = torch.zeros(num_tokens, dtype=torch.int32, device=self._device)
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=self._device)
        with torch.inference_mode(), set_forward_context(None, self._config, num_tokens=num_tokens):
            self._model(ids, positions)
        for module in self._model.modules():
            compiled = getattr(module, "aot_compiled_fn", None)
            if compiled is not None:  # vLLM compiles without guards: checking none of them is 6% of a small step
                compiled.disable_guard_check()

    def forward(
        self, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """See `DraftModel.forward`. Returns ids and probabilities, `[num_rows][top_k]` each."""
        arrays = self._arrays
        arrays.fill(rows)
        batch = self._buffers.upload()
        with torch.inference_mode():
            self._copy_blocks(copies)
            metadata = self._attention_metadata(batch)
            slots = dict.fromkeys(self._layer_names, batch.slot_mapping)
            with set_forward_context(metadata, self._config, num_tokens=arrays.num_tokens, slot_mapping=slots):
                hidden = self._model(batch.input_ids, batch.positions)
            if arrays.num_tokens != arrays.num_rows:
                hidden = hidden[batch.last_tokens]
            return top_candidates(self._model.compute_logits(hidden), top_k, [row.sampling for row in rows])

    def _attention_metadata(self, batch: "_Batch") -> dict[str, Any]:
        """What each attention layer gets; the same for all, as all have one KV shape."""
        arrays = self._arrays
        common = CommonAttentionMetadata(
            query_start_loc=batch.query_start_loc,
            query_start_loc_cpu=batch.query_start_loc_cpu,
            seq_lens=batch.seq_lens,
            num_reqs=arrays.num_rows,
            num_actual_tokens=arrays.num_tokens,
            max_query_len=arrays.max_query_len,
            max_seq_len=arrays.max_seq_len,
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slot_mapping,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu,
            positions=batch.positions,
        )
        return dict.fromkeys(self._layer_names, self._builder.build(0, common, fast_build=True))

    def _copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks one after the other, all layers of a block in one copy (5 us each for a small model)."""
        for copy in copies:
            self._kv[:, copy.destination].copy_(self._kv[:, copy.source])


class _Batch:
    """The device views of one batch; see `RowArrays` for shapes."""

    __slots__ = (
        "block_table",
        "input_ids",
        "last_tokens",
        "positions",
        "query_start_loc",
        "query_start_loc_cpu",
        "seq_lens",
        "seq_lens_cpu",
        "slot_mapping",
    )
    block_table: torch.Tensor
    input_ids: torch.Tensor
    last_tokens: torch.Tensor
    positions: torch.Tensor
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    slot_mapping: torch.Tensor


class _DeviceBuffers:
    """The tensors behind `RowArrays`: the same memory on CPU, a copy of the valid part elsewhere."""

    def __init__(self, arrays: RowArrays, device: torch.device) -> None:
        self._arrays = arrays
        self._is_cpu = device.type == "cpu"
        names = ("input_ids", "positions", "slot_mapping", "query_start_loc", "seq_lens", "last_tokens", "block_table")
        self._host = {name: torch.from_numpy(getattr(arrays, name)) for name in names}
        self._tensors = self._host if self._is_cpu else {k: v.to(device) for k, v in self._host.items()}
        self._views: dict[tuple[int, int], _Batch] = {}

    def upload(self) -> _Batch:
        """Make the arrays visible to the device and return views of their valid part."""
        arrays = self._arrays
        key = (arrays.num_rows, arrays.num_tokens)
        batch = self._views.get(key)
        if batch is None:
            batch = self._slice(*key)
            if arrays.num_rows == arrays.num_tokens:  # decode batches come back with the same few shapes
                self._views[key] = batch
        if not self._is_cpu:
            self._copy_to_device()
        return batch

    def _copy_to_device(self) -> None:
        arrays = self._arrays
        for name in ("input_ids", "positions", "slot_mapping"):
            self._copy(name, arrays.num_tokens)
        for name in ("seq_lens", "last_tokens", "block_table"):
            self._copy(name, arrays.num_rows)
        self._copy("query_start_loc", arrays.num_rows + 1)

    def _copy(self, name: str, length: int) -> None:
        self._tensors[name][:length].copy_(self._host[name][:length], non_blocking=True)

    def _slice(self, num_rows: int, num_tokens: int) -> _Batch:
        batch, tensors, host = _Batch(), self._tensors, self._host
        batch.input_ids = tensors["input_ids"][:num_tokens]
        batch.positions = tensors["positions"][:num_tokens]
        batch.slot_mapping = tensors["slot_mapping"][:num_tokens]
        batch.query_start_loc = tensors["query_start_loc"][: num_rows + 1]
        batch.query_start_loc_cpu = host["query_start_loc"][: num_rows + 1]
        batch.seq_lens = tensors["seq_lens"][:num_rows]
        batch.seq_lens_cpu = host["seq_lens"][:num_rows]
        batch.last_tokens = tensors["last_tokens"][:num_rows]
        batch.block_table = tensors["block_table"][:num_rows]
        return batch


def top_candidates(
    logits: torch.Tensor, top_k: int, sampling: Sequence[Sampling | None]
) -> tuple[list[list[int]], list[list[float]]]:
    """The best next tokens of each row, and the distribution that a sampled row draws from.

    Args:
        logits: `[num_rows, vocab_size]`, any float type.
        top_k: how many for a row without sampling; at most the vocabulary.
        sampling: per row.

    Returns:
        ids and float32 probabilities per row, best first, `top_k` or the row's `top_m` of them; see `DraftModel.forward`. Ties
        come as `torch.topk` gives them, but the first of a row without sampling is `torch.argmax`'s choice (the lowest id): a
        greedy draft is the model's greedy path.
    """
    logits = logits.float()
    vocab_size = logits.shape[-1]
    sizes = [min(top_k if one is None else one.top_m, vocab_size) for one in sampling]
    values, ids = torch.topk(logits, max(sizes), dim=-1)
    probs = (values - logits.logsumexp(dim=-1, keepdim=True)).exp()
    id_rows = ids.tolist()
    sampled = [index for index, one in enumerate(sampling) if one is not None]
    if sampled:
        probs[sampled] = _truncated_softmax(values[sampled], [one for one in sampling if one is not None])
    prob_rows = probs.tolist()
    is_tied = [
        one is None and (size == 1 or row[0] == row[1])
        for one, size, row in zip(sampling, sizes, prob_rows, strict=True)
    ]
    id_rows = [row[:size] for row, size in zip(id_rows, sizes, strict=True)]
    prob_rows = [row[:size] for row, size in zip(prob_rows, sizes, strict=True)]
    if any(is_tied):
        for row, best, tied in zip(id_rows, logits.argmax(dim=-1).tolist(), is_tied, strict=True):
            if tied:
                put_first(row, best)
    return id_rows, prob_rows


def _truncated_softmax(values: torch.Tensor, sampling: Sequence[Sampling]) -> torch.Tensor:
    """Softmax of each row's first `top_m` of `values` `[num_rows, n]` at its temperature; 0 beyond."""
    temperatures = torch.tensor([one.temperature for one in sampling], device=values.device)
    scaled = values / temperatures.unsqueeze(1)
    sizes = {one.top_m for one in sampling}
    if min(sizes) < values.shape[1]:
        counts = torch.tensor([one.top_m for one in sampling], device=values.device)
        columns = torch.arange(values.shape[1], device=values.device)
        scaled.masked_fill_(columns.unsqueeze(0) >= counts.unsqueeze(1), float("-inf"))
    return scaled.softmax(dim=-1)


def put_first(ids: list[int], best: int) -> None:
    """Make `best`, which is tied with `ids[0]`, the first. If it is not among them, all are tied: the last leaves."""
    if ids[0] != best:
        ids.remove(best if best in ids else ids[-1])
        ids.insert(0, best)


def _vllm_config(settings: DraftModelSettings) -> VllmConfig:
    block_size = settings.block_size or (32 if current_platform.is_cpu() else 16)
    try:
        config = EngineArgs(
            model=settings.model,
            skip_tokenizer_init=True,
            dtype=settings.dtype,
            quantization=settings.quantization,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            load_format=settings.load_format,
            seed=settings.seed,
            enforce_eager=settings.enforce_eager,
            block_size=block_size,
            max_num_seqs=settings.max_num_rows,
            max_num_batched_tokens=settings.max_num_tokens,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enable_prefix_caching=False,
            disable_hybrid_kv_cache_manager=True,
            compilation_config={"cudagraph_mode": "NONE"},
        ).create_engine_config()
    except (OSError, ValueError) as error:
        raise ConfigError(settings.model, f"a draft model that vLLM can load ({error})", "model") from error
    config.model_config.max_model_len = min(settings.max_model_len, config.model_config.max_model_len)
    return config


def _check_supported(config: VllmConfig, model: str) -> None:
    """Raises ConfigError, before any weights load, for what the model's configuration already shows."""
    model_config = config.model_config
    refused = {
        "a pooling model": model_config.runner_type == "pooling",
        "multi-head latent attention": model_config.use_mla,
        "state-space layers": model_config.is_hybrid or model_config.has_inner_state,
        "no attention": model_config.is_attention_free,
        "an encoder": model_config.is_encoder_decoder,
        "multi-dimensional positions": model_config.uses_mrope,
    }
    for kind, applies in refused.items():
        if applies:
            raise ConfigError(model, f"{SUPPORTED}; this one has {kind}", "model")


def _set_up_process(config: VllmConfig, device: torch.device) -> None:
    """What vLLM's workers do before they load a model, for one rank."""
    current_platform.register_triton_kernel_overrides()
    if device.type == "cpu":
        from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

        _set_torch_accelerator_to_noop()
    else:
        torch.accelerator.set_device_index(0)
    config.kernel_config.ir_op_priority.set_default()
    vllm.ir.set_default_torch_wrap(config.compilation_config.ir_enable_torch_wrap)
    set_random_seed(config.model_config.seed)
    if not torch.distributed.is_initialized():
        with tempfile.TemporaryDirectory(prefix="specbranch-") as folder:
            store = (Path(folder) / "rendezvous").as_uri()
            init_distributed_environment(1, 0, store, 0, current_platform.dist_backend)
            ensure_model_parallel_initialized(1, 1)


def _kv_owners(config: VllmConfig, layers: dict[str, Any], model: str) -> tuple[FullAttentionSpec, dict[str, str]]:
    """The one KV shape of all attention layers, and for each layer the layer whose KV it reads (mostly itself).

    Sliding windows keep the KV of all their tokens: a rollback may need what has left the window.
    """
    specs, backends, owners = set(), set(), {}
    for name, layer in layers.items():
        spec = layer.get_kv_cache_spec(config) if hasattr(layer, "get_kv_cache_spec") else None
        if spec is None:
            continue
        if isinstance(spec, SlidingWindowSpec):
            # What is kept beyond the window does not matter where all is kept.
            everything = {"sliding_window": None, "block_size": config.cache_config.block_size}
            spec = replace_as(spec, FullAttentionSpec, drop=("extra_retained_tokens",), **everything)
        if type(spec) is not FullAttentionSpec or not isinstance(layer, Attention):
            raise ConfigError(model, f"{SUPPORTED}; layer {name} has a {type(spec).__name__}", "model")
        backends.add(layer.get_attn_backend())
        specs.add(customize_attention_spec(layer.get_attn_backend(), spec))
        owners[name] = layer.kv_sharing_target_layer_name or name
    if len(specs) != 1 or len(backends) != 1:
        raise ConfigError(model, f"{SUPPORTED}; this one has {len(specs)} shapes, {len(backends)} backends", "model")
    return specs.pop(), owners


def _resolve_layout(config: VllmConfig, backend: Any, spec: FullAttentionSpec) -> KVCacheLayout:
    """Record the order of KV dimensions that the backend wants; its metadata builder may ask for it."""
    if select_common_block_size(spec.block_size, [backend], [spec]) != spec.block_size:
        raise ConfigError(spec.block_size, f"what {backend.get_name()} supports", "block_size")
    names = [layout.name for layout in get_supported_kv_cache_layouts([backend])]
    return resolve_kv_cache_layout(config, [names], [spec])


def default_kv_cache_bytes(settings: DraftModelSettings, device: torch.device, one_sequence: int) -> int:
    """How much KV cache to take when the user does not say.

    On CPU 256 MiB, or four sequences of the longest kind if that is more, but never more than a quarter of what is free (then
    longer requests are decoded without drafts). Elsewhere what `gpu_memory_utilization` leaves after the warm-up.

    Args:
        one_sequence: bytes of KV of one sequence of `max_model_len`.
    """
    if device.type == "cpu":
        return min(max(CPU_KV_CACHE_BYTES, 4 * one_sequence), int(psutil.virtual_memory().available) // 4)
    free, total = torch.accelerator.get_memory_info(device)
    return int(total * settings.gpu_memory_utilization) - int(total - free)


def _allocate_kv(
    spec: FullAttentionSpec,
    layout: KVCacheLayout,
    num_layers: int,
    budget: int,
    max_model_len: int,
    device: torch.device,
) -> torch.Tensor:
    """One tensor `[layers, blocks, heads, tokens, content]`, in memory in the order of the layout.

    Raises:
        ConfigError: it would not hold one sequence of `max_model_len`.
    """
    bytes_per_block = spec.page_size_bytes * num_layers
    needed = bytes_per_block * -(-max_model_len // spec.block_size)
    if budget < needed:
        raise ConfigError(budget, f"at least {needed}, one sequence of the draft model", "draft_kv_cache_bytes")
    content = spec.state_content_size_bytes // spec.dtype.itemsize
    shape = (num_layers, budget // bytes_per_block, spec.num_heads, spec.num_states, content)
    order = layout.stride_order
    memory = torch.zeros([shape[axis] for axis in order], dtype=spec.dtype, device=device)
    return memory.permute(*np.argsort(order).tolist())
