"""Prompts of Python source from this machine, to train a length head for the shipped pair on: lines out of the middle of files.

Files that the benchmarks use as held-out prompts are left out.

The files are those that `train_pair.py` would take (the standard library and the packages of this Python), chosen by hashes of
their content, so the same installation gives the same prompts. Writes `.jsonl` with id and prompt, which `train-head --prompts`
reads:

    python benchmarks/head_prompts.py --out prompts.jsonl --num-prompts 1500
"""

import argparse
import json
import random
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.training_text import choose
from vllm_specbranch.prompts import read_prompts

LEAST_CHARACTERS, MOST_CHARACTERS = 80, 500
HOLDOUT = Path(__file__).parent / "prompts" / "python_holdout.json"
COMPARED_CHARACTERS = 400


def make_prompts(roots: Sequence[Path], num_prompts: int, seed: int, held_out: Sequence[str] = ()) -> list[str]:
    """One prompt from each file: some whole lines from a random place.

    Args:
        roots: folders that are searched.
        held_out: beginnings of files that are left out.
        num_prompts: at most; one file gives one prompt.
        seed: of the choice of files and places.
    """
    draw = random.Random(seed)
    found: list[str] = []
    beginnings = {text.strip()[:COMPARED_CHARACTERS] for text in held_out}
    for text in choose(list(roots), sys.maxsize, seed):
        if len(found) == num_prompts:
            break
        if text.strip()[:COMPARED_CHARACTERS] in beginnings:
            continue
        start = text.find("\n", draw.randrange(len(text))) + 1
        length = draw.randint(LEAST_CHARACTERS, MOST_CHARACTERS)
        # To the end of a line, so that what is continued is code and not half a word.
        end = text.rfind("\n", start, start + length) + 1
        if end - start >= LEAST_CHARACTERS and text[start:end].strip():
            found.append(text[start:end])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Prompts of Python source from this machine.")
    parser.add_argument("--out", type=Path, required=True, help=".jsonl file to write")
    parser.add_argument("--num-prompts", type=int, default=1500, help="how many (default 1500)")
    parser.add_argument("--text", type=Path, help="folder to search (default: the sources of this Python)")
    parser.add_argument("--seed", type=int, default=1, help="of the choice (default 1)")
    args = parser.parse_args(argv)
    roots = [args.text] if args.text else [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    held_out = [prompt.text for prompt in read_prompts(HOLDOUT)]
    prompts = make_prompts(roots, args.num_prompts, args.seed, held_out)
    lines = [json.dumps({"id": f"python {number}", "prompt": text}) for number, text in enumerate(prompts)]
    args.out.write_text("\n".join(lines) + "\n")
    sys.stdout.write(f"{len(prompts)} prompts in {args.out}\n")
    return 0 if prompts else 1


if __name__ == "__main__":
    sys.exit(main())
