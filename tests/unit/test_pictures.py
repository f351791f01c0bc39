"""Pictures of made-up results: each is drawn, says whether its times are emulated, and refuses what it cannot read."""

import json
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import picture_timeline, pictures
from benchmarks.decode_report import measured_as_json
from tests.decode_results import made_measured
from vllm_specbranch import picture_style
from vllm_specbranch.measure_messages import Emulation
from vllm_specbranch.picture_style import reader_name, spread_out

FAST = Emulation(20.0, 4.0)


def made_result(*conditions: tuple[int, Emulation | None]) -> dict[str, Any]:
    result = {
        "schema_version": 2,
        "git_sha": "0123456789",
        "dirty": False,
        "versions": {"vllm": "0.32.0"},
        "machine": {"gpus": [], "cpu": "a CPU"},
        "device": "cpu",
        "conditions": [measured_as_json(made_measured(*one)) for one in conditions],
    }
    written: dict[str, Any] = json.loads(json.dumps(result))
    return written


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_every_picture_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(made_result((1, None), (4, None), (1, FAST))))
    lines: list[str] = []
    assert pictures.main([str(path), "--out", str(tmp_path / "new" / "folder")], write=lines.append) == 0
    drawn = [Path(line.strip()) for line in lines]
    assert sorted(one.name for one in drawn) == [
        "acceptance-python_holdout-batch1-emulated-20-4-0.02.png",
        "acceptance-python_holdout-batch1-real.png",
        "acceptance-python_holdout-batch4-real.png",
        "batches-python_holdout-real.png",
        "parts-python_holdout-batch1-emulated-20-4-0.02.png",
        "parts-python_holdout-batch1-real.png",
        "parts-python_holdout-batch4-real.png",
        "speed-python_holdout-batch1-emulated-20-4-0.02.png",
        "speed-python_holdout-batch1-real.png",
        "speed-python_holdout-batch4-real.png",
        "timeline-python_holdout-batch1-emulated-20-4-0.02.png",
        "timeline-python_holdout-batch1-real.png",
    ]
    for one in drawn:
        width, height = size_of(one)
        assert width >= 1000 and height >= 500 and one.stat().st_size > 10_000


@pytest.fixture
def titles(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is written around each picture, by its kind; nothing is saved."""
    found: dict[str, str] = {}

    def keep(figure: Any, path: Path) -> Path:
        found[path.name.split("-")[0]] = " ".join(text.get_text() for text in figure.texts)
        picture_style.plot().close(figure)
        return path

    for module in (pictures, picture_timeline):
        monkeypatch.setattr(module, "save", keep)
    return found


@pytest.mark.parametrize("emulation", [None, FAST])
def test_titles_say_what_is_emulated(emulation: Emulation | None, tmp_path: Path, titles: dict[str, str]) -> None:
    pictures.draw_all(made_result((1, emulation), (4, emulation)), tmp_path)
    assert set(titles) == {"speed", "parts", "acceptance", "batches", "timeline"}
    for title in titles.values():
        assert ("(emulated)" in title) == ("emulated durations: target 20 ms" in title) == (emulation is not None)
        assert "real CPU cores" in title or emulation is not None
        assert "commit 0123456" in title and "a CPU" in title


@pytest.mark.parametrize(("share", "said"), [(0.05, False), (0.06, True)])
def test_every_picture_says_when_too_many_forwards_took_too_long(
    share: float, said: bool, tmp_path: Path, titles: dict[str, str]
) -> None:
    result = made_result((1, FAST), (4, FAST))
    for condition in result["conditions"]:
        for row in condition["rows"]:
            row["overrun_share"] = share if row["name"] == "pearl" else 0.0
    pictures.draw_all(result, tmp_path)
    assert len(titles) == 5
    for title in titles.values():
        assert ("Doubtful: up to 6% of the forwards took longer than emulated (pearl)" in title) == said


def test_forwards_that_were_not_observed_make_no_timeline(tmp_path: Path) -> None:
    result = made_result((1, None))
    for row in result["conditions"][0]["rows"]:
        row["timeline"]["target_forwards"] = []
        row["drafted_by_position"] = []
        row["step_parts"]["target_ms"] = None
    assert [path.name for path in pictures.draw_all(result, tmp_path)] == ["speed-python_holdout-batch1-real.png"]


def test_only_what_was_verified_often_enough_is_shown() -> None:
    row = {"accepted_by_position": [30, 20, 3], "drafted_by_position": [40, 40, 5]}
    assert pictures._shares(row) == [0.75, 0.5]
    assert pictures._shares({"accepted_by_position": [], "drafted_by_position": []}) == []


def test_names_for_readers() -> None:
    def name(name: str, group: str) -> str:
        return reader_name({"name": name, "group": group})

    assert name("plain on 2 cores", "plain") == "plain vLLM"
    assert name("plain, async off", "async_off") == "plain vLLM, async off"
    assert name("draft_model 4 on 2 cores", "draft_model") == "vLLM draft_model, 4 tokens"
    assert name("specbranch, no cut", "ablations") == "specbranch, no cut"


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), max_size=10), st.floats(0.01, 1.0))
def test_labels_are_moved_apart_and_keep_their_order(places: list[float], least: float) -> None:
    moved = spread_out(places, least)
    assert len(moved) == len(places)
    order = sorted(range(len(places)), key=lambda index: places[index])
    for below, above in pairwise(order):
        assert moved[above] - moved[below] >= least - 1e-9
    if all(places[above] - places[below] > least for below, above in pairwise(order)):
        assert moved == pytest.approx(places)


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "No such file"), ("{", "bench_decode"), ("[]", "schema version 2"), ('{"schema_version": 1}', "not 1")],
)
def test_what_is_no_result_is_one_line_and_exit_code_2(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    assert pictures.main([str(path), "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line and str(path) in line
