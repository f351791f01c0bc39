"""Text for `train_pair.py`: find it, split off held-out files, train a tokenizer on it, turn it into tokens.

Owns everything before the first training step. Files are chosen and split by hashes of their content, so the same
text gives the same corpus wherever it lies.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specbranch.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL_TOKENS = (BOS, EOS, PAD)
SUFFIXES = (".py", ".txt", ".md")
# Shorter files are mostly empty `__init__.py`; longer ones mostly data tables.
MIN_CHARS, MAX_CHARS = 200, 200_000
# One file in so many is held out.
HELD_OUT_EVERY = 50


@dataclass(frozen=True, slots=True)
class Corpus:
    """Tokenised text.

    Args:
        train: `[num_tokens] uint16`, files in a fixed shuffled order, each followed by the end-of-text token.
        held_out: the same of files that were not trained on.
        num_files: both together.
        num_bytes: both together.
        digest: sha256 over the chosen files in order.
        roots: names (not paths) of the folders searched.
        tokenizer: what made the tokens.
    """

    train: NDArray[np.uint16]
    held_out: NDArray[np.uint16]
    num_files: int
    num_bytes: int
    digest: str
    roots: tuple[str, ...]
    tokenizer: PreTrainedTokenizerFast

    def facts(self) -> dict[str, Any]:
        """Return what the card says about the text."""
        return {
            "roots": list(self.roots),
            "num_files": self.num_files,
            "num_bytes": self.num_bytes,
            "sha256": self.digest,
            "num_train_tokens": len(self.train),
            "num_held_out_tokens": len(self.held_out),
        }


def load_corpus(root: Path | None, max_bytes: int, vocab_size: int, out: Path, seed: int) -> Corpus:
    """Read text, make the tokenizer unless `out` has one from an earlier start of the same run, and tokenise.

    Args:
        root: folder searched for files; None for the sources of this Python.
        max_bytes: stop after this much.
        vocab_size: of the tokenizer, special tokens included; at most 65,536.
        out: `tokenizer.json` is kept here between starts.
        seed: of the order of files.

    Raises:
        ConfigError: there is no text under `root`.
    """
    roots = [root] if root is not None else [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    texts = choose(roots, max_bytes, seed)
    if len(texts) < 2:
        raise ConfigError(
            str(root), f"a folder with at least two {', '.join(SUFFIXES)} files of {MIN_CHARS} characters", "text"
        )
    held_out = texts[::HELD_OUT_EVERY]
    train = [text for index, text in enumerate(texts) if index % HELD_OUT_EVERY]
    tokenizer = _tokenizer(train, vocab_size, out / "tokenizer.json")
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return Corpus(
        train=_encode(tokenizer, train),
        held_out=_encode(tokenizer, held_out),
        num_files=len(texts),
        num_bytes=sum(len(text.encode()) for text in texts),
        digest=digest.hexdigest(),
        roots=tuple(path.name for path in roots),
        tokenizer=tokenizer,
    )


def choose(roots: list[Path], max_bytes: int, seed: int) -> list[str]:
    """Return different texts in an order that depends on their content and the seed only, up to `max_bytes`."""
    found: dict[str, str] = {}
    for text in _read_all(roots):
        found.setdefault(hashlib.sha256(f"{seed}:{text}".encode()).hexdigest(), text)
    chosen, num_bytes = [], 0
    for key in sorted(found):
        num_bytes += len(found[key].encode())
        if num_bytes > max_bytes:
            break
        chosen.append(found[key])
    return chosen


def _read_all(roots: list[Path]) -> Iterator[str]:
    for path in sorted(
        {path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    ):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if MIN_CHARS <= len(text) <= MAX_CHARS:
            yield text


def _tokenizer(texts: list[str], vocab_size: int, path: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if path.is_file():
        tokenizer = Tokenizer.from_file(str(path))
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> NDArray[np.uint16]:
    import numpy as np

    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        ids.extend(encoding.ids)
        ids.append(SPECIAL_TOKENS.index(EOS))
    return np.asarray(ids, dtype=np.uint16)
