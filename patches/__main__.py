"""`python -m vllm_specbranch.patches`: write the register (this folder's `README.md`) or fingerprints to stdout."""

import sys
from collections.abc import Sequence

from vllm_specbranch.patching import fingerprint, render_readme
from vllm_specbranch.plugin import all_patches


def main(arguments: Sequence[str]) -> int:
    """Write the register, or with `--fingerprints` those of the installed vLLM (to verify another version)."""
    if arguments == ["--fingerprints"]:
        sys.stdout.writelines(f"{fingerprint(patch.symbol)}  {patch.symbol}\n" for patch in all_patches())
        return 0
    if arguments:
        sys.stderr.write("usage: python -m vllm_specbranch.patches [--fingerprints]\n")
        return 2
    sys.stdout.write(render_readme(all_patches()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
