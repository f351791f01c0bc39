"""The demo: the same prompts by plain vLLM, by its own `draft_model`, and by specbranch, side by side.

Owns what is run and what is shown. Measuring is in `measure`, numbers and layout in `report`, the comparison in `compare`.
Runs in the process that the user started, which loads neither torch nor vLLM unless it has to make the deeper target or to
explain a difference.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_specbranch import deepen
from vllm_specbranch.compare import Difference, as_json, first_differences, transformers_gaps, verdict, with_gaps
from vllm_specbranch.engine_settings import EngineSettings
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.lineup import Lineup, place, require_model
from vllm_specbranch.measure import Engine, running
from vllm_specbranch.measure_messages import RunResult
from vllm_specbranch.prompts import Prompt, default_prompts_path, read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.report import Summary, breakdown, number, percent, shorten, summarize, table
from vllm_specbranch.shipped_pair import draft_path, target_path

SCHEMA_VERSION = 1
# A round of the shipped target costs about as much as one step of its draft. With these sizes it costs five to eight
# where this was tried (two cores of an AMD EPYC, both busy; alone on its core a draft step is quicker).
EXTRA_LAYERS = 2
MLP_SIZE = 2048
PROGRESS_LINE_INTERVAL_S = 10.0

Write = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings(EngineSettings):
    """What the user asked for; see `vllm-specbranch demo --help`.

    Attributes:
        target, draft: folders; None for the shipped pair.
        draft_model_tokens: draft tokens per round of vLLM's own method; None for half of `num_speculative_tokens`.
        extra_layers: added to the shipped target; 0 leaves it as it is.
    """

    target: Path | None = None
    draft: Path | None = None
    num_prompts: int = 8
    num_speculative_tokens: int = 8
    draft_model_tokens: int | None = None
    extra_layers: int = EXTRA_LAYERS
    json_out: Path | None = None
    max_tokens: int = 64
    dtype: str = "float32"


class Progress:
    """Shows what starting engines do: one line that changes on a terminal, else a line every few seconds.

    Args:
        write: takes text.
        columns: of the terminal; None where there is none.
        clock: seconds, monotonic.
    """

    def __init__(self, write: Write, columns: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._columns = columns
        self._clock = clock
        self._started_s = clock()
        self._last_s = -PROGRESS_LINE_INTERVAL_S

    def __call__(self, engines: Sequence[Engine]) -> None:
        """Show the stage of each engine."""
        now_s = self._clock()
        elapsed_s = now_s - self._started_s
        is_over = all(engine.is_ready for engine in engines)
        stages = ", ".join(f"{engine.spec.name}: {engine.stage}" for engine in engines)
        text = f"  [{elapsed_s:4.0f} s] {stages}"
        if self._columns is not None:
            self._write("\r" + text[: self._columns - 1].ljust(self._columns - 1) + ("\n" if is_over else ""))
        elif is_over or now_s - self._last_s >= PROGRESS_LINE_INTERVAL_S:
            self._last_s = now_s
            self._write(text + "\n")


def run(settings: DemoSettings, write: Write) -> int:
    """Run the demo.

    Args:
        settings: what the user asked for.
        write: takes text as it comes, for example `sys.stdout.write`.

    Returns:
        0 if all token ids are identical, or differ at ties only; else 1.

    Raises:
        ConfigError: a setting that cannot work.
        MeasureError: an engine failed.
    """
    prompts = read_prompts(settings.prompts or default_prompts_path(), settings.num_prompts)
    lineup = _lineup(settings, write)
    gamma = settings.num_speculative_tokens
    sequential = settings.draft_model_tokens or max(1, gamma // 2)
    specs = [lineup.plain(), lineup.draft_model(sequential), lineup.specbranch(gamma)]
    write("Starting three engines, each in its own process:\n")
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    with running(specs, Progress(write, columns)) as engines:
        token_ids = engines[0].encode([prompt.text for prompt in prompts])
        _check_lengths(prompts, token_ids, settings)
        runs = _generate(engines, token_ids, settings, write)
    demo = _Results(prompts, token_ids, runs, lineup)
    differences = demo.differences()
    write(demo.texts() + "\n" + demo.table(sequential, gamma) + "\n\n")
    write(breakdown("specbranch", runs["specbranch"]) + "\n" + demo.speed() + "\n")
    write(verdict(differences, [prompt.name for prompt in prompts], demo.num_compared()) + "\n")
    if settings.json_out is not None:
        settings.json_out.write_text(json.dumps(demo.as_json(differences), indent=1) + "\n")
    return 0 if all(one.is_tie for one in differences) else 1


def _lineup(settings: DemoSettings, write: Write) -> Lineup:
    """Decide on models and places; make the deeper target if there is none yet."""
    if (settings.target is None) != (settings.draft is None):
        missing = "--target" if settings.target is None else "--draft"
        raise ConfigError(None, "a folder, as both of --target and --draft are needed, or neither", missing)
    if settings.json_out is not None and not settings.json_out.absolute().parent.is_dir():
        raise ConfigError(str(settings.json_out), "a file in a folder that exists", "--json")
    placement = place(available_cores(), len(gpus()), settings.target_cores, settings.draft_cores)
    if settings.target is not None and settings.draft is not None:
        target, draft = require_model(settings.target, "--target"), require_model(settings.draft, "--draft")
        write(f"Target {target}, draft {draft}.\n")
    else:
        target, draft = _shipped_target(settings.extra_layers, write), draft_path()
    if placement.is_shared:
        write("There is one core or GPU only: target and draft share it, so they cannot work at the same time.\n")
    return Lineup(
        target=str(target),
        draft=str(draft),
        placement=placement,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=1,
        kv_cache_bytes=settings.kv_cache_bytes,
        enforce_eager=settings.enforce_eager,
    )


def _shipped_target(extra_layers: int, write: Write) -> Path:
    if not extra_layers:
        write("Models: the shipped pair as it is. A round of this target costs about as much as a draft step.\n")
        return target_path()
    write("Models: the shipped pair, its target made heavier (the first time takes a moment) ...\n")
    report = deepen.cached(target_path(), extra_layers, MLP_SIZE)
    write(
        f"  The target has {report.num_layers[1]} layers instead of {report.num_layers[0]} and {report.mlp_size[1]} MLP "
        f"neurons instead of {report.mlp_size[0]}, so that a round costs several draft steps, as it does for models\n"
        "  worth accelerating: same function, checked: logits equal "
        f"(largest difference {report.max_logit_difference:.0e}). --extra-layers 0 leaves it as it is.\n"
    )
    return Path(report.out)


def _check_lengths(prompts: Sequence[Prompt], token_ids: Sequence[Sequence[int]], settings: DemoSettings) -> None:
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if len(ids) + settings.max_tokens > settings.max_model_len:
            allowed = f"prompts of at most {settings.max_model_len - settings.max_tokens} tokens (see --max-model-len)"
            raise ConfigError(f"{prompt.name}: {len(ids)} tokens", allowed, "--prompts")


def _generate(
    engines: Sequence[Engine], token_ids: Sequence[Sequence[int]], settings: DemoSettings, write: Write
) -> dict[str, list[RunResult]]:
    """Generate each prompt with every engine before the next prompt, so that a busy moment hits all of them alike."""
    for engine in engines:
        engine.run(token_ids[:1], settings.max_tokens)
    runs: dict[str, list[RunResult]] = {engine.spec.name: [] for engine in engines}
    write("Generating, prompt by prompt with each engine in turn: ")
    for ids in token_ids:
        for engine in engines:
            runs[engine.spec.name].append(engine.run([ids], settings.max_tokens))
        write(".")
    write("\n\n")
    return runs


@dataclass(frozen=True, slots=True)
class _Results:
    """What came out, one run per prompt and engine; the first engine is the one to compare with."""

    prompts: Sequence[Prompt]
    token_ids: Sequence[Sequence[int]]
    runs: dict[str, list[RunResult]]
    lineup: Lineup

    def _outputs(self, name: str) -> list[list[int]]:
        return [run.requests[0].token_ids for run in self.runs[name]]

    def _others(self) -> list[str]:
        return [name for name in self.runs if name != "plain"]

    def num_compared(self) -> int:
        return sum(len(ids) for name in self._others() for ids in self._outputs(name))

    def differences(self) -> list[Difference]:
        expected = self._outputs("plain")
        found = [one for name in self._others() for one in first_differences(name, expected, self._outputs(name))]
        return with_gaps(found, self.token_ids, expected, transformers_gaps(self.lineup.target))

    def texts(self) -> str:
        """What specbranch wrote, each text shortened."""
        parts = []
        for prompt, run in zip(self.prompts, self.runs["specbranch"], strict=True):
            last_line = shorten(prompt.text.rstrip().splitlines()[-1], 1)
            parts.append(f"[{prompt.name}] ...{last_line.strip()}\n{shorten(run.requests[0].text)}\n")
        return "\n".join(parts)

    def summaries(self) -> dict[str, Summary]:
        return {name: summarize(runs) for name, runs in self.runs.items()}

    def table(self, sequential: int, gamma: int) -> str:
        labels = {
            "plain": "plain vLLM",
            "draft_model": f"vLLM draft_model, up to {sequential} draft tokens",
            "specbranch": f"specbranch, up to {gamma} draft tokens",
        }
        headers = [
            "",
            "tokens/s",
            "ratio",
            "inter-token p50",
            "p99",
            "acceptance length",
            "hits",
            "rollback",
            "runs on",
        ]
        summaries = self.summaries()
        rows = [
            [
                labels[name],
                number(one.tokens_per_s, 1),
                number(one.tokens_per_s / summaries["plain"].tokens_per_s, 2, "x"),
                number(one.inter_token_ms[0], 2, " ms"),
                number(one.inter_token_ms[1], 2, " ms"),
                number(one.mean_acceptance_length),
                percent(one.hit_rate),
                percent(one.rollback_rate),
                self.lineup.placement.describe(with_draft=name == "specbranch"),
            ]
            for name, one in summaries.items()
        ]
        return table(headers, rows)

    def speed(self) -> str:
        """Say plainly whether it paid."""
        summaries = self.summaries()
        ours, plain, own = (summaries[name].tokens_per_s for name in ("specbranch", "plain", "draft_model"))
        text = f"speed: specbranch makes {ours / plain:.2f} times the tokens per second of plain vLLM"
        text += f" and {ours / own:.2f} times those of draft_model."
        if ours < max(plain, own):
            text += " So it does NOT pay here: it needs a target round worth several draft steps, and idle cores."
        return text

    def as_json(self, differences: Sequence[Difference]) -> dict[str, Any]:
        """All of it, with where it comes from."""
        rows = {
            name: {
                **asdict(summary),
                "runs_on": self.lineup.placement.describe(with_draft=name == "specbranch"),
                "wall_s_per_prompt": [run.wall_s for run in self.runs[name]],
                "token_ids": self._outputs(name),
            }
            for name, summary in self.summaries().items()
        }
        return {
            "schema_version": SCHEMA_VERSION,
            **provenance(Path(__file__).parent),
            "target": self.lineup.target,
            "draft": self.lineup.draft,
            "dtype": self.lineup.dtype,
            "prompts": [prompt.name for prompt in self.prompts],
            "rows": rows,
            "differences": as_json(differences),
        }
