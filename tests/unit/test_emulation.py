"""Emulated devices: how long forwards last, what is noted of them, and how an engine and its draft server are observed."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specbranch import draft_main, measure_child, observed_draft_main, placement
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_model import DraftModel, DraftModelSettings, Row
from vllm_specbranch.emulation import Observer, Pace, PaceFile, RecordFile, hook_module, sleep_until, within
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.lineup import Lineup, place
from vllm_specbranch.measure import Engine
from vllm_specbranch.measure_messages import Answer, Command, Emulation, EngineSpec, Forward, Run, RunResult
from vllm_specbranch.observed_engine import ObservedEngine
from vllm_specbranch.token_tree import Candidates

# A busy machine ends many sleeps milliseconds late, whoever sleeps; what a sleep can do shows in those that it leaves alone.
LATE_S = 0.5e-3
LEAST_IN_TIME = 3
PACE = Pace(8.0, 0.5)


def quickest_s(call: Callable[[], None]) -> float:
    """Of several calls: what a noisy machine does not lengthen."""
    spans = []
    for _ in range(5):
        started_s = time.perf_counter()
        call()
        spans.append(time.perf_counter() - started_s)
    return min(spans)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Of the pace and of the records."""
    return tmp_path / "pace", tmp_path / "records"


# --- durations -------------------------------------------------------------------------------------------------------


def test_duration_grows_with_the_tokens() -> None:
    assert Pace(20.0).duration_s(1) == Pace(20.0).duration_s(500) == pytest.approx(0.020)
    assert [Pace(4.0, 0.25).duration_s(n) for n in (1, 2, 5)] == pytest.approx([0.004, 0.005, 0.008])
    assert Pace().duration_s(100) == 0.0


def test_overruns_are_forwards_clearly_longer_than_emulated() -> None:
    forwards = [Forward(1.0, 1.0 + seconds, 1) for seconds in (0.0080, 0.0087, 0.0089)]
    assert PACE.num_overruns(forwards) == 1
    assert PACE.num_overruns([Forward(0.0, 0.0130, 2), Forward(0.0, 0.0133, 2)]) == 1, "two tokens may last 12 ms"
    assert Pace().num_overruns(forwards) == 0


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1), st.integers(1, 9)), max_size=20))
def test_forwards_of_a_run_are_those_that_began_in_it(spans: list[tuple[float, float, int]]) -> None:
    forwards = [Forward(start, start + length, tokens) for start, length, tokens in spans]
    found = within(forwards, 2.0, 5.0)
    assert len(found) == sum(2.0 <= start < 5.0 for start, _, _ in spans)
    assert [one.start_s for one in found] == sorted(one.start_s for one in found)
    for one in found:
        assert any(
            (one.start_s, one.end_s, one.num_tokens) == (other.start_s - 2.0, other.end_s - 2.0, other.num_tokens)
            for other in forwards
        )


# --- sleeping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_s", [0.0002, 0.004])
def test_sleep_ends_in_time_and_never_early(length_s: float) -> None:
    late = []
    for _ in range(25):
        deadline_s = time.perf_counter() + length_s
        sleep_until(deadline_s)
        late.append(time.perf_counter() - deadline_s)
    assert min(late) >= 0.0
    assert sum(one < LATE_S for one in late) >= LEAST_IN_TIME, late


def test_sleep_that_is_over_returns_at_once() -> None:
    assert quickest_s(lambda: sleep_until(time.perf_counter() - 1.0)) < 0.0005


def test_sleep_leaves_the_core_free() -> None:
    used_s, started_s = time.thread_time(), time.perf_counter()
    for _ in range(20):
        sleep_until(time.perf_counter() + 0.005)
    assert time.thread_time() - used_s < 0.25 * (time.perf_counter() - started_s)


def test_observer_stretches_and_notes() -> None:
    noted: list[Forward] = []
    observer = Observer(lambda: PACE, noted)
    began_s = time.perf_counter()
    observer.finish(began_s, 3)
    (one,) = noted
    assert (one.start_s, one.num_tokens) == (began_s, 3)
    assert one.end_s - one.start_s >= 0.016
    assert quickest_s(lambda: observer.finish(time.perf_counter() - 1.0, 3)) < 0.008, "too long already: not stretched"
    assert all(one.end_s - one.start_s >= 1.0 for one in noted[1:])


# --- files between processes -----------------------------------------------------------------------------------------


def test_pace_changes_while_it_is_read(files: tuple[Path, Path]) -> None:
    writer = PaceFile(files[0])
    reader = PaceFile(files[0])
    assert reader.read() == Pace(), "nothing written yet"
    for pace in (PACE, Pace(1 / 3, 0.02), Pace()):
        writer.write(pace)
        assert reader.read() == pace
    writer.write(PACE)
    assert PaceFile(files[0]).read() == PACE, "opening it anew (a restarted server) keeps what is in it"


def test_pace_and_records_cross_processes(files: tuple[Path, Path]) -> None:
    PaceFile(files[0]).write(PACE)
    records = RecordFile(files[1])
    records.append(Forward(0.5, 0.75, 1))
    script = (
        "import sys, time; from pathlib import Path\n"
        "from vllm_specbranch.emulation import Observer, PaceFile, RecordFile\n"
        "observer = Observer(PaceFile(Path(sys.argv[1])).read, RecordFile(Path(sys.argv[2])))\n"
        "observer.finish(time.perf_counter(), 2)\n"
    )
    before_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", script, *map(str, files)], check=True, timeout=60)
    first, second = records.take()
    assert first == Forward(0.5, 0.75, 1)
    assert second.num_tokens == 2 and second.end_s - second.start_s >= 0.012
    assert before_s < second.start_s < second.end_s < time.perf_counter(), "one clock for all processes"


def test_records_are_taken_once_and_whole(files: tuple[Path, Path]) -> None:
    records = RecordFile(files[1])
    records.append(Forward(1.0, 2.0, 3))
    assert records.take() == [Forward(1.0, 2.0, 3)]
    assert records.take() == []
    whole = files[1].read_bytes()
    with files[1].open("ab") as half:
        half.write(whole[:10])
        half.flush()
        assert records.take() == []
        half.write(whole[10:])
    assert records.take() == [Forward(1.0, 2.0, 3)]


def test_records_of_several_threads_do_not_mix(files: tuple[Path, Path]) -> None:
    records = RecordFile(files[1])
    threads = [
        threading.Thread(target=lambda n=n: [records.append(Forward(n, i, n)) for i in range(500)])  # type: ignore[misc]
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = records.take()
    assert len(taken) == 2000
    for n in range(4):
        assert [one.end_s for one in taken if one.num_tokens == n] == list(range(500))


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_note_every_forward_of_a_module() -> None:
    torch = pytest.importorskip("torch")

    class Tiny(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(1, 1)

        def forward(self, input_ids: Any, positions: Any, intermediate_tensors: Any = None) -> Any:
            time.sleep(0.002)
            return self.inner(positions.reshape(-1, 1).float())

    module, noted = Tiny(), list[Forward]()
    expected = module(torch.zeros(7), torch.arange(7))
    hook_module(module, Observer(lambda: Pace(10.0), noted))
    before_s = time.perf_counter()
    assert torch.equal(module(torch.zeros(7), torch.arange(7)), expected)
    assert time.perf_counter() - before_s >= 0.010, "the caller is held up"
    module(input_ids=None, positions=torch.zeros(3, 5, dtype=torch.int64), intermediate_tensors=None)
    assert [one.num_tokens for one in noted] == [7, 5]
    assert all(one.end_s - one.start_s >= 0.010 for one in noted)
    assert before_s <= noted[0].start_s and noted[0].end_s <= noted[1].start_s


# --- the draft server ------------------------------------------------------------------------------------------------


class FakeRuntime:
    vocab_size, max_model_len, num_blocks, block_size = 10, 64, 8, 4
    dtype, path = "float32", "draft"

    def forward(self, rows: list[Row], copies: list[Any], top_k: int) -> tuple[list[list[int]], list[list[float]]]:
        return [[row.token_ids[-1]] for row in rows], [[0.5] for _ in rows]


@pytest.fixture
def draft_model(monkeypatch: pytest.MonkeyPatch) -> DraftModel:
    """A model whose class gets its own forward back after the test."""
    monkeypatch.setattr(DraftModel, "forward", DraftModel.forward)
    return DraftModel(FakeRuntime())  # type: ignore[arg-type]


ROWS = [Row([1, 2, 3], 0, [0]), Row([4], 0, [1])]
CANDIDATES = [Candidates((3,), (0.5,)), Candidates((4,), (0.5,))]


def test_draft_forwards_are_stretched_in_any_thread(draft_model: DraftModel) -> None:
    noted: list[Forward] = []
    observed_draft_main.observe(Observer(lambda: PACE, noted))
    threads = [threading.Thread(target=draft_model.forward, args=(ROWS, [], 1)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert draft_model.forward(rows=ROWS, copies=[], top_k=1) == CANDIDATES
    for thread in threads:
        thread.join()
    assert [one.num_tokens for one in noted] == [4, 4, 4]
    assert all(one.end_s - one.start_s >= 0.020 for one in noted)


def test_observed_server_serves_as_ever(
    draft_model: DraftModel, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve() -> None:
        assert draft_model.forward(ROWS, [], 1) == CANDIDATES

    monkeypatch.setattr(draft_main, "main", serve)
    monkeypatch.setattr(sys, "argv", ["observed_draft_main", *map(str, files)])
    records = RecordFile(files[1])
    PaceFile(files[0]).write(PACE)
    observed_draft_main.main()
    (one,) = records.take()
    assert one.num_tokens == 4 and one.end_s - one.start_s >= 0.020


# --- the observed engine ---------------------------------------------------------------------------------------------


class FakeModule:
    """A module that knows hooks, and nothing else."""

    def __init__(self) -> None:
        self.before: Callable[..., None] | None = None
        self.after: Callable[..., None] | None = None

    def register_forward_pre_hook(self, hook: Callable[..., None], *, with_kwargs: bool) -> None:
        assert with_kwargs
        self.before = hook

    def register_forward_hook(self, hook: Callable[..., None], *, with_kwargs: bool) -> None:
        assert with_kwargs
        self.after = hook

    def __call__(self, num_tokens: int) -> None:
        assert self.before is not None and self.after is not None
        keywords = {"input_ids": None, "positions": SimpleNamespace(shape=(num_tokens,))}
        self.before(self, (), keywords)
        self.after(self, (), keywords, None)


def fake_llm(drafter: object | None, device: str = "cpu") -> Any:
    runner = SimpleNamespace(model=FakeModule())
    if drafter is not None:
        runner.drafter = drafter
    worker = SimpleNamespace(model_runner=runner)
    executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))
    config = SimpleNamespace(device_config=SimpleNamespace(device_type=device))
    return SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config, model_executor=executor))


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObservedEngine]:
    monkeypatch.setattr(placement, "server_module", placement.server_module)
    one = ObservedEngine()
    yield one
    one.close()


EMULATION = Emulation(target_forward_ms=10.0, draft_step_ms=4.0, draft_token_cost=0.5)


def test_emulation_is_for_one_run(observed: ObservedEngine) -> None:
    draft = FakeModule()
    llm = fake_llm(SimpleNamespace(model=draft))
    observed.attach(llm)
    target = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    target(9)
    for emulation, target_s, draft_s in ((EMULATION, 0.010, 0.006), (None, 0.0, 0.0), (EMULATION, 0.010, 0.006)):
        draft(1)
        observed.start(emulation)
        started_s = time.perf_counter()
        target(3)
        draft(2)
        ended_s = time.perf_counter()
        target(8)
        found = observed.stop(started_s, ended_s, emulation)
        assert [one.num_tokens for one in found.target] == [3], "neither earlier forwards nor later ones"
        assert [one.num_tokens for one in found.draft] == [2]
        for (one,), least_s in ((found.target, target_s), (found.draft, draft_s)):
            assert 0.0 <= one.start_s < one.end_s <= ended_s - started_s
            assert one.end_s - one.start_s >= least_s
        if emulation is None:
            assert found.num_overruns == 0
            assert quickest_s(lambda: target(1)) < 0.004 and quickest_s(lambda: draft(1)) < 0.004


def test_forwards_that_take_too_long_are_counted(observed: ObservedEngine) -> None:
    llm = fake_llm(None)
    observed.attach(llm)
    target = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    # Of the draft server: one as long as it should be, one too long.
    server = RecordFile(Path(placement.server_module[2]))
    observed.start(EMULATION)
    started_s = time.perf_counter()
    target(1)
    server.append(Forward(started_s + 0.001, started_s + 0.0051, 1))
    server.append(Forward(started_s + 0.002, started_s + 0.0065, 1))
    found = observed.stop(started_s, time.perf_counter(), EMULATION)
    assert found.num_overruns == 1 + (found.target[0].end_s - found.target[0].start_s > 0.011)
    assert len(found.draft) == 2 and found.draft[0].start_s == pytest.approx(0.001)


def test_the_draft_server_reads_the_pace_of_the_run(observed: ObservedEngine) -> None:
    module, pace, _ = placement.server_module
    assert module == "vllm_specbranch.observed_draft_main"
    server = PaceFile(Path(pace))
    observed.start(EMULATION)
    assert server.read() == Pace(4.0, 0.5)
    observed.stop(0.0, 1.0, EMULATION)
    assert server.read() == Pace()
    folder = Path(pace).parent
    assert folder.stat().st_mode & 0o077 == 0
    observed.close()
    assert not folder.exists()


def test_only_engines_on_a_cpu_are_observed(observed: ObservedEngine) -> None:
    with pytest.raises(ConfigError, match="observe='cuda'"):
        observed.attach(fake_llm(None, "cuda"))


def test_drafters_without_a_model_are_left_alone(observed: ObservedEngine) -> None:
    llm = fake_llm(SimpleNamespace())
    observed.attach(llm)
    assert llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.after is not None


def test_the_server_module_is_what_gets_started(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def popen(command: list[str], **_: object) -> None:
        commands.append(command)
        raise OSError("not started here")

    monkeypatch.setattr(placement.subprocess, "Popen", popen)
    monkeypatch.setattr(placement, "server_module", ("somewhere.else", "a", "b"))
    config = SpecBranchConfig.from_user({"model": "draft"})
    process = placement.ServerProcess(config, DraftModelSettings(model="draft", max_model_len=64), on_cpu=True)
    assert not process.ensure_running()
    process.stop()
    assert commands == [[sys.executable, "-m", "somewhere.else", "a", "b"]]


# --- asking for it ---------------------------------------------------------------------------------------------------


def test_emulation_of_an_engine_that_is_not_observed_is_refused() -> None:
    with pytest.raises(ConfigError, match="emulation="):
        Engine(EngineSpec("one", "nowhere")).run([[1]], 1, emulation=EMULATION)


def test_messages_of_observed_engines_survive_their_line() -> None:
    command: Command = Run([[1, 2]], 8, 1, 0.0, None, EMULATION)
    assert msgspec.json.decode(msgspec.json.encode(command), type=Command) == command
    forwards = [Forward(0.1, 0.2, 5)]
    answer = RunResult(1.0, 2, [], target_forwards=forwards, draft_forwards=forwards, num_overruns=3)
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer


def test_lineup_passes_on_what_is_asked_of_all_engines() -> None:
    lineup = Lineup("t", "d", place([0, 1], 0), observe=True, arguments={"block_size": 64})
    specs = [lineup.plain(), lineup.ngram(3), lineup.draft_model(4), lineup.specbranch(8)]
    assert all(spec.observe and spec.arguments == {"block_size": 64} for spec in specs)
    assert lineup.plain(async_scheduling=False).arguments == {"block_size": 64, "async_scheduling": False}
    assert lineup.arguments == {"block_size": 64}
    assert not Lineup("t", "d", place([0, 1], 0)).plain().observe


def test_lineup_has_prompt_lookup() -> None:
    lineup = Lineup("t", "d", place([0, 1], 0))
    wanted = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    assert lineup.ngram(3).speculative == wanted
    assert lineup.ngram(3, lookup_min=2).speculative == wanted | {"prompt_lookup_min": 2}
    assert (lineup.ngram(3).name, lineup.ngram(3, "other", (1,)).cores) == ("ngram", (1,))


def test_arguments_win_over_those_made_of_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=lambda model, **arguments: made.append((model, arguments)))
    )
    arguments = {"async_scheduling": False, "enable_prefix_caching": True}
    measure_child.load(EngineSpec("one", "m", seed=5, arguments=arguments))
    ((model, used),) = made
    assert (model, used["seed"], used["enable_prefix_caching"], used["async_scheduling"]) == ("m", 5, True, False)
    assert "gpu_memory_utilization" not in used
