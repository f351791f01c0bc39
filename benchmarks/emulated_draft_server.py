"""`vllm-specbranch draft-server` whose draft steps are stretched to a given time, so that it behaves like one on an accelerator.

Owns nothing but the wrap; all else is the command's. For benchmarks, which start it as

    python benchmarks/emulated_draft_server.py STEP_MS:TOKEN_COST --model DRAFT --bind tcp://HOST:PORT ...
"""

import sys
from collections.abc import Sequence
from pathlib import Path

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from vllm_specbranch import cli
from vllm_specbranch.emulation import Observer, Pace
from vllm_specbranch.measure_messages import Forward
from vllm_specbranch.observed_draft_main import observe


class _Nowhere:
    """Notes nothing."""

    def append(self, forward: Forward) -> None:
        """Forget it."""


def main(argv: Sequence[str]) -> int:
    """Stretch, then serve as ever; returns the command's exit code."""
    step_ms, _, token_cost = argv[0].partition(":")
    pace = Pace(float(step_ms), float(token_cost))
    observe(Observer(lambda: pace, _Nowhere()))
    return cli.main(["draft-server", *argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
