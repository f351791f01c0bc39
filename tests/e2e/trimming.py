"""As `generate`, with every block that could be taken back taken back at every step, and the block ids of both sides compared.

Run by the `run_engine` fixture as `python -m tests.e2e.trimming OUT`, in-process. Adds `trimming` to what `generate` writes.
There is no setting for this: it stands in for a pool that is always short.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from tests.e2e import generate
from vllm_specbranch import scheduler
from vllm_specbranch.reclaim import BlockReclaimer
from vllm_specbranch.worker import SpecBranchCPUWorker

# For trying what the comparison sees: trim, and do not tell the workers.
SILENT = "SPECBRANCH_TEST_TRIM_SILENTLY"

managers: list[KVCacheManager] = []
found = {"num_compared": 0, "num_different": 0, "num_blocks": 0, "num_rows_made_anew": 0}


class EagerReclaimer(BlockReclaimer):
    """Takes blocks back whether or not the pool is short, and lets drafts have them again at once."""

    def __init__(self, manager: KVCacheManager, *args: Any, **kwargs: Any) -> None:
        super().__init__(manager, *args, **kwargs)
        managers.append(manager)

    def make_room(self, running: Sequence[Request]) -> dict[str, int] | None:
        """See `BlockReclaimer.make_room`."""
        for request in running:
            self._take(request)
        found["num_blocks"] = self._counters.num_reclaimed_blocks
        self._is_pressed = False
        return super().make_room(running)

    def resend(self, scheduled: Any, requests: Mapping[str, Request]) -> None:
        """See `BlockReclaimer.resend`."""
        if os.environ.get(SILENT):
            return
        resumed = len(scheduled.resumed_req_ids)
        super().resend(scheduled, requests)
        found["num_rows_made_anew"] += len(scheduled.resumed_req_ids) - resumed


class ComparingWorker(SpecBranchCPUWorker):
    """Compares its block ids with the scheduler's after every step."""

    def execute_model(self, scheduler_output: Any) -> Any:
        """See `Worker.execute_model`."""
        result = super().execute_model(scheduler_output)
        (manager,) = managers
        batch = self.model_runner.input_batch
        (table,) = batch.block_table.block_tables
        for request_id in scheduler_output.num_scheduled_tokens:
            (wanted,) = manager.get_block_ids(request_id)
            row = batch.req_id_to_index[request_id]
            ids = table.get_numpy_array()[row, : table.num_blocks_per_row[row]].tolist()
            found["num_compared"] += 1
            found["num_different"] += ids != wanted or self.model_runner.requests[request_id].block_ids != (wanted,)
        return result


def main() -> None:
    scheduler.BlockReclaimer = EagerReclaimer  # type: ignore[misc]
    sys.modules[SpecBranchCPUWorker.__module__].SpecBranchCPUWorker = ComparingWorker  # type: ignore[attr-defined]
    generate.main()
    out = Path(sys.argv[1])
    out.write_text(json.dumps(json.loads(out.read_text()) | {"trimming": found}))


if __name__ == "__main__":
    main()
