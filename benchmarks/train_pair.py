"""Train a small target and draft model from text on this machine: the recipe of the shipped pair.

Steps, each with its own share of the budget: a byte-level BPE tokenizer; the target by next-token loss; the draft the
same way; the draft once more, distilled on the target (KL divergence of its next-token distribution from the
target's). Without `--text` the text is Python source: the interpreter's standard library and its site-packages. An
interrupted run goes on where it stopped when started again with the same `--out`. The result is two folders that vLLM
and transformers load, and `card.json` with where everything came from.

    python benchmarks/train_pair.py --out DIR                          a few hours on one core
    python benchmarks/train_pair.py --out DIR --text CORPUS --minutes 30

Owns the recipe and the command line. How text becomes tokens is in `training_text.py`, one training run in
`training_run.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from benchmarks.training_text import Corpus

logger = logging.getLogger("train_pair")


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Dimensions of one Llama model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int


@dataclass(frozen=True, slots=True)
class PairSize:
    """Dimensions of a pair and of its training batches."""

    target: ModelSize
    draft: ModelSize
    vocab: int
    context: int
    sequence: int
    batch: int


SIZES = {
    # The shipped pair.
    "default": PairSize(ModelSize(256, 6, 8, 4, 704), ModelSize(128, 2, 4, 2, 352), 4096, 2048, 384, 16),
    # For trying the script out: seconds instead of hours, and nothing learnt worth having.
    "tiny": PairSize(ModelSize(64, 2, 4, 2, 128), ModelSize(32, 1, 2, 1, 64), 512, 256, 64, 8),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One training run of the recipe.

    Args:
        name: of its checkpoint and of its entry in the card.
        role: `target` or `draft`: whose weights it changes.
        token_share: its tokens, as a multiple of `--tokens`.
        time_share: its part of `--minutes`.
        distilled: learn the target's distribution instead of the text.
    """

    name: str
    role: str
    token_share: float
    time_share: float
    distilled: bool = False


# Time goes as tokens times cost of a token: a target step costs about five draft steps, a distillation step three.
STAGES = (
    Stage("target", "target", 1.0, 0.70),
    Stage("draft", "draft", 1.0, 0.15),
    Stage("distill", "draft", 0.3, 0.15, distilled=True),
)


def train_pair(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole recipe and write `target/`, `draft/` and `card.json` below `args.out`.

    Args:
        args: of the command line (see `_parser`).

    Returns:
        The content of card.json.
    """
    import torch

    from benchmarks import training_run, training_text

    size, out = SIZES[args.size], args.out
    torch.set_num_threads(args.threads)
    out.mkdir(parents=True, exist_ok=True)
    corpus = training_text.load_corpus(args.text, args.max_bytes, size.vocab, out, args.seed)
    logger.info("text: %d files, %d training tokens", corpus.num_files, len(corpus.train))
    bf16 = args.precision == "bf16" or (args.precision == "auto" and training_run.bf16_is_faster())
    logger.info("training in %s", "bf16 autocast" if bf16 else "float32")
    models: dict[str, LlamaForCausalLM] = {}
    stages = []
    for stage in STAGES:
        if stage.role not in models:
            models[stage.role] = _new_model(size, stage.role, args.seed)
        budget = training_run.Budget(
            num_tokens=int(args.tokens * stage.token_share),
            seconds=None if args.minutes is None else args.minutes * 60 * stage.time_share,
        )
        settings = training_run.RunSettings(
            name=stage.name,
            sequence=size.sequence,
            batch=size.batch,
            learning_rate=args.learning_rate,
            seed=args.seed,
            bf16=bf16,
            checkpoint=out / "checkpoints" / f"{stage.name}.safetensors",
            checkpoint_s=args.checkpoint_s,
        )
        teacher = models["target"] if stage.distilled else None
        result = training_run.train(models[stage.role], corpus.train, corpus.held_out, budget, settings, teacher)
        stages.append({"stage": stage.name, **dataclasses.asdict(result)})
    for role, model in models.items():
        _write_model(model, corpus, out / role)
    agreement = training_run.agreement(models["target"], models["draft"], corpus.held_out, size.sequence)
    card = {
        **_provenance(args),
        "text": corpus.facts(),
        "size": dataclasses.asdict(size),
        "bf16": bf16,
        "stages": stages,
    }
    card["draft_first_choice_is_targets"] = round(agreement, 4)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    return card


def _new_model(size: PairSize, role: str, seed: int) -> LlamaForCausalLM:
    """Return a float32 model with fresh weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.training_text import BOS, EOS, PAD, SPECIAL_TOKENS

    dims: ModelSize = getattr(size, role)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=dims.hidden,
        intermediate_size=dims.mlp,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(EOS),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def _write_model(model: LlamaForCausalLM, corpus: Corpus, folder: Path) -> None:
    """Write bf16 weights, config, generation config and tokenizer."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    corpus.tokenizer.save_pretrained(folder)


def _provenance(args: argparse.Namespace) -> dict[str, Any]:
    import tokenizers
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    return {
        "schema": 1,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git": _git_state(),
        "versions": {"python": sys.version.split()[0], **versions},
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
    }


def _git_state() -> dict[str, Any]:
    """Return commit and dirty flag of the repository this script is in; empty outside one."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a small target and draft model from text on this machine.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; holds checkpoints too")
    parser.add_argument(
        "--text", type=Path, help="folder of *.py, *.txt, *.md files (default: this Python's own sources)"
    )
    parser.add_argument("--max-bytes", type=int, default=24_000_000, help="text to use (default 24 MB)")
    parser.add_argument(
        "--tokens", type=int, default=10_000_000, help="tokens to train the target on; the rest follows (default 10 M)"
    )
    parser.add_argument("--minutes", type=float, help="end earlier: time for the whole recipe")
    parser.add_argument("--size", choices=sorted(SIZES), default="default", help="dimensions")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak, after a warm-up (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--precision", choices=("auto", "bf16", "float32"), default="auto", help="auto: the faster here (default)"
    )
    parser.add_argument("--checkpoint-s", type=float, default=120.0, help="seconds between checkpoints (default 120)")
    return parser


def main(argv: Sequence[str] | None = None, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Run the command line; the last line written is the card as JSON."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(json.dumps(train_pair(args)) + "\n")
    return 0


if __name__ == "__main__":
    # Run as a file, only this folder is on the path, and the siblings are imported as `benchmarks.*`.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
