"""`train-head` with an engine that makes rounds up: what it writes, how it goes on after an interruption, what it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.made_rounds import made_rounds
from vllm_specbranch import cli, train_head
from vllm_specbranch.head_data import Rounds, read_rounds, save_rounds
from vllm_specbranch.head_report import HEAD, SAVED
from vllm_specbranch.head_rules import confusion
from vllm_specbranch.head_training import split
from vllm_specbranch.length_head import load_head, model_identity
from vllm_specbranch.measure import MeasureError
from vllm_specbranch.measure_messages import EngineSpec, Record
from vllm_specbranch.shipped_pair import draft_path, head_path, target_path

# 5 layers of 2, and embeddings of 4 make the 12 features of made-up rounds with 4 layers.
CONFIG = {"vocab_size": 50, "hidden_size": 2, "num_hidden_layers": 5}
GAMMA = 4
PER_PROMPT = 2


class MadeUpEngine:
    """Stands in for `measure.Engine`: two rounds for each prompt and temperature."""

    starts: list[EngineSpec]
    runs: list[tuple[int, int, float, int | None]]
    # Runs until it fails, and until it records nothing.
    patience = 1000
    is_silent_from = 1000

    def __init__(self, spec: EngineSpec) -> None:
        self.starts.append(spec)

    def __enter__(self) -> "MadeUpEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait_until_ready(self) -> None:
        pass

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(range(len(text))) for text in texts]

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        batch_size: int,
        temperature: float,
        first_seed: int | None,
        record: Record,
    ) -> None:
        if len(self.runs) >= self.patience:
            raise MeasureError("the engine has had enough")
        assert all(len(one) + max_tokens + GAMMA < 1024 for one in prompts)
        self.runs.append((record.first_prompt, len(prompts), temperature, first_seed))
        count = PER_PROMPT * len(prompts)
        made = made_rounds(count, len(prompts), GAMMA, seed=record.first_prompt + int(100 * temperature))
        tensors = made.tensors()
        tensors["prompts"] += record.first_prompt
        tensors["temperatures"].fill_(temperature)
        rounds = Rounds(**tensors)
        save_rounds(Path(record.path), rounds.select(slice(0)) if len(self.runs) > self.is_silent_from else rounds)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[MadeUpEngine]:
    kind = type("Engine", (MadeUpEngine,), {"starts": [], "runs": []})
    monkeypatch.setattr(train_head, "Engine", kind)
    return kind


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    for name in ("target", "draft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {number} " + "x" * (2000 if number == 3 else 5) for number in range(150)))
    more = ["--num-speculative-tokens", str(GAMMA), "--epochs", "1", "--rounds", "400"]
    where = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"), "--out", str(tmp_path / "out")]
    return [*where, "--prompts", str(prompts), *more]


def trained(words: Sequence[str], monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, str]:
    said: list[str] = []
    monkeypatch.setattr(cli, "_write", said.append)
    code = cli.main(["train-head", *words, *more])
    return code, "".join(said)


def test_a_head_and_its_report(
    engine: type[MadeUpEngine], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = trained(words, monkeypatch)
    assert code == 0, text
    head, spec = load_head(tmp_path / "out")
    assert (spec.num_features, spec.layers, spec.gamma, spec.embedding_size) == (12, (2, 3, 4, 5), GAMMA, 4)
    assert spec.target_identity and spec.draft_identity and spec.target_identity != spec.draft_identity
    rounds = read_rounds(tmp_path / "out" / "rounds")
    assert len(rounds) == 128 * PER_PROMPT * 2 and sum(spec.label_counts) < len(rounds)
    assert len(head.classes(rounds.features[:5])) == 5
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"]["text"] in text and "orth using" in text
    greedy = report["figures"]["groups"]["greedy"]
    assert spec.validation["greedy_accuracy_head"] == pytest.approx(greedy["accuracy"][SAVED], abs=1e-4)
    assert spec.validation["greedy_accuracy_head_likeliest"] == pytest.approx(greedy["accuracy"][HEAD], abs=1e-4)
    # What the file says is what the figures are of.
    held_out = split(rounds, spec.seed).held_out
    said = torch.tensor(head.classes(held_out.features))
    assert confusion(held_out.labels, said) == report["figures"]["groups"]["all"]["confusion"][SAVED]
    assert (
        f'"stop_threshold": {spec.epsilon}' in text and '"policy": "specbranch"' in text and "Only 150 prompts" in text
    )
    assert "accepted 0: nothing" in text and "the most frequent class" in text
    assert (tmp_path / "out" / "report.png").is_file()


def test_chunks_are_uncut_and_awaited(
    engine: type[MadeUpEngine], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained(words, monkeypatch)[0] == 0
    (spec,) = engine.starts
    assert spec.speculative is not None
    wanted = {
        "stop_rule": "none",
        "on_miss": f"wait:{GAMMA}",
        "deterministic": True,
        "head_layers": 4,
        "max_branches": 1,
    }
    assert wanted.items() <= spec.speculative.items()
    assert spec.arguments["worker_extension_cls"] == "vllm_specbranch.recording_worker.RecordingExtension"


def test_it_stops_when_there_is_enough(
    engine: type[MadeUpEngine], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and sampled in turn; 150 prompts at 64 a shard, 2 rounds each: 128 rounds a shard."""
    assert trained(words, monkeypatch)[0] == 0
    assert [run[:3] for run in engine.runs] == [(0, 64, 0.0), (0, 64, 0.8), (64, 64, 0.0), (64, 64, 0.8)]
    assert [run[3] is None for run in engine.runs] == [True, False, True, False]


def test_an_interrupted_run_goes_on(
    engine: type[MadeUpEngine],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine.patience = 2
    assert trained(words, monkeypatch)[0] == 1
    assert "had enough" in capsys.readouterr().err
    assert not (tmp_path / "out" / "head.json").exists()
    engine.patience = 1000
    assert trained(words, monkeypatch)[0] == 0
    interrupted = (tmp_path / "out" / "head.safetensors").read_bytes()
    assert [run[:3] for run in engine.runs] == [(0, 64, 0.0), (0, 64, 0.8), (64, 64, 0.0), (64, 64, 0.8)]
    # All is there: no engine is started, and the same head comes out.
    assert trained(words, monkeypatch)[0] == 0
    assert len(engine.starts) == 2
    assert (tmp_path / "out" / "head.safetensors").read_bytes() == interrupted
    # And the same as without an interruption.
    assert trained(words, monkeypatch, "--out", str(tmp_path / "whole"))[0] == 0
    assert len(engine.starts) == 3
    assert (tmp_path / "whole" / "head.safetensors").read_bytes() == interrupted


def test_an_engine_that_records_nothing_ends_it(
    engine: type[MadeUpEngine],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A draft server that never comes up: no shard passes for collected, neither now nor at the next start."""
    engine.is_silent_from = 1
    assert trained(words, monkeypatch)[0] == 1
    assert "recorded no round" in capsys.readouterr().err
    assert len(engine.runs) == 2
    assert [path.name for path in sorted((tmp_path / "out" / "rounds").glob("*.safetensors"))] == [
        "rounds-00000.safetensors"
    ]
    engine.is_silent_from = 1000
    # One of an earlier version that was kept.
    save_rounds(tmp_path / "out" / "rounds" / "rounds-00001.safetensors", made_rounds(4).select(slice(0)))
    assert trained(words, monkeypatch)[0] == 0
    assert [run[:3] for run in engine.runs][2:] == [(0, 64, 0.8), (64, 64, 0.0), (64, 64, 0.8)]


def test_a_shard_that_was_lost_is_made_again(
    engine: type[MadeUpEngine], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained(words, monkeypatch)[0] == 0
    (tmp_path / "out" / "rounds" / "rounds-00001.safetensors").unlink()
    engine.runs.clear()
    assert trained(words, monkeypatch)[0] == 0
    assert engine.runs[0][:3] == (0, 64, 0.8)


def test_few_prompts_are_sampled_again(
    engine: type[MadeUpEngine], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained(words, monkeypatch, "--num-prompts", "20", "--rounds", "200")[0] == 0
    assert [run[2] for run in engine.runs] == [0.0, 0.8, 0.8, 0.8, 0.8]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layers", "6"], "1..5"),
        (["--temperatures", "3"], "0..2"),
        (["--rounds", "0"], "at least 1"),
        (["--c", "0"], "0.1"),
        (["--prompts", "missing.txt"], "can be read"),
        (["--draft", "nowhere"], "folder of a model"),
        (["--miss-cost", "-1"], "0..1000"),
        (["--num-prompts", "9"], "at least 10 prompts"),
        (["--max-model-len", "133"], "at least 134"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    engine: type[MadeUpEngine],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    said: str,
) -> None:
    try:
        code = trained(words, monkeypatch, *more)[0]
    except SystemExit as left:
        code = int(str(left.code))
    assert code == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not engine.starts, "not after hours of collecting"


def test_rounds_of_other_settings_are_refused(
    engine: type[MadeUpEngine], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained(words, monkeypatch)[0] == 0
    assert trained(words, monkeypatch, "--max-tokens", "64")[0] == 2
    error = capsys.readouterr().err
    assert "max_tokens 64" in error and "max_tokens 128" in error
    # More rounds of the same kind are no other settings.
    assert trained(words, monkeypatch, "--rounds", "600")[0] == 0


def test_the_target_must_say_its_sizes(
    engine: type[MadeUpEngine],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "target" / "config.json").write_text("{}")
    assert trained(words, monkeypatch)[0] == 2
    assert "num_hidden_layers" in capsys.readouterr().err
    nested: dict[str, Any] = {"text_config": CONFIG}
    (tmp_path / "target" / "config.json").write_text(json.dumps(nested))
    assert train_head.sizes_of(tmp_path / "target") == (2, 5)


def test_the_shipped_head_fits_the_shipped_pair() -> None:
    """And says of itself that it knows more than the most frequent class and a threshold do."""
    head, spec = load_head(head_path())
    spec.check_fits(
        head_path(),
        hidden_size=256,
        num_target_layers=6,
        gamma=8,
        target_identity=model_identity(target_path()),
        draft_identity=model_identity(draft_path()),
    )
    assert sum(spec.label_counts) > 30_000
    figures = spec.validation
    for kind in ("greedy", "sampled", "all"):
        rivals = [figures[f"{kind}_accuracy_{rule}"] for rule in ("majority", "one_threshold", "two_thresholds")]
        assert figures[f"{kind}_accuracy_head_likeliest"] > max(rivals)
        # As saved it seldom says 0: it was shifted to what the round model finds worth most, not to be right most often.
        assert figures[f"{kind}_accuracy_head_likeliest"] > figures[f"{kind}_accuracy_head"] > rivals[0]
    said = head.classes(head.mean + head.scale * torch.randn(500, 1280, generator=torch.Generator().manual_seed(0)))
    assert len(set(said)) > 1
