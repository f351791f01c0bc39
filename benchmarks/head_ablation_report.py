"""What `bench_head` writes and draws: tables of the ablation, and speed and rollback over the confidence threshold.

Owns words and layout; runs nothing. Needs matplotlib (the `bench` extra) to draw.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_specbranch.picture_style import COLOURS, FAINT_COLOUR, plot, save
from vllm_specbranch.report import number, percent, table

Row = Mapping[str, Any]
# (rule, what a reader calls it, colour); those with a threshold are lines, the others level lines.
_RULES = (
    ("none", "no cut, no head", FAINT_COLOUR),
    ("head", "head alone", "#cc79a7"),
    ("confidence", "confidence alone", "#e69f00"),
    ("hybrid", "head and confidence", "#0072b2"),
    ("known", "classes known, and confidence", "#009e73"),
    ("pearl", "pearl", COLOURS["pearl"]),
)
_NAMES = {rule: name for rule, name, _ in _RULES}
_HALVES = ("first_half", "second_half")


def rollback_share(row: Row) -> float:
    """Tokens of the draft's main line that misses threw away, per generated token."""
    return float(row["server_counters"]["num_rollback_tokens"]) / float(row["num_tokens"])


def spread(rows: Sequence[Row], rule: str) -> float:
    """How far the speed of a rule falls from its best threshold to its worst, as a share of the best."""
    speeds = [row["tokens_per_s"] for row in rows if row["rule"] == rule and row["epsilon"] is not None]
    return float(1.0 - min(speeds) / max(speeds))


def as_text(result: Mapping[str, Any]) -> str:
    """All tables."""
    parts = []
    for pair in result["pairs"]:
        rows = pair["replays"]
        parts.append(f"{pair_name(pair)}, replays of {pair['gamma']} draft tokens:\n{replay_table(rows)}")
        falls = ", ".join(f"{_NAMES[rule]} {spread(rows, rule):.1%}" for rule in ("confidence", "hybrid", "known"))
        parts.append(f"From its best threshold to its worst the speed falls by: {falls}.")
        parts.append(f"{pair_name(pair)}, the head that is learned while serving:\n{online_table(pair['online'])}")
        if pair["engines"]:
            parts.append(f"{pair_name(pair)}, real engines, stretched forwards:\n{engine_table(pair['engines'])}")
    return "\n\n".join(parts)


def pair_name(pair: Mapping[str, Any]) -> str:
    """For people."""
    return "well aligned pair" if not pair["noise"] else f"poorly aligned pair (noise {pair['noise']:g})"


def replay_table(rows: Sequence[Row]) -> str:
    """One line per rule and threshold."""
    pearl = next(row for row in rows if row["rule"] == "pearl")
    cells = [
        [
            _NAMES[row["rule"]] + ("" if row["epsilon"] is None else f", {row['epsilon']:g}"),
            number(row["tokens_per_s"], 1),
            number(row["speed_up"], 2, "x"),
            percent(row["hit_rate"]),
            percent(row["rollback_rate"]),
            number(rollback_share(row)),
            percent(rollback_share(row) / rollback_share(pearl)),
            number(row["mean_acceptance_length"]),
        ]
        for row in rows
    ]
    headers = [
        "",
        "tokens/s",
        "÷ plain",
        "hits",
        "rollback rate",
        "rolled back a token",
        "of pearl's",
        "acceptance length",
    ]
    return table(headers, cells)


def online_table(rows: Sequence[Row]) -> str:
    """One line per threshold: `length_head: online` beside confidence alone, while it learns and afterwards."""
    cells = [
        [f"{row['epsilon']:g}", *(number(row[half]["tokens_per_s"], 1) for half in _HALVES)]
        + [number(row[half]["ratio"], 3, "x") for half in _HALVES]
        for row in rows
    ]
    halves = "first half of the rounds", "second half"
    return table(
        ["threshold", *(f"tokens/s, {one}" for one in halves), *(f"÷ confidence, {one}" for one in halves)], cells
    )


def engine_table(rows: Sequence[Row]) -> str:
    """The same for engines."""
    cells = [
        [
            _NAMES.get(str(row["rule"]), "plain vLLM") + ("" if row["epsilon"] is None else f", {row['epsilon']:g}"),
            number(row["tokens_per_s"], 1),
            number(row["speed_up"], 2, "x"),
            percent(row["hit_rate"]),
            percent(row["rollback_rate"]),
            "identical" if row["is_lossless"] else "DIFFERENT",
        ]
        for row in rows
    ]
    return table(["", "tokens/s", "÷ plain", "hits", "rollback rate", "token ids"], cells)


def draw_ablation(result: Mapping[str, Any], path: Path) -> Path:
    """Speed above, rollback and hits below, a column for each pair.

    Args:
        result: as `bench_head` writes it.
    """
    pairs = result["pairs"]
    pyplot = plot()
    figure, grid = pyplot.subplots(
        3, len(pairs), figsize=(1.6 + 4.4 * len(pairs), 9.6), squeeze=False, sharex=True, sharey="row"
    )
    for column, pair in enumerate(pairs):
        upper, middle, lower = grid[0][column], grid[1][column], grid[2][column]
        for rule, name, colour in _RULES:
            rows = [row for row in pair["replays"] if row["rule"] == rule]
            _draw_line(upper, rows, [row["tokens_per_s"] for row in rows], name, colour)
            _draw_line(middle, rows, [rollback_share(row) for row in rows], name, colour)
            _draw_line(lower, rows, [100.0 * row["hit_rate"] for row in rows], name, colour)
        name = pair_name(pair)
        upper.set_title(name[0].upper() + name[1:], fontsize=10.5)
        lower.set_xlabel("confidence threshold")
    # Once all is drawn: the axes of a line share their range.
    grid[1][0].set_ylim(bottom=0)
    grid[2][0].set_ylim(0, 100)
    grid[0][0].set_ylabel("tokens per second")
    grid[1][0].set_ylabel("rollback tokens per token")
    grid[2][0].set_ylabel("hits, % of rounds")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    emulation = result["emulation"]
    figure.suptitle("What the length head is worth (replays)", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.text(
        0.01,
        0.94,
        f"Policy specbranch, one request at a time; the real draft server in virtual time: target forward "
        f"{emulation['target_forward_ms']:g} ms,\ndraft step {emulation['draft_step_ms']:g} ms "
        f"(+{emulation['draft_token_cost']:.0%} per further row). Level lines: rules without a threshold",
        fontsize=9.5,
        va="center",
        color="#444444",
    )
    figure.subplots_adjust(
        left=0.075 if len(pairs) > 1 else 0.13, right=0.985, top=0.885, bottom=0.115, hspace=0.1, wspace=0.08
    )
    return save(figure, path)


def _draw_line(axes: Any, rows: Sequence[Row], values: Sequence[float], name: str, colour: str) -> None:
    if rows and rows[0]["epsilon"] is not None:
        axes.plot([row["epsilon"] for row in rows], values, "o-", color=colour, label=name, markersize=4)
    elif rows:
        # Two of them may lie on each other: the wide one shows below the dots of the other.
        is_wide = rows[0]["rule"] == "none"
        style, width, alpha, zorder = ("-", 4.0, 0.4, 1) if is_wide else (":", 1.6, 1.0, 2)
        axes.axhline(values[0], color=colour, label=name, linestyle=style, linewidth=width, alpha=alpha, zorder=zorder)
