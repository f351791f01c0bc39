"""A proposer on the bench: a scripted line in place of the draft server, and steps as vLLM takes them.

The fixture `bench` is imported by name by the tests that use it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData

from vllm_specbranch import messages, proposer
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.proposer import Proposer
from vllm_specbranch.scheduler import SpecBranchSchedulerOutput
from vllm_specbranch.speculative_config import SpecBranchSpeculativeConfig


@dataclass
class Line:
    """What the proposer sees of a `DraftLink`."""

    is_up: bool = True
    generation: int = 1
    draft_max_model_len: int = 100
    sent: list[messages.EngineMessage] = field(default_factory=list)
    replies: list[messages.DraftBatch | None] = field(default_factory=list)
    accepts: bool = True
    is_closed: bool = False
    breaks: bool = False
    timeouts_ms: list[float] = field(default_factory=list)

    def poll(self) -> None:
        if self.breaks:
            raise RuntimeError("a bug of ours")

    def state(self) -> dict[str, bool]:
        return {"is_alive": True, "is_ready": self.is_up, "is_breaker_open": False}

    def send(self, message: messages.EngineMessage) -> bool:
        if self.breaks:
            raise RuntimeError("a bug of ours")
        if self.accepts:
            self.sent.append(message)
        return self.accepts

    def receive(self, round_number: int, timeout_ms: float) -> messages.DraftBatch | None:
        if self.breaks:
            raise RuntimeError("a bug of ours")
        self.timeouts_ms.append(timeout_ms)
        return self.replies.pop(0)

    def receive_patiently(self, round_number: int) -> messages.DraftBatch | None:
        return self.receive(round_number, float("inf"))

    def close(self) -> None:
        self.is_closed = True

    def take(self) -> list[messages.EngineMessage]:
        sent, self.sent = self.sent, []
        return sent


@dataclass
class Bench:
    proposer: Proposer
    line: Line
    sequences: dict[str, list[int]] = field(default_factory=dict)

    def begin(
        self,
        new: dict[str, list[int]] | None = None,
        finished: Sequence[str] = (),
        params: dict[str, SamplingParams] | None = None,
        **fields: Any,
    ) -> None:
        self.sequences |= new or {}
        requests = [
            SimpleNamespace(
                req_id=name,
                prompt_token_ids=list(tokens),
                prompt_embeds=None,
                mm_features=[],
                sampling_params=(params or {}).get(name),
            )
            for name, tokens in (new or {}).items()
        ]
        output = SpecBranchSchedulerOutput(
            scheduled_new_reqs=requests,  # type: ignore[arg-type]
            scheduled_cached_reqs=CachedRequestData.make_empty(),
            num_scheduled_tokens={},
            total_num_scheduled_tokens=1,
            scheduled_spec_decode_tokens=fields.pop("scheduled", {}),
            scheduled_encoder_inputs={},
            finished_req_ids=set(finished),
            free_encoder_mm_hashes=[],
            **fields,
        )
        self.proposer.begin_step(output)

    def propose(self, sampled: dict[str, list[int]]) -> list[list[int]]:
        names = list(sampled)
        self.proposer.attach(SimpleNamespace(input_batch=SimpleNamespace(req_ids=names)))  # type: ignore[arg-type]
        table = np.zeros((len(names), 200), np.int32)
        lengths = np.zeros(len(names), np.int32)
        for row, name in enumerate(names):
            self.sequences[name] = self.sequences[name] + sampled[name]
            lengths[row] = len(self.sequences[name])
            table[row, : lengths[row]] = self.sequences[name]
        return self.proposer.propose(list(sampled.values()), lengths, table)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    line = Line()
    monkeypatch.setattr(proposer, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(Proposer, "_open_link", lambda *_: line)
    speculative = SpecBranchSpeculativeConfig.__new__(SpecBranchSpeculativeConfig)
    speculative.specbranch = SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": 4})
    vllm_config = SimpleNamespace(
        speculative_config=speculative,
        model_config=SimpleNamespace(max_model_len=200, seed=0, get_vocab_size=lambda: 50),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
        parallel_config=SimpleNamespace(data_parallel_index=1),
    )
    return Bench(Proposer(vllm_config), line)


def reply(
    round_number: int, drafts: dict[str, tuple[int, list[int]]], unknown: Sequence[str] = ()
) -> messages.DraftBatch:
    return messages.DraftBatch(
        round_number,
        True,
        [messages.Draft(name, *draft, True, b"", b"", []) for name, draft in drafts.items()],
        list(unknown),
    )
