"""One training run of `train_pair.py`: the loop, its schedule, its checkpoints, and the figures that judge the result.

Owns no choice of text or model. Batches depend on (seed, step) only, so a run that goes on from a checkpoint sees the
batches it would have seen. A checkpoint is one safetensors file (weights and AdamW moments, with progress in its
metadata), replaced atomically.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from vllm_specbranch.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import LlamaForCausalLM

    Tokens = NDArray[np.uint16]

logger = logging.getLogger("train_pair")

# Usual choices for small Llama models; nothing here was tuned.
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
WARM_UP = 0.02  # of the budget
FINAL_RATE = 0.1  # of the peak learning rate
REPORT_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Budget:
    """When a run ends: after so many tokens, or so many seconds if that comes first."""

    num_tokens: int
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a run trains.

    Args:
        name: for progress lines.
        sequence: tokens per sequence.
        batch: sequences per step.
        learning_rate: peak.
        seed: of the batches.
        bf16: autocast to bf16; weights and moments stay float32.
        checkpoint: file to keep.
        checkpoint_s: seconds between checkpoints.
    """

    name: str
    sequence: int
    batch: int
    learning_rate: float
    seed: int
    bf16: bool
    checkpoint: Path
    checkpoint_s: float


@dataclass(slots=True)
class Progress:
    """How far a run is."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    last_loss: float = math.nan


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did. Losses are the training objective's; `held_out_loss` is next-token loss in nats per token."""

    num_steps: int
    num_tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    held_out_loss: float


def train(
    model: LlamaForCausalLM,
    tokens: Tokens,
    held_out: Tokens,
    budget: Budget,
    settings: RunSettings,
    teacher: LlamaForCausalLM | None = None,
) -> RunResult:
    """Train until the budget is spent, from the checkpoint when there is one.

    Args:
        model: float32 weights. Mutates: its weights.
        tokens: `[num_tokens] uint16`, longer than one sequence.
        held_out: the same, not trained on.
        budget: when to end.
        settings: how.
        teacher: learn its distribution (KL) instead of the text. Not changed.

    Raises:
        ConfigError: the text is shorter than one sequence.
    """
    if len(tokens) <= settings.sequence:
        raise ConfigError(len(tokens), f"more than {settings.sequence} training tokens", "text")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY)
    progress = _load_checkpoint(settings.checkpoint, model, optimizer)
    model.train()
    started = time.monotonic() - progress.seconds
    saved = reported = time.monotonic()
    while (done := _fraction(progress, budget)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(done)
        loss = _train_step(model, optimizer, _batch(tokens, settings, progress.step), teacher, settings.bf16)
        _advance(progress, loss, settings, time.monotonic() - started)
        now = time.monotonic()
        if now - reported > REPORT_EVERY_S:
            reported = now
            logger.info(
                "%s: %3.0f%%  %.2f M tokens  loss %.3f", settings.name, 100 * done, progress.num_tokens / 1e6, loss
            )
        if now - saved > settings.checkpoint_s:
            saved = now
            _save_checkpoint(settings.checkpoint, model, optimizer, progress)
    _save_checkpoint(settings.checkpoint, model, optimizer, progress)
    loss = held_out_loss(model, held_out, settings.sequence)
    logger.info("%s: done, %d steps, held-out loss %.3f", settings.name, progress.step, loss)
    return RunResult(
        progress.step, progress.num_tokens, progress.seconds, progress.first_loss, progress.last_loss, loss
    )


@torch.inference_mode()
def bf16_is_faster() -> bool:
    """Measure whether this CPU multiplies bf16 matrices faster than float32 ones.

    Where it has no bf16 instructions (AVX2 only) they are emulated: a training step was seen to take 13 times as long.
    """

    def seconds(dtype: torch.dtype) -> float:
        left = right = torch.ones(256, 256, dtype=dtype)
        taken = []
        for _ in range(5):
            started = time.perf_counter()
            left @ right
            taken.append(time.perf_counter() - started)
        return min(taken)

    return seconds(torch.bfloat16) < seconds(torch.float32)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokens: Tokens, sequence: int) -> float:
    """Return the mean next-token loss over up to 64 sequences, nats per token."""
    total, count = 0.0, 0
    for batch in _held_out_batches(tokens, sequence):
        logits = model(batch[:, :-1]).logits
        total += float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    return total / count if count else math.nan


@torch.inference_mode()
def agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, tokens: Tokens, sequence: int) -> float:
    """Return how often both models prefer the same next token, over up to 64 held-out sequences."""
    same, count = 0, 0
    for batch in _held_out_batches(tokens, sequence):
        choices = target(batch).logits.argmax(-1) == draft(batch).logits.argmax(-1)
        same, count = same + int(choices.sum()), count + choices.numel()
    return same / count if count else math.nan


def _held_out_batches(tokens: Tokens, sequence: int) -> Iterator[torch.Tensor]:
    """Yield `[1, up to sequence + 1] int64`, from the beginning on."""
    for start in range(0, min(len(tokens) - 1, 64 * sequence), sequence):
        yield torch.from_numpy(tokens[start : start + sequence + 1].astype("int64"))[None]


def _batch(tokens: Tokens, settings: RunSettings, step: int) -> torch.Tensor:
    """Return `[batch, sequence + 1] int64`, random windows that depend on seed and step only."""
    digest = hashlib.sha256(f"{settings.name}:{settings.seed}:{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    starts = torch.randint(len(tokens) - settings.sequence, (settings.batch,), generator=generator)
    windows = [tokens[start : start + settings.sequence + 1].astype("int64") for start in starts.tolist()]
    return torch.stack([torch.from_numpy(window) for window in windows])


def _train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    teacher: LlamaForCausalLM | None,
    bf16: bool,
) -> float:
    inputs, labels = batch[:, :-1], batch[:, 1:].flatten()
    autocast = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with autocast:
        logits = model(inputs).logits.flatten(0, 1).float()
        if teacher is None:
            loss = functional.cross_entropy(logits, labels)
        else:
            with torch.inference_mode():
                wanted = teacher(inputs).logits.flatten(0, 1).float().log_softmax(-1)
            loss = functional.kl_div(logits.log_softmax(-1), wanted.clone(), reduction="batchmean", log_target=True)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    return float(loss.detach())


def _advance(progress: Progress, loss: float, settings: RunSettings, seconds: float) -> None:
    """Count one step. `last_loss` is a running mean over about 20 steps. Mutates: progress."""
    if math.isnan(progress.first_loss):
        progress.first_loss = progress.last_loss = loss
    progress.last_loss += (loss - progress.last_loss) * 0.05 if progress.step > 20 else loss - progress.last_loss
    progress.step += 1
    progress.num_tokens += settings.batch * settings.sequence
    progress.seconds = seconds


def _fraction(progress: Progress, budget: Budget) -> float:
    """Return the part of the budget that is spent."""
    by_time = 0.0 if budget.seconds is None else progress.seconds / max(budget.seconds, 1e-9)
    return max(progress.num_tokens / max(budget.num_tokens, 1), by_time)


def _rate(done: float) -> float:
    """Return the learning rate as a part of its peak: linear warm-up, then a cosine."""
    if done < WARM_UP:
        # Never exactly 0: the first step would be lost.
        return (done + 0.1 * WARM_UP) / (1.1 * WARM_UP)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"progress": json.dumps(asdict(progress))})
    partial.replace(path)


def _load_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Progress:
    """Return the progress saved at `path`, or a fresh one. Mutates: model, optimizer."""
    from safetensors import safe_open

    if not path.is_file():
        return Progress()
    with safe_open(path, framework="pt") as file:
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"weight.{name}"))
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in file.keys()]  # noqa: SIM118
            if keys:
                optimizer.state[parameter] = {key: file.get_tensor(f"{key}.{name}") for key in keys}
        progress = Progress(**json.loads(file.metadata()["progress"]))
    logger.info("going on from step %d of %s", progress.step, path.stem)
    return progress
