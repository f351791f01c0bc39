"""Entry of a draft server whose forwards are noted, and stretched to a given pace. For benchmarks only.

Owns nothing but the wrap around `DraftModel.forward`; all else is `draft_main`. Started in its place by an observed engine (see
`observed_engine`), as `python -m vllm_specbranch.observed_draft_main PACE_FILE RECORD_FILE [PART ...]`, the parts being those of
`draft_ablations` to do without; not for people.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_specbranch import draft_main
from vllm_specbranch.draft_ablations import without
from vllm_specbranch.draft_model import DraftModel, Row
from vllm_specbranch.emulation import Observer, PaceFile, RecordFile
from vllm_specbranch.kv_blocks import BlockCopy
from vllm_specbranch.token_tree import Candidates


def observe(observer: Observer) -> None:
    """Have `observer` note and stretch every forward of every draft model of this process; safe from any thread."""
    forward = DraftModel.forward

    def observed(self: DraftModel, rows: Sequence[Row], copies: Sequence[BlockCopy], top_k: int) -> list[Candidates]:
        started_s = time.perf_counter()
        candidates = forward(self, rows, copies, top_k)
        observer.finish(started_s, sum(len(row.token_ids) for row in rows))
        return candidates

    DraftModel.forward = observed  # type: ignore[method-assign]


def main() -> None:
    """Observe, then serve as ever."""
    pace, records = (Path(argument) for argument in sys.argv[1:3])
    observe(Observer(PaceFile(pace).read, RecordFile(records)))
    with without(sys.argv[3:]):
        draft_main.main()


if __name__ == "__main__":
    main()
