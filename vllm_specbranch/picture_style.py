"""How pictures of benchmark results look: colours, names for readers, and the frame around each.

Owns style only; what is drawn is in `head_pictures`, and in `pictures` and `picture_timeline` of the benchmarks. Needs
matplotlib (the `bench` extra), which is imported when something is drawn. Runs in the process of a benchmark or of
`vllm-specbranch train-head`.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
Row = Mapping[str, Any]

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = {
    "plain": "#6b6b6b",
    "async_off": "#a8a8a8",
    "draft_model": "#e69f00",
    "ngram": "#cc79a7",
    "pearl": "#56b4e9",
    "specbranch": "#0072b2",
    "fanout": "#d55e00",
    "best_first": "#009e73",
    "ablations": "#86b3d1",
}
TARGET_COLOUR, DRAFT_COLOUR, TEXT_COLOUR, FAINT_COLOUR = "#0072b2", "#e69f00", "#222222", "#8a8a8a"
DOUBT_COLOUR = "#b3002d"
DPI = 150
_NAMES = {"plain": "plain vLLM", "draft_model": "vLLM draft_model", "ngram": "vLLM ngram"}


def plot() -> Any:
    """Return `matplotlib.pyplot`, set to draw into files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": FAINT_COLOUR,
            "axes.titlelocation": "left",
            "text.color": TEXT_COLOUR,
            "axes.labelcolor": TEXT_COLOUR,
            "xtick.color": TEXT_COLOUR,
            "ytick.color": TEXT_COLOUR,
        }
    )
    return matplotlib.pyplot


def colour(row: Row) -> str:
    """Of a row's bars and lines."""
    return COLOURS.get(str(row["group"]), TEXT_COLOUR)


def reader_name(row: Row, with_gamma: bool = True) -> str:
    """What a reader calls a row, without its cores."""
    name = str(row["name"]).split(" on ")[0]
    if row["group"] == "draft_model":
        number = name.split()[-1]
        return f"{_NAMES['draft_model']}, {number} tokens" if with_gamma else _NAMES["draft_model"]
    first, comma, rest = name.partition(", ")
    return _NAMES.get(first, first) + comma + rest


def devices(row: Row, device: str) -> str:
    """`1 core`, `2 cores`, or GPUs."""
    count, word = int(row["num_devices"]), "core" if device == "cpu" else "GPU"
    return f"{count} {word}" + "s" * (count > 1)


def times_are(condition: Mapping[str, Any], device: str) -> str:
    """Where the times of a condition come from, for a title: it must say when they are emulated."""
    emulation = condition["emulation"]
    if emulation is None:
        return "real CPU cores" if device == "cpu" else "real GPUs"
    return (
        f"emulated durations: target {emulation['target_forward_ms']:g} ms, draft step {emulation['draft_step_ms']:g} ms"
        f" (+{emulation['draft_token_cost']:.0%} per further row)"
    )


def best_sequential(rows: Sequence[Row], is_wide: bool) -> list[Row]:
    """The fastest draft_model, in a list; empty if there is none."""
    found = [row for row in rows if row["group"] == "draft_model" and row["is_wide"] == is_wide]
    return sorted(found, key=lambda row: -row["tokens_per_s"]["median"])[:1]


def spread_out(places: Sequence[float], least: float) -> list[float]:
    """Move labels apart: the same order, neighbours at least `least` away, as near to their places as that allows."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    # Blocks of labels that touch: (indices, middle of the block).
    blocks: list[tuple[list[int], float]] = []
    for index in order:
        blocks.append(([index], places[index]))
        while len(blocks) > 1 and _touch(blocks[-2], blocks[-1], least):
            (left, at), (right, other) = blocks[-2:]
            middle = (at * len(left) + other * len(right)) / (len(left) + len(right))
            blocks[-2:] = [(left + right, middle)]
    moved = list(places)
    for members, middle in blocks:
        for place, index in enumerate(members):
            moved[index] = middle + least * (place - (len(members) - 1) / 2)
    return moved


def _touch(below: tuple[list[int], float], above: tuple[list[int], float], least: float) -> bool:
    return above[1] - below[1] < least * (len(below[0]) + len(above[0])) / 2


def frame(
    figure: Any, title: str, subtitle: str, condition: Mapping[str, Any], result: Result, doubt: str = ""
) -> None:
    """Title and subtitle above, where the numbers come from below, and a doubt about them after it."""
    if condition["emulation"] is not None:
        title += " (emulated)"
    height = figure.get_size_inches()[1]
    figure.text(0.01, 1 - 0.12 / height, title, fontsize=13, fontweight="bold", va="top")
    figure.text(0.01, 1 - 0.42 / height, subtitle, fontsize=9.5, va="top", color="#444444")
    versions, machine = result["versions"], result["machine"]
    commit = (result.get("git_sha") or "unknown")[:7] + ("+" if result.get("dirty") else "")
    where = ", ".join(machine["gpus"]) or machine["cpu"]
    note = f"vLLM {versions['vllm']}, vllm-specbranch commit {commit}, {where}"
    figure.text(0.01, 0.06 / height, note, fontsize=7, color=FAINT_COLOUR, va="bottom")
    if doubt:
        figure.text(0.99, 0.06 / height, doubt, fontsize=8, color=DOUBT_COLOUR, va="bottom", ha="right")


def margins(figure: Any, left_inches: float, right_inches: float, top_inches: float = 0.95) -> None:
    """Leave room for title, labels and note, the same in inches for every size."""
    width, height = figure.get_size_inches()
    figure.subplots_adjust(
        left=left_inches / width,
        right=1 - right_inches / width,
        top=1 - top_inches / height,
        bottom=0.75 / height,
    )


def save(figure: Any, path: Path) -> Path:
    """Write the picture and let go of it."""
    figure.savefig(path, dpi=DPI, facecolor="white")
    plot().close(figure)
    return path


def slug(text: str) -> str:
    """A part of a file name."""
    kept = "".join(one if one.isalnum() or one in "._" else "-" for one in text.lower())
    return "-".join(part for part, _ in itertools.groupby(kept.split("-")) if part)


def condition_slug(condition: Mapping[str, Any], with_batch: bool = True) -> str:
    """Prompts, batch and times of a condition, for a file name."""
    emulation = condition["emulation"]
    how = "real"
    if emulation is not None:
        how = "emulated-{target_forward_ms:g}-{draft_step_ms:g}-{draft_token_cost:g}".format(**emulation)
    batch = f"-batch{condition['batch_size']}" if with_batch else ""
    return slug(f"{Path(condition['prompt_set']).stem}{batch}-{how}")
