"""`vllm-specbranch train-head`: collect rounds of a pair, train a length head on them, say whether it is worth using.

Owns the order of work, the engine's settings while it records, and what is shown. What a round is, is in `head_data`; recording in
`head_recorder`; training in `head_training`; figures and verdict in `head_report`. Runs in the process that the user started.

While it records, the engine submits chunks of gamma tokens every time, uncut and awaited in full: a cut chunk never shows that
all of it would have been accepted (section 5 of the design). What it says is what it always says; only slower.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_specbranch.engine_settings import EngineSettings
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_data import Piece, Rounds, Shards, pieces
from vllm_specbranch.head_report import (
    CONFIDENCES,
    HEAD,
    JOINT,
    Predictions,
    as_text,
    dear_misses,
    figures,
    judge,
    summary,
)
from vllm_specbranch.head_rules import WAIT_STEPS, best_shifts, shifted
from vllm_specbranch.head_training import (
    LEAST_PROMPTS,
    Columns,
    OnEpoch,
    Parts,
    Trained,
    TrainSettings,
    features_of,
    joint_inputs,
    logits_of,
    shift_classes,
    split,
    train,
)
from vllm_specbranch.length_head import NUM_CLASSES, HeadSpec, model_identity, save_head, target_layers
from vllm_specbranch.lineup import Lineup, place, require_model
from vllm_specbranch.measure import Engine, MeasureError
from vllm_specbranch.measure_messages import Record
from vllm_specbranch.prompts import default_prompts_path, read_prompts
from vllm_specbranch.provenance import available_cores, gpus, provenance

PROMPTS_PER_SHARD = 64
# Below so many prompts, those that are held out are too few for figures to be more than chance.
FEW_PROMPTS = 200
RECORDING = "vllm_specbranch.recording_worker.RecordingExtension"
REPORT_NAME = "report.json"
PICTURE_NAME = "report.png"

Write = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainHeadSettings(EngineSettings):
    """What the user asked for; see `vllm-specbranch train-head --help`.

    Attributes:
        num_rounds: to collect at least, if the prompts give so many.
        temperatures: each prompt is continued at each of them.
        num_layers: of the target, from the last one, whose hidden states are features (K).
        c: draft steps that a round of the target takes; for the verdict, and for what the saved head says.
        miss_cost: draft steps that a round with a rejected token takes longer; for the same.
    """

    target: Path
    draft: Path
    out: Path
    num_prompts: int | None = None
    num_rounds: int = 50_000
    num_speculative_tokens: int = 8
    num_layers: int = 4
    temperatures: tuple[float, ...] = (0.0, 0.8)
    batch_size: int = 64
    num_epochs: int = 20
    c: float = 5.0
    miss_cost: float = WAIT_STEPS
    seed: int = 0
    max_tokens: int = 128

    @property
    def prompt_room(self) -> int:
        """Tokens of a prompt that fit beside its continuation."""
        return self.max_model_len - self.max_tokens - self.num_speculative_tokens - 1


def run(settings: TrainHeadSettings, write: Write) -> int:
    """Collect, train, report.

    Args:
        settings: what the user asked for.
        write: takes text as it comes, for example `sys.stdout.write`.

    Returns:
        0, also when the head is not worth using.

    Raises:
        ConfigError: a setting that cannot work, or a folder with rounds of other settings.
        MeasureError: the engine failed.
    """
    target, draft = require_model(settings.target, "--target"), require_model(settings.draft, "--draft")
    if settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(str(settings.out), "a folder, or a name that is not taken", "--out")
    sizes = sizes_of(target)
    target_layers(sizes[1], settings.num_layers)
    source = settings.prompts or default_prompts_path()
    texts = [prompt.text for prompt in read_prompts(source, settings.num_prompts)]
    _check(settings, len(texts), write)
    shards = Shards(settings.out / "rounds", _manifest(settings, target, draft, texts))
    write(
        f"Target {target}\nDraft  {draft}\nCollecting {settings.num_rounds} rounds from {len(texts)} prompts in {shards.folder}\n"
    )
    collect(settings, _lineup(settings, target, draft), texts, shards, write)
    parts = split(shards.load(), settings.seed)
    write(f"\nTraining on {len(parts.train)} rounds, {settings.num_epochs} epochs:\n")
    networks = train_all(parts, settings, write)
    found = judge_all(parts, networks, settings.c, settings.miss_cost)
    trained = networks[HEAD]
    shift_classes(trained.head, found["shifts"][HEAD])
    verdict = judge(found)
    spec = _spec(settings, parts, trained, found, sizes, source)
    save_head(settings.out, trained.head, spec)
    report = {
        **provenance(Path(__file__).parent),
        "seed": settings.seed,
        "epoch": trained.epoch,
        "losses": trained.losses,
        "prior_share": trained.prior_share,
        "figures": found,
        "verdict": dataclasses.asdict(verdict),
    }
    (settings.out / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")
    write("\n" + as_text(found) + "\n\n" + _draw(found, settings.out / PICTURE_NAME))
    used = {"policy": "specbranch", "stop_threshold": spec.epsilon, "length_head": str(settings.out)}
    write(f"The head is in {settings.out}. Use it with\n  {json.dumps(used)[1:-1]}\n\n{verdict.text}\n")
    return 0


def _check(settings: TrainHeadSettings, num_prompts: int, write: Write) -> None:
    """Find now what would only be found when all rounds have been collected, hours later.

    Raises:
        ConfigError: too few prompts, or none of their tokens would fit.
    """
    if num_prompts < LEAST_PROMPTS:
        raise ConfigError(num_prompts, f"at least {LEAST_PROMPTS} prompts, some of them to be held out", "--prompts")
    if settings.prompt_room < 1:
        least = settings.max_model_len - settings.prompt_room + 1
        allowed = f"at least {least}: new tokens, a chunk, and a token of the prompt"
        raise ConfigError(settings.max_model_len, allowed, "--max-model-len")
    if num_prompts < FEW_PROMPTS:
        write(
            f"Only {num_prompts} prompts: figures come from a fifth of them, so expect little more than chance. Some hundreds are "
            "better (--prompts).\n"
        )


def _draw(found: dict[str, Any], path: Path) -> str:
    """Draw, where matplotlib is installed; returns what to say."""
    try:
        from vllm_specbranch.head_pictures import draw_report
    except ImportError:
        return "No picture: matplotlib is not installed (pip install 'vllm-specbranch[bench]').\n"
    return f"Picture: {draw_report(found, path)}\n"


# --- collecting -----------------------------------------------------------------------------------------------------------


def _manifest(settings: TrainHeadSettings, target: Path, draft: Path, texts: Sequence[str]) -> dict[str, Any]:
    """What the rounds depend on."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return {
        "target": model_identity(target),
        "draft": model_identity(draft),
        "prompts": digest.hexdigest(),
        "num_prompts": len(texts),
        "prompts_per_shard": PROMPTS_PER_SHARD,
        "num_speculative_tokens": settings.num_speculative_tokens,
        "num_layers": settings.num_layers,
        "temperatures": list(settings.temperatures),
        "max_tokens": settings.max_tokens,
        "max_model_len": settings.max_model_len,
        "dtype": settings.dtype,
        "seed": settings.seed,
    }


def _lineup(settings: TrainHeadSettings, target: Path, draft: Path) -> Lineup:
    return Lineup(
        target=str(target),
        draft=str(draft),
        placement=place(available_cores(), len(gpus()), settings.target_cores, settings.draft_cores),
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.batch_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        enforce_eager=settings.enforce_eager,
        seed=settings.seed,
        num_engines=1,
        arguments={"worker_extension_cls": RECORDING},
    )


def collect(settings: TrainHeadSettings, lineup: Lineup, texts: Sequence[str], shards: Shards, write: Write) -> None:
    """Make the shards that are missing; starts no engine when there are enough."""
    missing, num_there = _missing(settings, len(texts), shards)
    first = next(missing, None)
    with tqdm(total=settings.num_rounds, initial=num_there, unit=" rounds", file=sys.stdout) as bar:
        if first is None:
            return
        gamma = settings.num_speculative_tokens
        spec = lineup.specbranch(
            gamma,
            "recorder",
            policy="specbranch",
            max_branches=1,
            stop_rule="none",
            on_miss=f"wait:{gamma}",
            deterministic=True,
            head_layers=settings.num_layers,
        )
        with Engine(spec) as engine:
            engine.wait_until_ready()
            # The end of a long prompt is what its continuation depends on most.
            prompts = [ids[-settings.prompt_room :] for ids in engine.encode(texts)]
            piece: Piece | None = first
            while piece is not None and bar.n < settings.num_rounds:
                engine.run(
                    prompts[piece.first : piece.last],
                    settings.max_tokens,
                    settings.batch_size,
                    piece.temperature,
                    piece.first_seed,
                    record=Record(str(shards.path(piece.index)), piece.first),
                )
                num_rounds = shards.num_rounds(piece.index)
                if not num_rounds:
                    # Were it kept, it would pass for collected, and sampled prompts come round again for ever.
                    shards.remove(piece.index)
                    raise MeasureError("the engine recorded no round: its draft server did not start, or has ended")
                bar.update(num_rounds)
                piece = next(missing, None)


def _missing(settings: TrainHeadSettings, num_prompts: int, shards: Shards) -> tuple[Iterator[Piece], int]:
    """The pieces to collect, and how many rounds are there already; no piece if these are enough."""
    plan = pieces(num_prompts, PROMPTS_PER_SHARD, settings.temperatures, settings.seed)
    num_there = 0
    for piece in plan:
        if num_there >= settings.num_rounds:
            return iter(()), num_there
        found = shards.num_rounds(piece.index)
        if not found:
            return _chain(piece, plan), num_there
        num_there += found
    return iter(()), num_there


def _chain(first: Piece, rest: Iterator[Piece]) -> Iterator[Piece]:
    yield first
    yield from rest


# --- training -------------------------------------------------------------------------------------------------------------


def train_all(parts: Parts, settings: TrainHeadSettings, write: Write) -> dict[str, Trained]:
    """The head, and the networks it is compared with, by name."""
    how = TrainSettings(num_epochs=settings.num_epochs, seed=settings.seed)
    return {
        name: train(parts.train, parts.choose, how, columns, _tell(name, write)) for name, columns in COLUMNS.items()
    }


def judge_all(parts: Parts, networks: Mapping[str, Trained], c: float, miss_cost: float) -> dict[str, Any]:
    """All figures of `head_report.figures`, and under `shifts` what to take from the logits of classes 0 and 2 of each network."""
    logits = {
        part: {name: logits_of(networks[name].head, rounds, columns) for name, columns in COLUMNS.items()}
        for part, rounds in (("choose", parts.choose), ("held_out", parts.held_out))
    }
    shifts = {name: best_shifts(one, parts.choose, c, miss_cost) for name, one in logits["choose"].items()}

    def predictions(part: str) -> Predictions:
        return Predictions(
            {name: one.argmax(dim=1) for name, one in logits[part].items()},
            {name: shifted(one, shifts[name]).argmax(dim=1) for name, one in logits[part].items()},
        )

    found = figures(parts, predictions("choose"), predictions("held_out"), c, miss_cost)
    dear = dear_misses(parts, logits["choose"][HEAD], logits["held_out"][HEAD], c, miss_cost)
    return {**found, "shifts": shifts, "dear_misses": dear}


def _confidences(rounds: Rounds) -> torch.Tensor:
    return joint_inputs(rounds, with_features=False)


# What each network sees; the first is the head, the others are for comparison.
COLUMNS: Mapping[str, Columns] = {
    HEAD: features_of,
    CONFIDENCES: _confidences,
    JOINT: joint_inputs,
}


def _tell(name: str, write: Write) -> OnEpoch:
    def tell(epoch: int, training: float, choosing: float) -> None:
        if epoch == 1 or epoch % 5 == 0:
            write(f"  {name}, epoch {epoch}: loss {training:.3f}, on the choosing prompts {choosing:.3f}\n")

    return tell


# --- what is kept ---------------------------------------------------------------------------------------------------------


def _spec(
    settings: TrainHeadSettings,
    parts: Parts,
    trained: Trained,
    found: Mapping[str, Any],
    sizes: tuple[int, int],
    source: Path,
) -> HeadSpec:
    """What is said of the head in its file.

    Args:
        sizes: hidden size and number of layers of the target.
    """
    hidden_size, num_target_layers = sizes
    layers = target_layers(num_target_layers, settings.num_layers)
    first, second, third = torch.bincount(parts.train.labels, minlength=NUM_CLASSES).tolist()
    return HeadSpec(
        num_features=trained.head.num_features,
        hidden_size=hidden_size,
        embedding_size=trained.head.num_features - len(layers) * hidden_size,
        num_target_layers=num_target_layers,
        layers=layers,
        gamma=settings.num_speculative_tokens,
        epsilon=found["speeds"][0]["rules"]["hybrid"]["epsilon"],
        target=settings.target.name,
        draft=settings.draft.name,
        target_identity=model_identity(settings.target),
        draft_identity=model_identity(settings.draft),
        label_counts=(first, second, third),
        validation=summary(found),
        seed=settings.seed,
        prompts=source.name,
    )


def sizes_of(target: Path) -> tuple[int, int]:
    """Hidden size and number of layers, as config.json has them.

    Raises:
        ConfigError: it does not have them.
    """
    config = json.loads((target / "config.json").read_text())
    # Models that also see or hear describe their language model apart.
    text = config.get("text_config") or config
    sizes = text.get("hidden_size"), text.get("num_hidden_layers")
    if not all(isinstance(one, int) for one in sizes):
        raise ConfigError(str(target), "a model whose config.json has hidden_size and num_hidden_layers", "--target")
    return sizes
