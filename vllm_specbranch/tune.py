"""`vllm-specbranch tune`: measure a pair on this machine, choose its settings, and write the file that vLLM reads them from.

Owns the order of work. Measuring is in `measure` and `tune_measure`, replaying in `replay_study`, the search and the verdict in
`tune_search`, the check on engines in `tune_check`, what is shown of it in `tune_report`. Runs in the process that the user
started, which loads the draft model for the replays.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vllm_specbranch.config import CONFIG_ENV, CONFIG_FILE_NAME, METHOD, SpecBranchConfig
from vllm_specbranch.engine_settings import EngineSettings
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.lineup import Lineup, Placement, place, require_model
from vllm_specbranch.measure import Engine, running
from vllm_specbranch.prompts import default_prompts_path, read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance
from vllm_specbranch.replay import Recording, Replayed
from vllm_specbranch.replay_bounds import acceptance, acceptance_by_position, coverage
from vllm_specbranch.replay_study import TOKENS_BEYOND, Study, recordings_of
from vllm_specbranch.replay_study import as_json as replay_as_json
from vllm_specbranch.report import number, percent
from vllm_specbranch.tune_check import check, sequential_name
from vllm_specbranch.tune_measure import Measured, measure
from vllm_specbranch.tune_report import AS_IT_COMES, BOUND, PLAIN, Report, label
from vllm_specbranch.tune_search import STARTS, Search, Settings, Speeds, Verdict, judge

PROBE_TOKENS = 8
NUM_POSITIONS = 6
COVERED = (1, 2, 4, 8)
SCHEMA_VERSION = 2

Write = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings(EngineSettings):
    """What the user asked for; see `vllm-specbranch tune --help`.

    Attributes:
        out: None for `specbranch.json` in the target's folder, where vLLM looks for it.
        json_out: also write what was measured and tried to this file; None for no such file.
        always_write: write the best settings of specbranch even when they are not worth it.
    """

    target: Path
    draft: Path
    out: Path | None = None
    json_out: Path | None = None
    num_prompts: int = 8
    batch_size: int = 1
    seed: int = 0
    always_write: bool = False


def run(settings: TuneSettings, write: Write) -> int:
    """Tune.

    Args:
        settings: what the user asked for.
        write: takes text as it comes, for example `sys.stdout.write`.

    Returns:
        0, also when speculation is not worth it.

    Raises:
        ConfigError: a setting that cannot work.
        MeasureError: an engine failed.
    """
    out = _out(settings)
    texts = [prompt.text for prompt in read_prompts(settings.prompts or default_prompts_path(), settings.num_prompts)]
    lineup = _lineup(settings)
    write(
        f"Target {lineup.target}\nDraft  {lineup.draft}\nMeasuring on {len(texts)} prompts; two engines start first:\n"
    )
    measured, recordings = _measure(settings, lineup, texts, write)
    study = Study.load(
        lineup.draft,
        settings.dtype,
        recordings,
        settings.batch_size,
        num_threads=max(1, len(lineup.placement.draft_cores)),
        enforce_eager=settings.enforce_eager,
        kv_cache_bytes=settings.kv_cache_bytes,
    )
    write("\n" + describe(measured, study) + "\n\nSearching, by replaying what was recorded (times plain decoding):\n")
    found = choose(measured, study, settings.seed, write)
    # Its device is the engines' now.
    study.release()
    report = _checked(found, settings, lineup, texts, write)
    verdict = _verdict(report, measured, study, lineup.placement)
    if settings.json_out is not None:
        told = as_json(settings, lineup, measured, study, report, verdict)
        settings.json_out.write_text(json.dumps(told, indent=1) + "\n")
    write("\n" + report.as_table() + "\n\n" + verdict.reason + "\n")
    if verdict.method != METHOD and not settings.always_write:
        advice = report.draft_model_advice(lineup.draft) if verdict.method == "draft_model" else ""
        left = f"; {out} is from before and stays" if out.exists() else ""
        write(advice + f"Nothing was written{left} (--always-write writes {out} all the same).\n")
        return 0
    _write_file(out, lineup.draft, report.candidates[report.best])
    write(f"Wrote {out}. Use it with:\n  {_usage(out, Path(lineup.target))}\n")
    return 0


def _out(settings: TuneSettings) -> Path:
    """Where to write, checked before anything starts."""
    require_model(settings.target, "--target")
    out = (settings.out or settings.target / CONFIG_FILE_NAME).expanduser().absolute()
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(str(out), "a file in a folder that exists", "--out")
    if not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(str(out), "a file that may be written", "--out")
    told = settings.json_out
    if told is not None and (told.is_dir() or not told.absolute().parent.is_dir()):
        raise ConfigError(str(told), "a file in a folder that exists", "--json")
    return out


def _vocab_size(model: Path) -> int | None:
    """As config.json has it; None where it does not say."""
    path = model / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), f"a file of valid JSON ({error})", "config.json") from error
    if not isinstance(config, dict):
        raise ConfigError(str(path), "a JSON object", "config.json")
    found = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return found if isinstance(found, int) else None


def _lineup(settings: TuneSettings) -> Lineup:
    num_gpus = len(gpus())
    target, draft = require_model(settings.target, "--target"), require_model(settings.draft, "--draft")
    sizes = _vocab_size(target), _vocab_size(draft)
    if None not in sizes and sizes[0] != sizes[1]:
        raise ConfigError(f"{draft} with {sizes[1]} tokens", f"a model with the target's {sizes[0]} tokens", "--draft")
    if settings.max_tokens + TOKENS_BEYOND >= settings.max_model_len:
        allowed = (
            f"more than {settings.max_tokens + TOKENS_BEYOND}, for {settings.max_tokens} new tokens and a last draft"
        )
        raise ConfigError(settings.max_model_len, allowed, "--max-model-len")
    return Lineup(
        target=str(target),
        draft=str(draft),
        placement=place(available_cores(), num_gpus, settings.target_cores, settings.draft_cores),
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.batch_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        enforce_eager=settings.enforce_eager,
        seed=settings.seed,
        num_engines=2,
        # Forwards can be timed from outside on CPUs only.
        observe=not num_gpus,
    )


def _measure(
    settings: TuneSettings, lineup: Lineup, texts: Sequence[str], write: Write
) -> tuple[Measured, list[Recording]]:
    """Run plain vLLM and specbranch over the prompts."""
    told: set[str] = set()

    def show(engines: Sequence[Engine]) -> None:
        for engine in engines:
            if engine.is_ready and engine.spec.name not in told:
                told.add(engine.spec.name)
                write(f"  {engine.spec.name} is ready\n")

    with running([lineup.plain(), lineup.specbranch(PROBE_TOKENS)], show) as (plain, ours):
        prompts = plain.encode(texts)
        longest = max(map(len, prompts))
        room = settings.max_model_len - settings.max_tokens - TOKENS_BEYOND
        if longest > room:
            raise ConfigError(
                f"a prompt of {longest} tokens", f"prompts of at most {room} (see --max-model-len)", "--prompts"
            )
        for engine in (plain, ours):
            engine.run(prompts[:1], settings.max_tokens, settings.batch_size)
        write(f"  generating {settings.max_tokens} tokens for each prompt, twice\n")
        recorded = plain.run(prompts, settings.max_tokens + TOKENS_BEYOND, settings.batch_size)
        drafted = ours.run(prompts, settings.max_tokens, settings.batch_size)
    measured = measure(recorded, drafted, settings.batch_size, PROBE_TOKENS)
    return measured, recordings_of(prompts, recorded, settings.max_tokens)


def describe(measured: Measured, study: Study) -> str:
    """What was measured, in words."""
    times, alone = measured.ours, measured.plain
    by_position = acceptance_by_position(study.recordings, study.agreements, NUM_POSITIONS)
    top = ", ".join(f"{count}: {percent(share)}" for count, share in _coverage(study).items())
    is_seen = measured.is_observed and len(measured.target_ms) > 1
    further = f"each further token adds {times.target_token_cost:.1%}" if is_seen else "further tokens not seen"
    return "\n".join(
        [
            f"A target forward takes {number(times.target_forward_ms)} ms ({further}); vLLM adds {number(times.overhead_ms)} ms.",
            f"Without a draft server beside it the same forward takes {number(alone.target_forward_ms)} ms, and vLLM adds "
            f"{number(alone.overhead_ms)} ms.",
            f"A draft step takes {number(times.draft_step_ms)} ms (each further token adds {times.draft_token_cost:.1%}). So c = "
            f"{times.c:.1f}: that many draft steps fit into a round of the target.",
            f"The target's token is among the draft's first choices, by their number: {top}.",
            "Of rounds with that many draft tokens, all are accepted: "
            + ", ".join(f"{place}: {percent(share)}" for place, share in enumerate(by_position, 1))
            + ".",
        ]
    )


def _coverage(study: Study) -> dict[int, float]:
    return {count: coverage(study.agreements, count) for count in COVERED}


def choose(measured: Measured, study: Study, seed: int, write: Write) -> Report:
    """Search by replays, and add the alternatives."""
    plain = study.plain(measured.plain)
    replays: dict[str, Replayed] = {}
    tried: list[tuple[Settings, float]] = []

    def speed_of(settings: Settings) -> float:
        result = replays[label(settings)] = study.run(settings, measured.ours)
        return plain.time_s / result.time_s

    def show(settings: Settings, speed: float, is_best: bool) -> None:
        tried.append((settings, speed))
        write(f"  {speed:5.2f}  {label(settings)}{'  <- best so far' if is_best else ''}\n")

    found = Search(speed_of, seed, show).run()
    gamma, _ = study.best_sequential(measured.plain)
    expected = {PLAIN: plain}
    for one in (gamma, gamma + 1):
        expected[sequential_name(one)] = study.best_sequential(measured.plain, [one])[1]
    candidates = {AS_IT_COMES: STARTS[0]}
    expected[AS_IT_COMES] = replays[label(STARTS[0])]
    if found.settings != STARTS[0]:
        name = label(found.settings)
        candidates[name], expected[name] = found.settings, replays[name]
    bound = study.bound(measured.ours, 64)
    if bound is not None:
        expected[BOUND] = bound
    return Report((gamma, gamma + 1), expected, candidates, tried)


def _checked(report: Report, settings: TuneSettings, lineup: Lineup, texts: Sequence[str], write: Write) -> Report:
    """The report with what engines make of it."""
    if len(texts) < settings.batch_size:
        write(f"\n{len(texts)} prompts never fill a batch of {settings.batch_size}: give more, or --num-prompts.\n")
    ratios = check(lineup, texts, report.gammas, report.candidates, settings.max_tokens, settings.batch_size, write)
    found = replace(report, ratios=ratios)
    if not found.is_checked:
        write("Nothing could be checked on engines. What follows is what replays expect.\n")
    return found


def _verdict(report: Report, measured: Measured, study: Study, places: Placement) -> Verdict:
    gamma = report.best_gamma
    speeds = Speeds(
        report.speed(report.best),
        None if gamma is None else report.speed(sequential_name(gamma)),
        gamma,
        min(report.ratios[report.best]) if report.is_checked else None,
    )
    return judge(
        speeds,
        acceptance=acceptance(study.agreements),
        c=measured.ours.c,
        runs_on=places.describe(with_draft=True),
        alone_on=places.describe(with_draft=False),
    )


def as_json(
    settings: TuneSettings, lineup: Lineup, measured: Measured, study: Study, report: Report, verdict: Verdict
) -> dict[str, object]:
    """All that was measured and tried, for `--json`."""
    plain = report.expected[PLAIN]
    return {
        "schema_version": SCHEMA_VERSION,
        **provenance(Path(__file__).parent),
        "seed": settings.seed,
        "target": lineup.target,
        "draft": lineup.draft,
        "dtype": settings.dtype,
        "batch_size": settings.batch_size,
        "num_prompts": len(study.recordings),
        "max_tokens": settings.max_tokens,
        "runs_on": lineup.placement.describe(with_draft=True),
        "measured": {**asdict(measured), "c": measured.ours.c},
        "acceptance": acceptance(study.agreements),
        "acceptance_by_position": acceptance_by_position(study.recordings, study.agreements, NUM_POSITIONS),
        "coverage": _coverage(study),
        "tried": [{"settings": one, "speed_up": speed} for one, speed in report.tried],
        "expected": [{"name": name, **replay_as_json(one, plain)} for name, one in report.expected.items()],
        "on_engines": {name: list(ratios) for name, ratios in report.ratios.items()},
        "draft_model_tokens": report.best_gamma,
        "settings": report.candidates[report.best],
        "verdict": asdict(verdict),
    }


def _write_file(out: Path, draft: str, settings: Settings) -> None:
    """Write the settings as vLLM is to read them; a draft inside the file's folder is named relative to it."""
    folder = out.parent.resolve()
    model = Path(draft).resolve()
    named = str(model.relative_to(folder)) if model.is_relative_to(folder) and model != folder else str(model)
    user: dict[str, object] = {"model": named, **settings}
    SpecBranchConfig.from_user(user)
    out.write_text(json.dumps(user, indent=1) + "\n")


def _usage(out: Path, target: Path) -> str:
    command = f"vllm serve {target} --speculative-config {METHOD}"
    is_found = out.resolve() == (target / CONFIG_FILE_NAME).resolve()
    return command if is_found else f"{CONFIG_ENV}={out} {command}"
