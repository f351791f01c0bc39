"""The picture of who works when: the forwards of target and draft in the first rounds of one request, one panel per method.

Owns this picture only. Runs in the process of `benchmarks/pictures.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.decode_report import MOST_OVERRUNS
from vllm_specbranch.picture_style import (
    DRAFT_COLOUR,
    FAINT_COLOUR,
    TARGET_COLOUR,
    Result,
    Row,
    best_sequential,
    condition_slug,
    frame,
    margins,
    plot,
    reader_name,
    save,
    times_are,
)

# Longer windows make the draft's steps too narrow to see.
MOST_ROUNDS = 8
_LANE_HEIGHT = 0.62


def draw_timeline(result: Result, condition: Mapping[str, Any], folder: Path) -> Path | None:
    """Draw it for one condition.

    Args:
        result: of `bench_decode`.
        condition: one of its conditions.
        folder: where the picture goes.

    Returns:
        The picture's path, or None where no forwards were observed.
    """
    rows = _chosen(condition["rows"])
    if not rows:
        return None
    span_ms = _span_ms(rows)
    pyplot = plot()
    figure, panels = pyplot.subplots(
        len(rows), 1, sharex=True, squeeze=False, figsize=(10.5, 1.95 + 1.02 * len(rows)), gridspec_kw={"hspace": 0.55}
    )
    margins(figure, 1.5, 1.2, top_inches=1.15)
    for axes, row in zip(panels[:, 0], rows, strict=True):
        _draw_panel(axes, row, span_ms)
    panels[-1, 0].set_xlabel("ms since the first token of the request")
    title = "Who works when: target and draft model in the first rounds of one request"
    subtitle = (
        f"{condition['prompt_set']} prompt, batch {condition['batch_size']}, {times_are(condition, result['device'])}\n"
        "Blocks: forwards of a model. Lines: the end of a round, with the tokens that it adds. Right: tokens in this time"
    )
    frame(figure, title, subtitle, condition, result, overruns_note(condition["rows"]))
    return save(figure, folder / f"timeline-{condition_slug(condition)}.png")


def overruns_note(rows: Sequence[Row]) -> str:
    """What to say below a picture if too many emulated forwards took longer than they should have; nothing otherwise."""
    worst = max(rows, key=lambda row: row["overrun_share"])
    share = worst["overrun_share"]
    if share <= MOST_OVERRUNS:
        return ""
    return f"Doubtful: up to {share:.0%} of the forwards took longer than emulated ({reader_name(worst)})"


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """Plain, the best draft_model on the target's cores, and our policies; with what was observed."""
    plain = [row for row in rows if row["group"] == "plain" and not row["is_wide"]]
    ours = [row for row in rows if row["is_ours"] and row["group"] != "ablations"]
    return [row for row in [*plain, *best_sequential(rows, False), *ours] if row["timeline"]["target_forwards"]]


def _span_ms(rows: Sequence[Row]) -> float:
    """As long as every row is known, and no longer than a few rounds of the slowest to finish one."""
    known_s: float = min(row["timeline"]["outputs"][-1][0] for row in rows)
    rounds_s = [
        outputs[min(MOST_ROUNDS, len(outputs) - 1)][0] for row in rows for outputs in [row["timeline"]["outputs"]]
    ]
    return float(1e3 * min(known_s, max(rounds_s)))


def _draw_panel(axes: Any, row: Row, span_ms: float) -> None:
    found = row["timeline"]
    target_on, _, draft_on = row["runs_on"].partition(" + ")
    has_draft = bool(found["draft_forwards"])
    lanes = [("target", target_on, found["target_forwards"], TARGET_COLOUR, 1.0)]
    if has_draft:
        lanes.append(("draft", draft_on or target_on, found["draft_forwards"], DRAFT_COLOUR, 0.0))
    for _, _, forwards, colour, y in lanes:
        bars = [
            (1e3 * max(0.0, start), 1e3 * (end - max(0.0, start)))
            for start, end, _ in forwards
            if 1e3 * start < span_ms
        ]
        axes.broken_barh(bars, (y - _LANE_HEIGHT / 2, _LANE_HEIGHT), color=colour, edgecolor="white", linewidth=0.7)
    num_tokens = 0
    for time_s, size in found["outputs"][1:]:
        if 1e3 * time_s > span_ms:
            break
        num_tokens += size
        axes.plot([1e3 * time_s] * 2, [0.6, 1.42], color="#222222", linewidth=0.9, clip_on=False)
        axes.text(1e3 * time_s, 1.46, f"+{size}", ha="center", va="bottom", fontsize=7.5, clip_on=False)
    axes.set_yticks([y for *_, y in lanes], [f"{name}, {on}" for name, on, *_ in lanes], fontsize=8.5)
    axes.set_xlim(0, span_ms)
    axes.set_ylim(-0.5 if has_draft else 0.5, 1.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_title(reader_name(row), fontsize=10, fontweight="bold", pad=13)
    axes.text(1.012, 0.5, f"{num_tokens} tokens", transform=axes.transAxes, va="center", fontsize=11, fontweight="bold")
    axes.grid(axis="x", color=FAINT_COLOUR, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
