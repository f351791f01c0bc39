"""The draft server's process as an engine or Ray starts it, with a fake model and everything else real.

Run as `python -m tests.fake_draft_main`, as `vllm_specbranch.draft_main` is.
"""

from typing import Any

from tests.draft_engine import BLOCK_SIZE
from tests.fakes import FakeDraftModel
from vllm_specbranch import draft_main

NUM_BLOCKS = 400


class Model(FakeDraftModel):
    num_blocks = NUM_BLOCKS

    @classmethod
    def load(cls, _: Any) -> "Model":
        return cls(NUM_BLOCKS, BLOCK_SIZE)


if __name__ == "__main__":
    draft_main.DraftModel = Model  # type: ignore[misc, assignment]
    draft_main.main()
