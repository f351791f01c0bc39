"""Models and texts that tests share: the shipped pair, a poorly matched draft, and prompts cut from held-out text.

Importing this needs neither torch nor vLLM.
"""

import json
from pathlib import Path

from vllm_specbranch.shipped_pair import draft_path, target_path

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPTS = REPOSITORY / "benchmarks" / "prompts"
TARGET = str(target_path())
DRAFT = str(draft_path())


def holdout_texts() -> list[str]:
    """Return the openings of Python files that the shipped pair was not trained on."""
    texts: list[str] = json.loads((PROMPTS / "python_holdout.json").read_text())
    return texts


def holdout_prompts(count: int, num_chars: int = 400) -> list[str]:
    """Return `count` different prompts of exactly `num_chars` characters.

    The first ones open a file each; when the files run out, later ones begin one prompt further inside them.

    Args:
        count: how many.
        num_chars: length of each; about 0.4 tokens a character.

    Raises:
        ValueError: the held-out text is too short for that many.
    """
    texts = holdout_texts()
    longest = max(len(text) for text in texts)
    starts = range(0, longest - num_chars + 1, num_chars)
    found = [text[start : start + num_chars] for start in starts for text in texts if len(text) >= start + num_chars]
    prompts = list(dict.fromkeys(found))[:count]
    if len(prompts) < count:
        raise ValueError(f"{count} prompts of {num_chars} characters asked for, the held-out text gives {len(prompts)}")
    return prompts


def make_weak_draft(folder: Path) -> str:
    """Write the poorly matched draft to `folder` and return its path."""
    from vllm_specbranch.weaken import weaken

    weaken(Path(DRAFT), folder)
    return str(folder)
