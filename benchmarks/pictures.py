"""Pictures of a result of `bench_decode`: speed by method, where the time of a token goes, speed-up by batch size, who works when,
acceptance by position.

Owns the choice of pictures and all of them but one; style is in `vllm_specbranch.picture_style`, the timeline in
`picture_timeline`. Needs matplotlib (the `bench` extra). Runs on its own, offline:

    python benchmarks/pictures.py result.json --out pictures
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Run as a script, this finds its own folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.picture_timeline import draw_timeline, overruns_note
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.picture_style import (
    DRAFT_COLOUR,
    FAINT_COLOUR,
    TARGET_COLOUR,
    Result,
    Row,
    best_sequential,
    colour,
    condition_slug,
    devices,
    frame,
    margins,
    plot,
    reader_name,
    save,
    spread_out,
    times_are,
)

SCHEMA_VERSION = 2
# Of a position in the chunk; a share of fewer verified tokens is noise.
LEAST_VERIFIED = 20
# (key in `step_parts`, what a reader calls it, colour)
PARTS = (
    ("target_ms", "target forward", TARGET_COLOUR),
    ("draft_wait_ms", "waiting for the draft", DRAFT_COLOUR),
    ("messages_ms", "messages", "#cc79a7"),
    ("propose_ms", "proposer", "#d55e00"),
    ("rest_ms", "rest of vLLM", "#c4c4c4"),
)
Condition = Mapping[str, Any]


def main(argv: Sequence[str] | None = None, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Draw all pictures and write their paths; 2 for words that cannot be used."""
    parser = argparse.ArgumentParser(description="Pictures of a result of bench_decode.")
    parser.add_argument("result", type=Path, help="the JSON that bench_decode wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures, made when missing")
    args = parser.parse_args(argv)
    try:
        for path in draw_all(read_result(args.result), args.out):
            write(f"{path}\n")
    except ConfigError as error:
        sys.stderr.write(f"pictures: {error}\n")
        return 2
    return 0


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        ConfigError: not a file that `bench_decode` wrote, or of another schema version.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), f"a JSON file that bench_decode wrote ({error})", "result") from error
    version = result.get("schema_version") if isinstance(result, dict) else None
    if version != SCHEMA_VERSION or "conditions" not in result:
        raise ConfigError(
            str(path), f"a result of bench_decode, schema version {SCHEMA_VERSION} (not {version})", "result"
        )
    found: Result = result
    return found


def draw_all(result: Result, folder: Path) -> list[Path]:
    """Draw every picture that the result has numbers for; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Path | None] = []
    for condition in result["conditions"]:
        found += [draw(result, condition, folder) for draw in (draw_speed, draw_parts, draw_acceptance)]
    for group in _by_batch(result["conditions"]):
        if len(group) > 1:
            found.append(draw_batches(result, group, folder))
        # One request at a time is what a reader can follow.
        found.append(draw_timeline(result, group[0], folder))
    return [path for path in found if path is not None]


def draw_speed(result: Result, condition: Condition, folder: Path) -> Path:
    """Tokens per second of every row, as bars; the whiskers reach from the least to the most."""
    rows = condition["rows"]
    pyplot = plot()
    figure, axes = pyplot.subplots(figsize=(10, 1.9 + 0.34 * len(rows)))
    margins(figure, 3.3, 1.9)
    best = [row["name"] for is_wide in (False, True) for row in best_sequential(rows, is_wide)]
    most = max(row["tokens_per_s"]["most"] for row in rows)
    for y, row in enumerate(rows):
        speed, ratio = row["tokens_per_s"], row["ratio_to_baseline"]
        is_pale = row["group"] == "draft_model" and row["name"] not in best
        axes.barh(y, speed["median"], 0.68, color=colour(row), alpha=0.4 if is_pale else 1.0)
        axes.plot([speed["least"], speed["most"]], [y, y], color="#222222", linewidth=1.3)
        axes.plot([speed["least"], speed["most"]], [y, y], "|", color="#222222", markersize=6)
        axes.text(
            max(speed["most"], speed["median"]) + 0.012 * most,
            y,
            f"{ratio['median']:.2f}x  [{ratio['low']:.2f}..{ratio['high']:.2f}]",
            va="center",
            fontsize=9,
            fontweight="bold" if row["is_ours"] else "normal",
        )
    axes.axvline(rows[0]["tokens_per_s"]["median"], color=FAINT_COLOUR, linewidth=0.9, linestyle=":", zorder=0)
    axes.set_yticks(range(len(rows)), [f"{reader_name(row)}  ({devices(row, result['device'])})" for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, most * 1.02)
    axes.set_xlabel("tokens per second, all requests together")
    c = condition["model_times"]["c"]
    title = f"Decoding speed by method, batch {condition['batch_size']}"
    subtitle = (
        f"{condition['prompt_set']} prompts, {times_are(condition, result['device'])}"
        + (f"; a target round costs {c:.1f} draft steps" if c else "")
        + f"\nBars: median of {len(rows[0]['samples'])} repetitions, whiskers: least and most, "
        "numbers: speed relative to plain vLLM [95% interval]"
    )
    frame(figure, title, subtitle, condition, result, overruns_note(condition["rows"]))
    return save(figure, folder / f"speed-{condition_slug(condition)}.png")


def draw_parts(result: Result, condition: Condition, folder: Path) -> Path | None:
    """Where the time of one generated token goes, as bars of parts; None where forwards were not observed."""
    rows = condition["rows"]
    if rows[0]["step_parts"]["target_ms"] is None:
        return None
    pyplot = plot()
    figure, axes = pyplot.subplots(figsize=(10, 2.1 + 0.34 * len(rows)))
    margins(figure, 3.3, 0.9, top_inches=1.05)
    longest = 0.0
    for y, row in enumerate(rows):
        whole = row["over_all_repetitions"]
        steps_per_token = whole["num_steps"] / whole["num_tokens"]
        left = 0.0
        for key, _, shade in PARTS:
            width = (row["step_parts"].get(key) or 0.0) * steps_per_token
            axes.barh(y, width, 0.68, left=left, color=shade, edgecolor="white", linewidth=0.6)
            left += width
        axes.text(
            left, y, f" {left:.1f} ms", va="center", fontsize=9, fontweight="bold" if row["is_ours"] else "normal"
        )
        longest = max(longest, left)
    axes.set_yticks(range(len(rows)), [f"{reader_name(row)}  ({devices(row, result['device'])})" for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.02)
    axes.set_xlabel("ms per generated token: shorter is faster (whole runs, prefills included)")
    marks = [pyplot.Rectangle((0, 0), 1, 1, color=shade) for _, _, shade in PARTS]
    axes.legend(
        marks, [words for _, words, _ in PARTS], loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(PARTS),
        frameon=False, fontsize=9, handlelength=1.0, handleheight=1.0, borderaxespad=0.2,
    )  # fmt: skip
    title = f"Where the time of one token goes, batch {condition['batch_size']}"
    subtitle = f"{condition['prompt_set']} prompts, {times_are(condition, result['device'])}"
    frame(figure, title, subtitle, condition, result, overruns_note(condition["rows"]))
    return save(figure, folder / f"parts-{condition_slug(condition)}.png")


def draw_batches(result: Result, group: Sequence[Condition], folder: Path) -> Path:
    """Speed relative to plain vLLM by batch size, a line per method, at its best number of draft tokens for each batch."""
    lines = _lines(group, result["device"])
    sizes = [condition["batch_size"] for condition in group]
    pyplot = plot()
    figure, axes = pyplot.subplots(figsize=(10, 5.6))
    margins(figure, 0.85, 3.1)
    axes.axhline(1.0, color="#222222", linewidth=1.0)
    baseline = f"plain vLLM ({devices(group[0]['rows'][0], result['device'])})"
    ends, marks = [], []
    for place, (name, rows) in enumerate(lines.items()):
        ratios = [row["ratio_to_baseline"] for row in rows]
        medians = [one["median"] for one in ratios]
        errors = [
            [max(0.0, one["median"] - one["low"]) for one in ratios],
            [max(0.0, one["high"] - one["median"]) for one in ratios],
        ]
        style = "--" if rows[0]["is_wide"] else "-"
        # Side by side, so that no whisker hides another.
        aside = 0.02 * (place - (len(lines) - 1) / 2)
        axes.errorbar(
            [x + aside for x in range(len(sizes))], medians, yerr=errors, color=colour(rows[0]), linestyle=style,
            marker="o", markersize=4, capsize=2, linewidth=1.9, elinewidth=0.8,
        )  # fmt: skip
        ends.append(medians[-1])
        marks.append((name, colour(rows[0])))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.9), high)
    low, high = axes.get_ylim()
    places = spread_out([*ends, 1.0], (high - low) * 0.052)
    for (name, shade), end, y in zip([*marks, (baseline, "#222222")], [*ends, 1.0], places, strict=True):
        side = axes.get_yaxis_transform()
        axes.plot([1.005, 1.02], [end, y], color=shade, linewidth=0.7, transform=side, clip_on=False)
        axes.text(1.025, y, name, color=shade, va="center", fontsize=9.5, fontweight="bold", transform=side)
    axes.set_xlim(-0.15, len(sizes) - 0.85)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("requests at the same time (batch size)")
    axes.set_ylabel("speed relative to plain vLLM")
    axes.grid(axis="y", color=FAINT_COLOUR, alpha=0.3, linewidth=0.6)
    title = "Speed-up over plain vLLM by batch size"
    subtitle = (
        f"{group[0]['prompt_set']} prompts, {times_are(group[0], result['device'])}\n"
        "Above 1 is faster than plain vLLM. draft_model: its best number of draft tokens for each batch. Whiskers: 95% interval"
    )
    rows = [row for condition in group for row in condition["rows"]]
    frame(figure, title, subtitle, group[0], result, overruns_note(rows))
    return save(figure, folder / f"batches-{condition_slug(group[0], with_batch=False)}.png")


def draw_acceptance(result: Result, condition: Condition, folder: Path) -> Path | None:
    """The share of verified draft tokens that is accepted, by their place in the chunk."""
    rows = [row for row in _methods(condition["rows"]) if not row["is_wide"] and row["group"] != "ngram"]
    curves = {reader_name(row): (row, _shares(row)) for row in rows}
    curves = {name: curve for name, curve in curves.items() if curve[1]}
    if not curves:
        return None
    pyplot = plot()
    figure, axes = pyplot.subplots(figsize=(10, 5.0))
    margins(figure, 0.85, 3.1)
    longest = max(len(shares) for _, shares in curves.values())
    places = spread_out([shares[-1] for _, shares in curves.values()], 0.052)
    for (name, (row, shares)), y in zip(curves.items(), places, strict=True):
        positions = range(1, len(shares) + 1)
        axes.plot(positions, shares, color=colour(row), marker="o", markersize=4, linewidth=1.9)
        axes.plot([len(shares), longest + 0.15], [shares[-1], y], color=colour(row), linewidth=0.6, alpha=0.6)
        axes.text(longest + 0.2, y, name, color=colour(row), va="center", fontsize=9.5, fontweight="bold")
    axes.set_xlim(0.8, longest + 0.15)
    axes.set_ylim(0, 1)
    axes.set_xticks(range(1, longest + 1))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0], ["0%", "20%", "40%", "60%", "80%", "100%"])
    axes.grid(axis="y", color=FAINT_COLOUR, alpha=0.3, linewidth=0.6)
    axes.set_xlabel("place in the chunk of draft tokens")
    axes.set_ylabel("accepted, of the draft tokens verified there")
    title = f"How far drafts are right: acceptance by place in the chunk, batch {condition['batch_size']}"
    subtitle = (
        f"{condition['prompt_set']} prompts, {times_are(condition, result['device'])}\n"
        "A token counts as accepted only with all before it. Methods that cut chunks where the draft is unsure verify fewer tokens"
    )
    frame(figure, title, subtitle, condition, result, overruns_note(condition["rows"]))
    return save(figure, folder / f"acceptance-{condition_slug(condition)}.png")


def _shares(row: Row) -> list[float]:
    """By position, up to the last one at which enough tokens were verified."""
    pairs = zip(row["accepted_by_position"], row["drafted_by_position"], strict=False)
    counts = list(pairs)
    while counts and counts[-1][1] < LEAST_VERIFIED:
        counts.pop()
    return [accepted / drafted if drafted else 0.0 for accepted, drafted in counts]


def _methods(rows: Sequence[Row]) -> list[Row]:
    """One row for each method and number of cores: draft_model at its best; without plain and the ablations."""
    others = [row for row in rows if row["group"] == "ngram" or (row["is_ours"] and row["group"] != "ablations")]
    return [*best_sequential(rows, False), *best_sequential(rows, True), *others]


def _lines(group: Sequence[Condition], device: str) -> dict[str, list[Row]]:
    """Method to its row under each condition; methods that are missing under one are left out."""
    wide = [[row for row in condition["rows"] if row["group"] == "plain" and row["is_wide"]] for condition in group]
    found: dict[str, list[Row]] = {}
    for more, condition in zip(wide, group, strict=True):
        for row in [*_methods(condition["rows"]), *more]:
            found.setdefault(f"{reader_name(row, with_gamma=False)} ({devices(row, device)})", []).append(row)
    return {name: rows for name, rows in found.items() if len(rows) == len(group)}


def _by_batch(conditions: Sequence[Condition]) -> list[list[Condition]]:
    """Conditions that differ in their batch size only, each group by size."""
    groups: dict[str, list[Condition]] = {}
    for condition in conditions:
        groups.setdefault(json.dumps([condition["prompt_set"], condition["emulation"]]), []).append(condition)
    return [sorted(group, key=lambda one: one["batch_size"]) for group in groups.values()]


if __name__ == "__main__":
    sys.exit(main())
