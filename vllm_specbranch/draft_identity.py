"""What tells a draft model from others, cheap enough for every handshake: its config and its tokenizer.

The weights are not part of it: a server may be restarted with better ones while engines run, and a draft is never wrong, only
rejected. (A length head is trained for particular weights: `length_head.model_identity` looks at them too.) Pure; runs in the
frontend and in the draft server process.
"""

import hashlib
import json
from pathlib import Path

# Keys of config.json that say who wrote it and in which type, not what the model is.
_NOTES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def draft_identity(folder: str | Path) -> str:
    """A hash of a model's config and of its tokenizer.

    Args:
        folder: of the model.

    Returns:
        Hexadecimal digits; empty if the folder holds no readable config (a model of the hub that is not here yet).
    """
    root = Path(folder)
    try:
        config = json.loads((root / "config.json").read_text())
        tokenizer = root / "tokenizer.json"
        content = tokenizer.read_bytes() if tokenizer.is_file() else b""
    except (OSError, ValueError):
        return ""
    if not isinstance(config, dict):
        return ""
    described = {key: value for key, value in config.items() if key not in _NOTES}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
