"""What all benchmarks begin and end with: the file, the warning, the last line."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.result_file import begin, busy_warning, finish, require_counts, require_out
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.measure_messages import Emulation


@pytest.mark.parametrize(
    ("load", "num_cores", "is_busy"), [(1.0, 2, False), (1.1, 2, True), (0.6, 1, True), (31.0, 64, False)]
)
def test_a_machine_with_work_on_more_than_half_its_cores_is_busy(load: float, num_cores: int, is_busy: bool) -> None:
    assert bool(busy_warning(load, num_cores)) == is_busy


def test_the_warning_goes_to_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(tmp_path / "out.json")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(os, "getloadavg", lambda: (3.21, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    begin(tmp_path / "out.json")
    out, error = capsys.readouterr()
    assert not out and "load average 3.2 on 2 cores" in error


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    require_out(tmp_path / "new.json")
    for wrong in (tmp_path, tmp_path / "none" / "new.json"):
        with pytest.raises(ConfigError, match="--out"):
            require_out(wrong)


def test_counts_below_the_least_are_refused() -> None:
    require_counts({"--a": 1, "--b": 0}, least=0)
    with pytest.raises(ConfigError, match="--b=0"):
        require_counts({"--a": 1, "--b": 0})


def test_the_last_line_and_the_file_are_the_same(tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "out.json"
    written = finish({"how": Emulation(2.0, 1.0), "out": Path("/somewhere/x.json"), "all": (1, 2)}, out, said.append)
    assert said == [out.read_text()] and json.loads(said[0]) == written
    assert written["how"]["draft_step_ms"] == 1.0 and written["out"] == "x.json" and written["all"] == [1, 2]
