"""One step of the head on the target's side: who is asked for what, on which rank, and what comes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.heads import make_head
from tests.unit.test_head_features import Model, runner
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.length_head import load_head
from vllm_specbranch.metrics import EngineCounters
from vllm_specbranch.target_head import TargetHead

HIDDEN_SIZE = 256
NAMES = ["a", "b", "c"]
# b is an unfinished prefill; c had 2 draft tokens, of which 1 was accepted: rows 0 and 1 + 4 + 1 of 8.
SCHEDULED = {"a": 1, "b": 4, "c": 3}
NUM_DRAFTS = [0, 0, 2]
SAMPLED = [[7], [], [5, 6]]
ROWS = [0, 6]


class Embedding(Model):
    """Notes what it is asked for."""

    def __init__(self, size: int = HIDDEN_SIZE) -> None:
        self.size = size
        self.asked: list[list[int]] = []

    def embed_input_ids(self, ids: torch.Tensor) -> torch.Tensor:
        self.asked.append(ids.tolist())
        return ids.float().unsqueeze(1).expand(-1, self.size)


def states() -> list[torch.Tensor]:
    torch.manual_seed(3)
    return [torch.randn(8, HIDDEN_SIZE) for _ in range(2)]


def make(folder: Path, kind: str | None = "random", is_output_rank: bool = True) -> tuple[TargetHead, Embedding]:
    model = Embedding()
    path = make_head(folder / "head", kind, num_layers=2) if kind is not None else None
    head = TargetHead((5, 6), path, EngineCounters())
    head.load(runner(model), is_output_rank)
    return head, model


def take(head: TargetHead, is_output_rank: bool = True) -> None:
    head.take(SCHEDULED, NUM_DRAFTS, SAMPLED, states(), is_output_rank)


def expected_z() -> torch.Tensor:
    embeddings = torch.tensor([[7.0], [6.0]]).expand(-1, HIDDEN_SIZE)
    return torch.cat([*(one[ROWS] for one in states()), embeddings], dim=1)


def test_each_request_that_got_tokens_has_the_class_of_its_own_features(tmp_path: Path) -> None:
    head, model = make(tmp_path)
    take(head)
    seen: list[Any] = []
    found = head.classes(NAMES, SAMPLED, [11, 4, 23], lambda *given: seen.append(given))
    trained, _ = load_head(tmp_path / "head")
    assert found == dict(zip(["a", "c"], trained.classes(expected_z()), strict=True))
    ((names, num_tokens, z),) = seen
    assert (names, num_tokens) == (["a", "c"], [11, 23])
    assert torch.equal(z, expected_z())
    assert model.asked[1:] == [[7, 6]], "after the one at the start"
    assert head.classes(NAMES, SAMPLED, [11, 4, 23], None) == {}, "a step is used once"


@pytest.mark.parametrize("kind", ["0", "1", "2"])
def test_classes_are_counted(tmp_path: Path, kind: str) -> None:
    counters = EngineCounters()
    head = TargetHead((5, 6), make_head(tmp_path / "head", kind, num_layers=2), counters)
    head.load(runner(Embedding()), True)
    take(head)
    assert head.classes(NAMES, SAMPLED, [11, 4, 23], None) == {"a": int(kind), "c": int(kind)}
    assert [getattr(counters, f"num_head_classes_{one}") for one in range(3)] == [
        2 * (kind == str(n)) for n in range(3)
    ]
    assert counters.head_s > 0.0


def test_without_a_head_features_are_for_the_observer_alone(tmp_path: Path) -> None:
    head, _ = make(tmp_path, None)
    take(head)
    assert head.classes(NAMES, SAMPLED, [11, 4, 23], None) == {}
    take(head)
    seen: list[Any] = []
    assert head.classes(NAMES, SAMPLED, [11, 4, 23], lambda *given: seen.append(given)) == {}
    assert torch.equal(seen[0][2], expected_z())


def test_every_rank_looks_the_embedding_up_in_every_step(tmp_path: Path) -> None:
    """It is a collective: a rank that left it out would let the others wait for ever."""
    asked = []
    for is_output_rank in (True, False):
        head, model = make(tmp_path, "random", is_output_rank)
        take(head, is_output_rank)
        take(head, False)  # the output rank has given up in the meantime
        head.take({"b": 4}, None, [[]], states(), is_output_rank)
        asked.append(model.asked)
        assert head.classes(NAMES, SAMPLED, [11, 4, 23], None) == {}, "nothing is kept of it"
    assert asked[0] == asked[1] == [[0], [7, 6], [7, 6]]


def test_without_features_nothing_is_asked_of_the_target() -> None:
    model = Embedding()
    ours = runner(model)
    head = TargetHead((), None, EngineCounters())
    head.load(ours, True)
    take(head)
    assert head.classes(NAMES, SAMPLED, [11, 4, 23], None) == {}
    assert not model.asked and not ours.use_aux_hidden_state_outputs


def test_a_head_for_other_embeddings_is_refused(tmp_path: Path) -> None:
    folder = make_head(tmp_path / "head", "1", num_layers=2)
    head = TargetHead((5, 6), folder, EngineCounters())
    with pytest.raises(ConfigError, match="embeddings: 256 in training, 128 here"):
        head.load(runner(Embedding(128)), True)
