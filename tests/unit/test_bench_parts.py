"""What each part is worth: the engines, their order, what is compared and what is written, on made-up runs, without an engine."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks import bench_parts
from tests.decode_results import made_run
from tests.made_recordings import BLOCK_SIZE, NUM_BLOCKS, fake, recordings_of
from vllm_specbranch.draft_ablations import PARTS
from vllm_specbranch.measure_messages import EngineSpec, Forward, RunResult
from vllm_specbranch.replay import Recording
from vllm_specbranch.replay_study import Study

AGREES = [[True, True, False] * 5]
WORDS = ("--num-prompts", "1", "--max-tokens", "15", "--repetitions", "4")


def recordings() -> list[Recording]:
    return recordings_of(AGREES)


class FakeEngine:
    """Answers with what plain vLLM would write, the whole a little faster than the others."""

    def __init__(self, spec: EngineSpec, asked: list[str]) -> None:
        self.spec = spec
        self.asked = asked

    def run(self, prompts: Any, max_tokens: int, batch_size: int, emulation: object) -> RunResult:
        assert (batch_size, max_tokens) == (1, 15) and self.spec.observe and emulation is not None
        self.asked.append(self.spec.name)
        run = made_run(0.6 if self.spec.name == "best_first" else 0.75, is_ours=self.spec.speculative is not None)
        (recording,) = recordings()
        request = replace(run.requests[0], token_ids=list(recording.tokens))
        late = [Forward(one.start_s, one.start_s + 1.0, 1) for one in run.target_forwards]
        return replace(
            run, requests=[request], target_forwards=late if "calibration" in self.spec.name else run.target_forwards
        )


Ran = tuple[int, list[str], dict[str, Any], str]


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the benchmark; returns its code, the engines in the order asked, what it wrote, and its text."""
    asked: list[str] = []

    @contextlib.contextmanager
    def running(specs: Sequence[EngineSpec], at_once: int) -> Iterator[list[FakeEngine]]:
        del at_once
        yield [FakeEngine(spec, asked) for spec in specs]

    model, _ = fake()
    monkeypatch.setattr(bench_parts, "running", running)
    monkeypatch.setattr(bench_parts, "record", lambda *_: ([list(one.prompt) for one in recordings()], recordings()))
    monkeypatch.setattr(bench_parts.Study, "load", lambda *_: Study(model, NUM_BLOCKS, BLOCK_SIZE, recordings()))
    monkeypatch.setattr(bench_parts, "transformers_gaps", lambda _: lambda prefixes: [0.5] * len(prefixes))

    def run(*words: str) -> Ran:
        out = tmp_path / "out.json"
        code = bench_parts.main(["--out", str(out), *WORDS, *words])
        return code, asked, json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_every_case_is_one_of_settings_and_parts_that_there_are() -> None:
    cases = bench_parts.cases()
    assert cases[0].name == bench_parts.WHOLE and cases[-1].settings is None
    assert all(part in PARTS for case in cases for part in case.without)
    assert len({case.name for case in cases}) == len(cases)


def test_predicted_and_measured_stand_side_by_side(ran: Callable[..., Ran]) -> None:
    code, _, written, text = ran()
    assert code == 0 and json.loads(text.splitlines()[-1]) == written
    whole, *others = written["lines"]
    assert (whole["predicted"], whole["measured"], whole["interval"]) == (1.0, 1.0, [1.0, 1.0])
    assert all(line["measured"] == pytest.approx(0.8) and len(line["tokens_per_s"]) == 4 for line in others)
    assert all(line["token_ids"] == "identical" for line in written["lines"])
    pearl, plain = written["lines"][-2:]
    assert plain["predicted"] < pearl["predicted"] <= 1.0
    assert plain["wait_ms"] is None and plain["hit_rate"] is None and pearl["hit_rate"] == pytest.approx(0.7)
    assert written["options"]["emulate"] == "20:4" and written["emulation"]["draft_step_ms"] == 4.0


def test_each_repetition_has_an_order_of_its_own_and_all_engines(ran: Callable[..., Ran]) -> None:
    _, asked, _, _ = ran()
    count = len(bench_parts.cases())
    rounds = [asked[first : first + count] for first in range(0, len(asked), count)]
    assert len(rounds) == 1 + 4 and all(set(one) == set(rounds[0]) and len(set(one)) == count for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_forwards_that_took_too_long_are_shown(ran: Callable[..., Ran]) -> None:
    _, _, written, text = ran()
    shares = {line["case"]: line["overrun_share"] for line in written["lines"]}
    assert shares["no calibration of the draft's confidence"] == 1.0
    # The made-up forwards of the others last less than 20 ms.
    assert {share for name, share in shares.items() if "calibration" not in name} == {0.0}
    assert "forwards in no calibration of the draft's confidence more than 5%" in text


@pytest.mark.parametrize(("gap", "code", "word"), [(1e-6, 0, "ties"), (0.5, 1, "DIFFERENT")])
def test_token_ids_are_compared_with_those_of_plain_vllm(
    gap: float, code: int, word: str, ran: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FakeEngine.run

    def wrong(self: FakeEngine, *args: Any, **keys: Any) -> RunResult:
        run = right(self, *args, **keys)
        if "pearl" in self.spec.name and self.asked.count(self.spec.name) == 3:
            run.requests[0].token_ids[7] += 1
        return run

    monkeypatch.setattr(FakeEngine, "run", wrong)
    monkeypatch.setattr(bench_parts, "transformers_gaps", lambda _: lambda prefixes: [gap] * len(prefixes))
    found, _, written, text = ran()
    assert found == code
    lines = {line["case"]: line for line in written["lines"]}
    (difference,) = lines["neither branches nor waits (pearl)"]["differences"]
    assert difference["position"] == 7 and difference["gap"] == gap
    assert lines["neither branches nor waits (pearl)"]["token_ids"] == word and word in text
    assert lines["best_first"]["token_ids"] == "identical"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--out", "/none/out.json"], "--out"),
        (["--target", "/none"], "--target"),
        (["--draft", "/none"], "--draft"),
        (["--prompts", "/none.txt"], "--prompts"),
        (["--target-cores", "x"], "--target-cores"),
        (["--draft-cores", "4096"], "--draft-cores"),
        (["--emulate", "none"], "--emulate"),
        (["--num-prompts", "0"], "--num-prompts"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--repetitions", "0"], "--repetitions"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_parts.main(["--out", str(tmp_path / "out.json"), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
