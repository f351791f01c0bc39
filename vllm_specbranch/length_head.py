"""The length head: a small network that says how much of the next draft will be accepted, and its two files.

Owns the network, the description of what it was trained for, saving, loading, and whether it fits a pair of models. Does not own
where its features come from (`head_features`), its training, or what its classes mean for a draft (`planner`). Knows nothing of
vLLM. Runs in the frontend (the check), in the target's worker on the output rank, and where a head is trained.

    z = [hidden states of the target's last K layers, first layer first ; input embedding of the newest token]
    z -> 256 -> 64 -> 3 classes: 0 the next draft is rejected at once, 1 in between, 2 all of it is accepted

(arXiv:2506.01979, section 4.1; section 5 of the design.)
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_specbranch.errors import ConfigError

FORMAT_VERSION = 1
NUM_CLASSES = 3
HIDDEN_SIZES = (256, 64)
DROPOUT = 0.2
SPEC_FILE = "head.json"
WEIGHTS_FILE = "head.safetensors"
FIELD = "length_head"

# Of each weight file so many pieces are hashed: enough to tell a fine-tuned model from the one that it was made from.
_NUM_PIECES = 16
_PIECE_BYTES = 4096
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
# Keys of config.json that say who wrote it, not what the model is.
_NOTES = ("_name_or_path", "transformers_version")


class LengthHead(nn.Module):
    """The three-layer network of H-RAD, with the standardisation of its input.

    Args:
        num_features: size of z.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self._folded: tuple[torch.Tensor, ...] | None = None
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))
        first, second = HIDDEN_SIZES
        self.layers = nn.Sequential(
            nn.Linear(num_features, first),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(second, NUM_CLASSES),
        )

    @property
    def num_features(self) -> int:
        """Size of z."""
        size: int = self.mean.numel()
        return size

    def standardise(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        """Set what is subtracted from each feature, and what the rest is divided by; `[num_features]` each, `scale` above 0."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Logits of the classes; for training.

        Args:
            z: `[n, num_features]`, float32.

        Returns:
            `[n, 3]`.
        """
        logits: torch.Tensor = self.layers((z - self.mean) / self.scale)
        return logits

    def train(self, mode: bool = True) -> "LengthHead":
        """As in torch; what `freeze` prepared is forgotten."""
        self._folded = None
        super().train(mode)
        return self

    def freeze(self) -> "LengthHead":
        """Prepare `classes`; to be called again after the head has moved to another device. Returns itself."""
        self.eval().requires_grad_(False)
        linears = [one for one in self.layers if isinstance(one, nn.Linear)]
        # Standardising is linear: it becomes part of the first layer, in float64 because means can be large.
        weight, bias = linears[0].weight.double(), linears[0].bias.double()
        weight = weight / self.scale.double()
        bias = bias - weight @ self.mean.double()
        folded = [weight.float().t().contiguous(), bias.float()]
        for linear in linears[1:]:
            folded += [linear.weight.t().contiguous(), linear.bias]
        self._folded = tuple(folded)
        return self

    @torch.inference_mode()
    def classes(self, z: torch.Tensor) -> list[int]:
        """The likeliest class of each row, in one batched call.

        Args:
            z: `[n, num_features]`, any float type, on the head's device.

        Returns:
            n classes of 0..2.
        """
        if self._folded is None:
            self.freeze()
        assert self._folded is not None
        first, first_bias, second, second_bias, third, third_bias = self._folded
        hidden = torch.addmm(first_bias, z.float(), first).relu_()
        hidden = torch.addmm(second_bias, hidden, second).relu_()
        found: list[int] = torch.addmm(third_bias, hidden, third).argmax(dim=1).tolist()
        return found


@dataclass(frozen=True)
class HeadSpec:
    """What a head is and what it was trained for: the content of `head.json`.

    Attributes:
        num_features: size of z: `len(layers) * hidden_size + embedding_size`.
        hidden_size: of the target.
        embedding_size: of the target's input embeddings.
        num_target_layers: of the target.
        layers: after which layers the target's hidden states are taken, as given to vLLM: n is the residual stream after n layers.
        gamma: draft tokens of the chains that it was trained on; class 2 means that so many are accepted.
        epsilon: the stop threshold that it was evaluated with.
        target, draft: names of the models, for people.
        target_identity, draft_identity: see `model_identity`; None where it was not known.
        label_counts: how many training rounds were of each class.
        validation: figures on held-out prompts, by name.
        seed: of its training.
        prompts: where the prompts came from.
        format_version: of the two files.
    """

    num_features: int
    hidden_size: int
    embedding_size: int
    num_target_layers: int
    layers: tuple[int, ...]
    gamma: int
    epsilon: float
    target: str
    draft: str
    target_identity: str | None
    draft_identity: str | None
    label_counts: tuple[int, int, int]
    validation: Mapping[str, float]
    seed: int
    prompts: str
    format_version: int = FORMAT_VERSION

    @property
    def num_layers(self) -> int:
        """K: of how many layers the hidden states are taken."""
        return len(self.layers)

    def check_fits(
        self,
        directory: str | Path,
        *,
        hidden_size: int,
        num_target_layers: int,
        gamma: int,
        target_identity: str | None,
        draft_identity: str | None,
    ) -> None:
        """Raise unless the head was trained for this pair.

        Args:
            directory: where the head is, for the message.
            hidden_size, num_target_layers: of the target.
            gamma: `num_speculative_tokens` of the engine.
            target_identity, draft_identity: None where they are not known, which fits.

        Raises:
            ConfigError: it does not fit; the message says how, and names both values.
        """
        needed = {
            "hidden size of the target": (self.hidden_size, hidden_size),
            "number of layers of the target": (self.num_target_layers, num_target_layers),
            "num_speculative_tokens": (self.gamma, gamma),
        }
        wrong = [
            f"{name}: {trained} in training, {here} here" for name, (trained, here) in needed.items() if trained != here
        ]
        for role, name, trained_id, here_id in (
            ("target", self.target, self.target_identity, target_identity),
            ("draft", self.draft, self.draft_identity, draft_identity),
        ):
            if None not in (trained_id, here_id) and trained_id != here_id:
                wrong.append(f"another {role} model: it was trained for {name!r} (config, tokenizer or weights differ)")
        if wrong:
            allowed = "a head trained for this pair (" + "; ".join(wrong) + "); `vllm-specbranch train-head` makes one"
            raise ConfigError(str(directory), allowed, FIELD)


def target_layers(num_target_layers: int, num_layers: int) -> tuple[int, ...]:
    """The last K layers of a target, as given to vLLM.

    Raises:
        ConfigError: K is above the number of layers.
    """
    if not 1 <= num_layers <= num_target_layers:
        raise ConfigError(num_layers, f"1..{num_target_layers}, the layers of the target", "head_layers")
    return tuple(range(num_target_layers - num_layers + 1, num_target_layers + 1))


def save_head(directory: str | Path, head: LengthHead, spec: HeadSpec) -> None:
    """Write a head: the weights first, so that a folder with `head.json` is complete.

    Raises:
        ConfigError: head and description have another number of features.
    """
    folder = Path(directory)
    if head.num_features != spec.num_features:
        raise ConfigError(head.num_features, f"{spec.num_features} features, as described", FIELD)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPEC_FILE).unlink(missing_ok=True)
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    text = json.dumps(dataclasses.asdict(spec), indent=2, sort_keys=True) + "\n"
    aside = folder / (SPEC_FILE + ".new")
    aside.write_text(text)
    aside.replace(folder / SPEC_FILE)


def load_spec(directory: str | Path) -> HeadSpec:
    """Read `head.json`.

    Raises:
        ConfigError: no such folder or file, or it is broken or of another version.
    """
    path = _folder(directory) / SPEC_FILE
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _broken(directory, f"{SPEC_FILE}: {error}") from error
    if not isinstance(found, dict):
        raise _broken(directory, f"{SPEC_FILE} holds no object")
    if found.get("format_version") != FORMAT_VERSION:
        version = found.get("format_version")
        raise _broken(directory, f"{SPEC_FILE} has format version {version!r}, this package reads {FORMAT_VERSION}")
    spec = _parse(directory, found)
    sizes = len(spec.layers) * spec.hidden_size + spec.embedding_size
    if spec.num_features != sizes:
        raise _broken(directory, f"num_features is {spec.num_features}, layers and sizes make {sizes}")
    if list(spec.layers) != sorted(set(spec.layers)) or not all(
        1 <= one <= spec.num_target_layers for one in spec.layers
    ):
        raise _broken(directory, f"layers {list(spec.layers)} are not rising numbers of 1..{spec.num_target_layers}")
    return spec


def load_head(directory: str | Path) -> tuple[LengthHead, HeadSpec]:
    """Read a head, ready for `classes`, on the CPU.

    Raises:
        ConfigError: a file is missing or broken, or the two do not belong together.
    """
    spec = load_spec(directory)
    try:
        tensors = load_file(_folder(directory) / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise _broken(directory, f"{WEIGHTS_FILE}: {error}") from error
    head = LengthHead(spec.num_features)
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = sorted(expected.items() ^ found.items())[0][0]
        reason = f"{WEIGHTS_FILE} has {found.get(name)} for {name}, {SPEC_FILE} asks for {expected.get(name)}"
        raise _broken(directory, reason)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise _broken(directory, f"{WEIGHTS_FILE} holds numbers that are not finite")
    if not bool((tensors["scale"] > 0).all()):
        raise _broken(directory, f"{WEIGHTS_FILE} has a scale that is not above 0")
    head.load_state_dict(tensors)
    return head.freeze(), spec


def model_identity(folder: str | Path) -> str | None:
    """A hash that tells a model from others: config, tokenizer, and samples of the weights.

    Reads 64 KiB of each weight file at most, whatever its size, so that fine-tuned and quantised models differ from their origin.

    Args:
        folder: of the model.

    Returns:
        None if the folder holds no config or no weights (a model of the hub that is not here yet).
    """
    root = Path(folder)
    weights = sorted({one for pattern in _WEIGHT_PATTERNS for one in root.glob(pattern)})
    try:
        config = json.loads((root / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not weights or not isinstance(config, dict):
        return None
    digest = hashlib.sha256()
    described = {key: value for key, value in config.items() if key not in _NOTES}
    digest.update(json.dumps(described, sort_keys=True).encode())
    tokenizer = root / "tokenizer.json"
    digest.update(tokenizer.read_bytes() if tokenizer.is_file() else b"")
    for path in weights:
        _add_samples(digest, path)
    return digest.hexdigest()


def _add_samples(digest: Any, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with path.open("rb") as stream:
        for piece in range(_NUM_PIECES):
            stream.seek(max(0, size - _PIECE_BYTES) * piece // (_NUM_PIECES - 1))
            digest.update(stream.read(_PIECE_BYTES))


def _folder(directory: str | Path) -> Path:
    folder = Path(os.path.expanduser(directory))
    if not folder.is_dir():
        raise ConfigError(str(directory), "'online', or a folder that exists with a trained head", FIELD)
    return folder


def _broken(directory: str | Path, reason: str) -> ConfigError:
    reason = " ".join(reason.split())
    return ConfigError(str(directory), f"a folder with a complete {SPEC_FILE} and {WEIGHTS_FILE} ({reason})", FIELD)


def _parse(directory: str | Path, found: Mapping[str, Any]) -> HeadSpec:
    """A description from what was read, each value of its type."""
    names = {field.name for field in dataclasses.fields(HeadSpec)}
    if missing := sorted(names - set(found)):
        raise _broken(directory, f"{SPEC_FILE} has no {missing[0]}")
    if extra := sorted(set(found) - names):
        raise _broken(directory, f"{SPEC_FILE} has {extra[0]}, which is unknown")
    for name, value in found.items():
        if not _CHECKS[name](value):
            raise _broken(directory, f"{SPEC_FILE} has {value!r} for {name}")
    first, second, third = found["label_counts"]
    return HeadSpec(**{**found, "layers": tuple(found["layers"]), "label_counts": (first, second, third)})


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_identity(value: object) -> bool:
    return value is None or isinstance(value, str)


_CHECKS = {
    "num_features": _is_size,
    "hidden_size": _is_size,
    "embedding_size": _is_size,
    "num_target_layers": _is_size,
    "layers": lambda value: isinstance(value, list) and bool(value) and all(map(_is_size, value)),
    "gamma": _is_size,
    "epsilon": _is_number,
    "target": _is_text,
    "draft": _is_text,
    "target_identity": _is_identity,
    "draft_identity": _is_identity,
    "label_counts": lambda value: isinstance(value, list) and len(value) == NUM_CLASSES and all(map(_is_count, value)),
    "validation": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "seed": _is_count,
    "prompts": _is_text,
    "format_version": _is_size,
}
