"""Measuring: the arithmetic on outputs, and the life of a child process (a stand-in without vLLM)."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch import measure
from vllm_specbranch.measure import Engine, MeasureError, running
from vllm_specbranch.measure_messages import Answer, Command, Encode, EngineSpec, Ready, RequestTrace, Run, RunResult
from vllm_specbranch.report import inter_token_s, number, output_gaps_s, percent, percentile, shorten, summarize, table

SPEC = EngineSpec("one", "nowhere", cores=(0,))


def trace(times: list[float], sizes: list[int]) -> RequestTrace:
    return RequestTrace(0.5, times, sizes, list(range(sum(sizes))), "text")


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_percentiles_interpolate() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.99) == pytest.approx(9.9)
    assert percentile([7.0], 0.99) == 7.0
    assert math.isnan(percentile([], 0.5))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_percentiles_lie_within_the_values(values: list[float], share: float) -> None:
    assert min(values) <= percentile(values, share) <= max(values)


def test_tokens_of_one_output_share_its_gap() -> None:
    one = trace([1.0, 1.4, 2.0], [2, 4, 1])
    assert output_gaps_s(one) == pytest.approx([0.4, 0.6])
    assert inter_token_s(one) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.6])


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(1, 9)), min_size=1, max_size=20))
def test_inter_token_latencies_add_up_to_the_time_after_the_first_output(outputs: list[tuple[float, int]]) -> None:
    times = [sum(gap for gap, _ in outputs[: index + 1]) for index in range(len(outputs))]
    one = trace(times, [size for _, size in outputs])
    latencies = inter_token_s(one)
    assert len(latencies) == sum(one.output_sizes[1:])
    assert sum(latencies) == pytest.approx(times[-1] - times[0])


def test_summary_of_two_runs() -> None:
    counters = {"num_rounds": 4.0, "num_accepted_tokens": 2.0, "wait_s": 0.2, "propose_s": 0.1}
    server = {"num_hits": 3.0, "num_misses": 1.0, "num_rollback_tokens": 1.0, "num_kept_tokens": 3.0}
    run = RunResult(2.0, 4, [trace([1.0, 1.5, 2.0], [1, 3, 1])], counters, server)
    both = summarize([run, run])
    assert (both.num_tokens, both.tokens_per_s, both.step_ms) == (10, 2.5, 500.0)
    assert both.mean_acceptance_length == 2.0  # four tokens in two outputs after the first
    assert (both.hit_rate, both.rollback_rate) == (0.75, 0.25)
    assert both.wait_ms == pytest.approx(50.0) and both.propose_ms == pytest.approx(25.0)
    assert both.first_token_ms == pytest.approx(500.0)


def test_summary_without_our_counters_leaves_our_numbers_out() -> None:
    plain = summarize([RunResult(1.0, 2, [trace([1.0, 2.0], [1, 1])])])
    assert (plain.hit_rate, plain.rollback_rate, plain.wait_ms) == (None, None, None)
    assert plain.mean_acceptance_length == 1.0


def test_table_lines_up() -> None:
    lines = table(["", "a", "bb"], [["x", "1", "2"], ["long", "100", "-"]]).splitlines()
    assert lines == ["        a  bb", "----  ---  --", "x       1   2", "long  100   -"]


def test_numbers_that_do_not_exist_are_dashes() -> None:
    assert (number(None), number(math.nan), number(1.234, 1, " ms")) == ("-", "-", "1.2 ms")
    assert (percent(None), percent(0.256)) == ("-", "26%")


def test_long_texts_are_shortened() -> None:
    assert shorten("a\n\nb\nc", 2) == "a\nb\n..."
    assert shorten("x" * 20, width=10) == "xxxxxxx..."
    assert shorten("a\nb", 2) == "a\nb"


# --- messages --------------------------------------------------------------------------------------------------------


def test_messages_survive_their_line() -> None:
    commands: list[Command] = [Encode(["a\nb"]), Run([[1, 2]], 8, 1, 0.0)]
    for command in commands:
        line = msgspec.json.encode(command)
        assert b"\n" not in line and msgspec.json.decode(line, type=Command) == command
    answer = RunResult(1.0, 2, [trace([1.0], [1])], num_drafts=3)
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer
    spec = EngineSpec("a", "m", (0, 1), {"method": "specbranch", "draft_cpu_cores": [1]})
    assert msgspec.json.decode(msgspec.json.encode(spec), type=EngineSpec) == spec


# --- the child's life -------------------------------------------------------------------------------------------------

# Stands for measure_child: reads the spec, then does what the test says with `answer` and `lines`.
STAND_IN = """
import os, sys, time
answers = os.fdopen(int(sys.argv[1]), "wb", buffering=0)
lines = sys.stdin.buffer
spec = lines.readline()
def answer(text):
    answers.write(text.encode() + b"\\n")
print("words of the engine", flush=True)
"""

Start = Callable[[str], None]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Start:
    def use(script: str) -> None:
        original = subprocess.Popen

        def popen(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
            return original([sys.executable, "-c", STAND_IN + script, command[-1]], **options)  # type: ignore[call-overload,no-any-return]

        monkeypatch.setattr(measure.subprocess, "Popen", popen)

    return use


READY = """answer('{"type":"Stage","text":"loading"}')\nanswer('{"type":"Ready","facts":{"n":1}}')\n"""


def test_engine_starts_answers_and_ends(stand_in: Start) -> None:
    stand_in(READY + """lines.readline()\nanswer('{"type":"Encoded","token_ids":[[1]]}')\nlines.readline()""")
    stages: list[str] = []
    with Engine(SPEC) as engine:
        engine.wait_until_ready(lambda engines: stages.append(engines[0].stage))
        assert stages[-1] == "ready" and engine.facts == {"n": 1}
        assert engine.encode(["x"]) == [[1]]
        pid, log = engine.pid, engine.log_path
        assert "words of the engine" in log.read_text()
    assert pid is not None and not psutil.pid_exists(pid)
    assert not log.exists()
    engine.close()


def test_death_shows_the_log(stand_in: Start) -> None:
    stand_in("sys.exit(3)")
    with (
        pytest.raises(MeasureError, match=r"'one' ended with status 3 while starting Python.*\n  words of the engine"),
        running([SPEC]),
    ):
        pass


def test_failure_is_told_in_one_line(stand_in: Start) -> None:
    stand_in("""answer('{"type":"Failed","reason":"no such model"}')\ntime.sleep(60)""")
    with pytest.raises(MeasureError) as caught, running([SPEC]):
        pass
    assert str(caught.value) == "the engine 'one' failed while starting Python: no such model"


def test_slow_start_is_given_up(stand_in: Start) -> None:
    stand_in("time.sleep(60)")
    with Engine(SPEC, start_timeout_s=0.2) as engine, pytest.raises(MeasureError, match="not ready after 0 s"):
        engine.wait_until_ready()


def test_late_answer_is_given_up(stand_in: Start) -> None:
    stand_in(READY + "lines.readline()\ntime.sleep(60)")
    engine = Engine(SPEC, answer_timeout_s=0.2)
    engine.start()
    engine.wait_until_ready()
    with pytest.raises(MeasureError, match="did not answer within 0 s"):
        engine.encode(["x"])
    assert engine.pid is not None
    psutil.Process(engine.pid).kill()
    engine.close()


def test_child_ends_with_its_parent(tmp_path: Path) -> None:
    """The real child, killed off by the end of its standard input while it imports vLLM."""
    read_end, write_end = measure.os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "vllm_specbranch.measure_child", str(write_end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[write_end],
    )
    measure.os.close(write_end)
    assert child.stdin is not None
    child.stdin.write(msgspec.json.encode(SPEC) + b"\n")
    child.stdin.flush()
    assert b"importing vLLM" in measure.os.read(read_end, 1000)
    child.stdin.close()
    assert child.wait(30) == 0
    measure.os.close(read_end)


def test_environment_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    monkeypatch.setenv("LD_PRELOAD", "/mine.so")
    environment = measure._environment(EngineSpec("a", "m", (2, 3)))
    assert environment["OMP_NUM_THREADS"] == "2" and environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["LD_PRELOAD"].startswith("/mine.so")
    assert "VLLM_PLUGINS" not in environment
    assert measure._environment(EngineSpec("a", "m", plugins=False))["VLLM_PLUGINS"] == ""
    gpu = measure._environment(EngineSpec("a", "m", visible_devices="1"))
    assert gpu["CUDA_VISIBLE_DEVICES"] == "1" and gpu["LD_PRELOAD"] == "/mine.so"


def test_ready_is_an_answer() -> None:
    assert msgspec.json.decode(b'{"type":"Ready","facts":{}}', type=Answer) == Ready({})
