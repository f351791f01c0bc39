"""What `train-head` adds to the target's workers (vLLM's `worker_extension_cls`): calls that start and save a recording of rounds.

Owns no logic: the join is in `head_recorder`. Runs in every target worker; only the output rank has something to record.
"""

from pathlib import Path
from typing import Any

import torch

from vllm_specbranch.head_recorder import RoundRecorder
from vllm_specbranch.proposer import Proposer


class RecordingExtension:
    """A base class that vLLM adds to the worker's; called by `collective_rpc`."""

    model_runner: Any
    round_recorder: RoundRecorder | None = None

    def start_recording(self, gamma: int) -> None:
        """Record from now on, and forget what was recorded before.

        Args:
            gamma: draft tokens of a full chunk.
        """
        proposer: Proposer = self.model_runner.drafter
        recorder = self.round_recorder = RoundRecorder(gamma, self.model_runner.dtype)

        def observe(request_ids: list[str], num_tokens: list[int], features: torch.Tensor) -> None:
            verified = [proposer.scorer.num_scheduled(one) for one in request_ids]
            recorder.observe_features(request_ids, num_tokens, features, verified)

        proposer.feature_observer = observe
        proposer.draft_observer = recorder.observe_draft

    def save_recording(self, path: str, first_prompt: int, temperature: float) -> int:
        """End the recording and write a shard, on the output rank; returns how many rounds were recorded.

        Args:
            path: of the shard.
            first_prompt, temperature: see `RoundRecorder.rounds`.
        """
        proposer: Proposer = self.model_runner.drafter
        proposer.feature_observer = proposer.draft_observer = None
        recorder, self.round_recorder = self.round_recorder, None
        if recorder is None or not recorder.has_seen_any:
            return 0
        return recorder.save(Path(path), first_prompt, temperature)
