"""The forwards of an engine of this process and of its draft server: noted, and stretched on demand. For benchmarks only.

Owns the private directory of the two files that this process shares with the draft server, and which modules are hooked. Runs in
the measured child.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_specbranch import placement
from vllm_specbranch.emulation import Observer, Pace, PaceFile, RecordFile, hook_module, within
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.measure_messages import Emulation, Forward

_SERVER_MODULE = "vllm_specbranch.observed_draft_main"


@dataclass(frozen=True, slots=True)
class Observation:
    """The forwards of one run, with times since its start; as in `RunResult`."""

    target: list[Forward] = field(default_factory=list)
    draft: list[Forward] = field(default_factory=list)
    num_overruns: int = 0


class ObservedEngine:
    """Observes one engine of this process. Make it before the engine is loaded, `attach` it after that.

    Mutates: `placement.server_module`, for the rest of this process.

    Args:
        without: parts of the draft server to do without, of `draft_ablations.PARTS`.
    """

    def __init__(self, without: Sequence[str] = ()) -> None:
        self._directory = placement.make_private_directory()
        paths = (self._directory / "pace", self._directory / "records")
        # vLLM's own `draft_model` runs in this process; it is observed through the same two files, which spares a second way.
        self._draft_pace, self._draft_records = PaceFile(paths[0]), RecordFile(paths[1])
        self._target_pace = Pace()
        self._target_forwards: list[Forward] = []
        placement.server_module = (_SERVER_MODULE, *map(str, paths), *without)

    def attach(self, llm: Any) -> None:
        """Hook the models of a loaded engine.

        Raises:
            ConfigError: it is not on a CPU, where a forward has been computed when the call returns.
        """
        device = str(llm.llm_engine.vllm_config.device_config.device_type)
        if device != "cpu":
            raise ConfigError(device, "an engine on a CPU", "observe")
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        hook_module(runner.model, Observer(lambda: self._target_pace, self._target_forwards))
        # Drafters without a model of their own in this process have none to hook: n-grams, our proposer.
        draft = getattr(getattr(runner, "drafter", None), "model", None)
        if draft is not None:
            hook_module(draft, Observer(self._draft_pace.read, self._draft_records))

    def start(self, emulation: Emulation | None) -> None:
        """A run begins: forget earlier forwards, and set the pace.

        Args:
            emulation: of this run; None for no stretching.
        """
        self._target_forwards.clear()
        self._draft_records.take()
        self._set_pace(*_paces(emulation))

    def stop(self, started_s: float, ended_s: float, emulation: Emulation | None) -> Observation:
        """The run has ended: no stretching from now on; return what was noted.

        Args:
            started_s, ended_s: of the run, by `time.perf_counter`; a forward belongs to it if it began in between.
            emulation: as given to `start`.
        """
        self._set_pace(Pace(), Pace())
        target = within(self._target_forwards, started_s, ended_s)
        draft = within(self._draft_records.take(), started_s, ended_s)
        target_pace, draft_pace = _paces(emulation)
        return Observation(target, draft, target_pace.num_overruns(target) + draft_pace.num_overruns(draft))

    def close(self) -> None:
        """Remove the directory; the engine has been shut down."""
        self._draft_records.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _set_pace(self, target: Pace, draft: Pace) -> None:
        self._target_pace = target
        self._draft_pace.write(draft)


def _paces(emulation: Emulation | None) -> tuple[Pace, Pace]:
    """Of the target and of the draft model."""
    if emulation is None:
        return Pace(), Pace()
    return (
        Pace(emulation.target_forward_ms, emulation.target_token_cost),
        Pace(emulation.draft_step_ms, emulation.draft_token_cost),
    )
