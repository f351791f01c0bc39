"""One pair of models under study: its recordings, its draft model, and every policy replayed on them.

Owns what recordings are made of, what is loaded for them, and the choice of the best of several settings. What a replay is, is in
`replay`; what is calculated, in `replay_bounds`. Runs in the process of `tune` or a benchmark; loads torch and vLLM with the model.
"""

import copy
import dataclasses
import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_memory import RememberingModel
from vllm_specbranch.draft_model import DraftModel, DraftModelSettings
from vllm_specbranch.draft_steps import Model
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.measure_messages import RunResult
from vllm_specbranch.metrics import rates
from vllm_specbranch.replay import Recording, Replayed, Times, replay
from vllm_specbranch.replay_bounds import Agreement, agreement, best_sequential, every_outcome_guessed, sequential

# Tokens recorded beyond those that are replayed: the most that a last round can verify, and its own one.
TOKENS_BEYOND = 65
TOP_K = 8
SEQUENTIAL_GAMMAS = tuple(range(1, 17))
MAX_NUM_ROWS = 64
MAX_NUM_TOKENS = 512


def recordings_of(prompts: Sequence[Sequence[int]], run: RunResult, num_tokens: int) -> list[Recording]:
    """Recordings from a greedy run of plain vLLM.

    Args:
        prompts: token ids of each, as they were given to the run.
        run: of `num_tokens` tokens per prompt or more.
    """
    outputs = (request.token_ids for request in run.requests)
    return [Recording(tuple(ids), tuple(out), num_tokens) for ids, out in zip(prompts, outputs, strict=True)]


@dataclass(frozen=True, slots=True)
class Chosen:
    """A policy's row.

    Attributes:
        settings: of `speculative_config`, without the model.
    """

    settings: dict[str, object]
    result: Replayed


class Study:
    """See the top of this file.

    Args:
        model: the draft model.
        num_blocks, block_size: of its KV cache.
        recordings: to replay.
        batch_size: requests in the engine at the same time.
    """

    def __init__(
        self, model: Model, num_blocks: int, block_size: int, recordings: Sequence[Recording], batch_size: int = 1
    ) -> None:
        self.recordings = recordings
        self.batch_size = batch_size
        self._limits = Limits(MAX_NUM_ROWS, MAX_NUM_TOKENS, MAX_NUM_TOKENS // 2)
        self._model = RememberingModel(model, num_blocks, block_size, MAX_NUM_ROWS, MAX_NUM_TOKENS)
        self._kv = KVBlocks(num_blocks, block_size)
        self.agreements: list[Agreement] = agreement(self._model, self._kv, recordings, TOP_K)

    @classmethod
    def load(
        cls,
        draft: str,
        dtype: str,
        recordings: Sequence[Recording],
        batch_size: int = 1,
        *,
        num_threads: int = 1,
        enforce_eager: bool = False,
        kv_cache_bytes: int | None = None,
    ) -> "Study":
        """Load the draft model into this process.

        Args:
            draft: folder of the model.
            num_threads: of its forwards, on CPUs.
            enforce_eager: do not compile it: quicker start, slower replays.
            kv_cache_bytes: of the draft model; None for what the device has left.
        """
        import torch

        torch.set_num_threads(num_threads)
        longest = max(len(one.prompt) + len(one.tokens) for one in recordings)
        settings = DraftModelSettings(
            draft,
            longest + TOKENS_BEYOND,
            dtype,
            enforce_eager=enforce_eager,
            max_num_rows=MAX_NUM_ROWS,
            max_num_tokens=MAX_NUM_TOKENS,
            kv_cache_bytes=kv_cache_bytes,
        )
        model = DraftModel.load(settings)
        return cls(model, model.num_blocks, model.block_size, recordings, batch_size)

    def release(self) -> None:
        """Let go of the draft model and its memory; nothing can be replayed any more, what was found out stays."""
        import torch

        del self._model, self._kv
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def with_classes(self, classes: Sequence[Sequence[int]] | None) -> "Study":
        """The same study with a length head.

        Args:
            classes: per recording what the head says after each of its tokens; None for no head.
        """
        found = copy.copy(self)
        said = [()] * len(self.recordings) if classes is None else map(tuple, classes)
        found.recordings = [
            dataclasses.replace(one, classes=its) for one, its in zip(self.recordings, said, strict=True)
        ]
        return found

    def repeated(self, num_times: int) -> "Study":
        """The same study with its recordings one after the other so many times: for what is learned while serving."""
        found = copy.copy(self)
        found.recordings = [*self.recordings] * num_times
        found.agreements = [*self.agreements] * num_times
        return found

    def known_classes(self, gamma: int) -> list[list[int]]:
        """What a length head that is always right says after each token: whether none, some or all of `gamma` will be accepted."""
        found = []
        for ours in self.agreements:
            runs = [ours.run_length(start, gamma) for start in range(1, len(ours.ranks) + 1)]
            found.append([(run > 0) + (run >= gamma) for run in runs])
        return found

    def plain(self, times: Times) -> Replayed:
        """Plain decoding."""
        return sequential(self.recordings, self.agreements, 0, times, self.batch_size)

    def best_sequential(self, times: Times, gammas: Iterable[int] = SEQUENTIAL_GAMMAS) -> tuple[int, Replayed]:
        """vLLM's `draft_model` with its best number of draft tokens, as (that number, its row)."""
        return best_sequential(self.recordings, self.agreements, list(gammas), times, self.batch_size)

    def bound(self, times: Times, gamma: int) -> Replayed | None:
        """Every outcome guessed; None for several requests at a time."""
        if self.batch_size > 1:
            return None
        return every_outcome_guessed(self.recordings, self.agreements, gamma, times)

    def run(self, settings: Mapping[str, object], times: Times) -> Replayed:
        """Replay one policy.

        Args:
            settings: of `speculative_config`, without the model.
        """
        config = SpecBranchConfig.from_user({"model": "draft", **settings})
        return replay(config, self._model, self._kv, self.recordings, times, self.batch_size, self._limits)

    def best(self, alternatives: Iterable[Mapping[str, object]], times: Times) -> Chosen:
        """The quickest of several settings; the first one where they are alike."""
        rows = [Chosen(dict(one), self.run(one, times)) for one in alternatives]
        return min(rows, key=lambda row: row.result.time_s)


def as_json(result: Replayed, plain: Replayed) -> dict[str, Any]:
    """All that a replay counted."""
    # What was calculated, without a draft server, has no such rates.
    shares = rates({}, result.server) if result.server else {}
    return {
        "speed_up": plain.time_s / result.time_s,
        "tokens_per_s": result.tokens_per_s,
        "mean_acceptance_length": result.mean_acceptance_length,
        "num_rounds": result.num_rounds,
        "num_forwards": result.num_forwards,
        "num_tokens": result.num_tokens,
        "num_draft_tokens": result.num_draft_tokens,
        "num_accepted_tokens": result.num_accepted_tokens,
        "hit_rate": shares.get("hit_rate"),
        "rollback_rate": shares.get("rollback_rate"),
        "num_late_replies": result.num_late_replies,
        "time_s": result.time_s,
        "wait_s": result.wait_s,
        "server_counters": result.server,
    }
