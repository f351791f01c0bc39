"""Pictures of what a length head is worth: its confusion matrix beside that of confidence alone, and the accuracies of all rules.

Owns what is drawn; the figures come from `head_report`, the style from `picture_style`. Needs matplotlib (the `bench` extra),
which is imported when something is drawn. Runs in the process of `vllm-specbranch train-head` or a benchmark.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_specbranch.head_report import CLASS_NAMES, HEAD, MAJORITY, ONE, SAVED, TWO
from vllm_specbranch.picture_style import DRAFT_COLOUR, FAINT_COLOUR, TARGET_COLOUR, plot, save

_OTHER_COLOUR = "#86b3d1"
_COLOURS = {MAJORITY: FAINT_COLOUR, ONE: DRAFT_COLOUR, TWO: DRAFT_COLOUR, HEAD: TARGET_COLOUR, SAVED: TARGET_COLOUR}


def draw_report(found: Mapping[str, Any], path: Path, subtitle: str = "") -> Path:
    """Draw the figures of `head_report.figures`.

    Args:
        found: the figures.
        path: of the picture.
        subtitle: a line below the title, such as the names of the models.
    """
    groups = found["groups"]
    kinds = [name for name in groups if name != "all" or len(groups) == 2]
    pyplot = plot()
    figure = pyplot.figure(figsize=(14.5, 1.6 + 3.2 * len(kinds)))
    grid = figure.add_gridspec(
        len(kinds),
        5,
        left=0.06,
        right=0.975,
        top=1 - 1.25 / figure.get_size_inches()[1],
        bottom=0.75 / (1.6 + 3.2 * len(kinds)),
        # The fourth is the room for the names of the rules.
        width_ratios=(1, 1, 1, 0.3, 1.7),
        wspace=0.5,
        hspace=0.6,
    )
    for line, name in enumerate(kinds):
        group = groups[name]
        best = max((ONE, TWO), key=lambda rule: group["accuracy"][rule])
        for column, rule in enumerate((HEAD, SAVED, best)):
            axes = figure.add_subplot(grid[line, column])
            _draw_confusion(axes, group["confusion"][rule])
            axes.set_title(
                f"{rule[0].upper()}{rule[1:]}\n{name} rounds: {group['accuracy'][rule]:.1%} right", fontsize=9.5
            )
        _draw_accuracies(figure.add_subplot(grid[line, 4]), group)
    height = figure.get_size_inches()[1]
    figure.text(
        0.01, 1 - 0.12 / height, "How far will the next draft be accepted?", fontsize=13, fontweight="bold", va="top"
    )
    counts = found["num_rounds"]
    lead = f"{subtitle}; " if subtitle else ""
    figure.text(
        0.01,
        1 - 0.42 / height,
        f"{lead}{counts['held_out']:,} rounds of {found['num_prompts']['held_out']} prompts that training "
        f"({counts['train']:,} rounds) has not seen; {found['gamma']} draft tokens a round",
        fontsize=9.5,
        va="top",
        color="#444444",
    )
    return save(figure, path)


def _draw_confusion(axes: Any, matrix: Sequence[Sequence[int]]) -> None:
    """Rounds by what was accepted (rows) and what was said (columns); the shade is the share of the row."""
    shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for label, row in enumerate(matrix):
        for said, count in enumerate(row):
            share = shares[label][said]
            axes.text(
                said,
                label,
                f"{share:.0%}\n{count:,}",
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if share > 0.55 else "#222222",
            )
    short = [name.partition(": ")[2] for name in CLASS_NAMES]
    axes.set_xticks(range(len(short)), short)
    axes.set_yticks(range(len(short)), short)
    axes.set_xlabel("said")
    axes.set_ylabel("accepted")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_accuracies(axes: Any, group: Mapping[str, Any]) -> None:
    """Share of rounds whose class is named right, by rule."""
    rules = list(group["accuracy"])
    for place, rule in enumerate(rules):
        value = group["accuracy"][rule]
        axes.barh(place, value, 0.66, color=_COLOURS.get(rule, _OTHER_COLOUR))
        weight = "bold" if rule in (HEAD, SAVED) else "normal"
        axes.text(value + 0.01, place, f"{value:.1%}", va="center", fontsize=8.5, fontweight=weight)
    axes.axvline(group["accuracy"][MAJORITY], color=FAINT_COLOUR, linewidth=0.9, linestyle=":", zorder=3)
    axes.set_yticks(range(len(rules)), rules, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rules) - 0.5, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25%", "50%", "75%", "100%"])
    axes.set_title("Rounds whose class was named right", fontsize=9.5)
