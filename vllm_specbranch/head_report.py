"""What a trained head is worth: its accuracy beside rules without a head, and the verdict.

Owns the figures, their words and the measure of "worth using". Draws nothing (`head_pictures`). Runs in the process of
`vllm-specbranch train-head`.

The measure: on held-out prompts, the speed of the hybrid rule (head and confidence) in the round model of `head_rules`,
relative to the faster of no cut and the best threshold on confidence alone. Each rule gets the threshold that is best on the
other prompts. The round model is not the engine: on the shipped poorly aligned pair it was 3.5% too friendly to the head. So a head
is worth using when the whole 95% interval of that ratio, over prompts drawn anew, lies above 1 by more than that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_specbranch import head_rules as rules
from vllm_specbranch.head_data import Rounds
from vllm_specbranch.head_training import Parts, balanced_accuracy
from vllm_specbranch.length_head import NUM_CLASSES
from vllm_specbranch.report import percent, table

CLASS_NAMES = ("0: nothing", "1: some", "2: all")
# The round model is shown for the c asked for, and for these times it.
MULTIPLES_OF_C = (1.0, 2.0, 4.0)
# What a miss might cost, in rounds of the target.
MISS_COSTS = (0.5, 1.0, 2.0)
# Names of the rules, in the order of tables and pictures.
MAJORITY, ONE, TWO = "the most frequent class", "confidence, one threshold", "confidence, two thresholds"
HEAD, CONFIDENCES, JOINT = "the head, likeliest class", "network: confidences", "network: features, confidences"
SAVED = "the head as saved"
# By how much the round model may flatter a head: it said 1.022 where replays of the real draft server said 0.988.
MODEL_ERROR = 0.035


@dataclass(frozen=True, slots=True)
class Predictions:
    """What networks say of rounds, by the network's name, `[n] int64` each; the head, from the target's features alone, is `HEAD`.

    Attributes:
        likeliest: the class that is right most often.
        worthiest: the class that is worth most in the round model (`head_rules.best_shifts`), as the head is saved.
    """

    likeliest: Mapping[str, torch.Tensor]
    worthiest: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a head is worth using.

    Attributes:
        ratio: of speeds, hybrid to the best rule without a head.
        low, high: its 95% interval.
        rollback, rollback_without: draft tokens thrown away in a round, with the head and by that rule.
    """

    ratio: float
    low: float
    high: float
    rollback: float
    rollback_without: float
    text: str

    @property
    def is_worth(self) -> bool:
        """See the measure at the top of this file."""
        return self.low > 1.0 + MODEL_ERROR


def figures(
    parts: Parts, chosen: Predictions, held_out: Predictions, c: float, miss_cost: float = rules.WAIT_STEPS
) -> dict[str, Any]:
    """All figures, for JSON.

    Args:
        chosen, held_out: predictions for `parts.choose` and `parts.held_out`.
        c: draft steps that a round of the target takes.
        miss_cost: draft steps that a round with a rejected token takes longer.

    Returns:
        `groups`: accuracies by temperature; `thresholds`: of the rules on confidence; `speeds`: the round model by c.
    """
    thresholds = fit_thresholds(parts.train)
    said = {
        MAJORITY: torch.full_like(parts.held_out.labels, most_frequent(parts.train)),
        **said_by_confidence(parts.held_out, thresholds),
        **held_out.likeliest,
        SAVED: held_out.worthiest[HEAD],
    }
    groups = {
        name: _group(parts.held_out, said, which)
        for name, which in by_temperature(parts.held_out).items()
        if bool(which.any())
    }
    return {
        "num_prompts": {
            name: len(torch.unique(getattr(parts, name).prompts)) for name in ("train", "choose", "held_out")
        },
        "num_rounds": {name: len(getattr(parts, name)) for name in ("train", "choose", "held_out")},
        "gamma": parts.held_out.gamma,
        "groups": groups,
        "thresholds": {
            kind: {"epsilon": epsilon, "bounds": [bounds.low, bounds.high]}
            for kind, (epsilon, bounds) in thresholds.items()
        },
        "miss_cost": miss_cost,
        "speeds": [_speeds(parts, chosen, held_out, times * c, miss_cost) for times in MULTIPLES_OF_C],
    }


def by_temperature(rounds: Rounds) -> dict[str, torch.Tensor]:
    """Which rounds, `[n] bool`, by the name of the group: `all`, `greedy`, `sampled`."""
    is_sampled = rounds.temperatures > 0
    return {
        "all": torch.ones(len(rounds), dtype=torch.bool),
        "greedy": ~is_sampled,
        "sampled": is_sampled,
    }


def most_frequent(rounds: Rounds) -> int:
    """The class that comes up most often."""
    return int(torch.bincount(rounds.labels, minlength=NUM_CLASSES).argmax())


def fit_thresholds(rounds: Rounds) -> dict[str, tuple[float, rules.Bounds]]:
    """One threshold and two, for greedy and for sampled rounds: what may be looked at differs, so each kind has its own."""
    kinds = by_temperature(rounds)
    parts = {kind: rounds.select(kinds[kind]) for kind in ("greedy", "sampled") if bool(kinds[kind].any())}
    return {kind: (rules.best_epsilon_for_classes(part), rules.best_bounds(part)) for kind, part in parts.items()}


def said_by_confidence(rounds: Rounds, thresholds: Mapping[str, tuple[float, rules.Bounds]]) -> dict[str, torch.Tensor]:
    """What the rules ONE and TWO say of rounds, `[n] int64` each, every kind of round by its own thresholds.

    Args:
        thresholds: of `fit_thresholds`, for the kinds of rounds that there are.
    """
    one, two = torch.empty_like(rounds.labels), torch.empty_like(rounds.labels)
    kinds = by_temperature(rounds)
    for kind, (epsilon, bounds) in thresholds.items():
        which = kinds[kind]
        lengths = rules.lengths_by_confidence(rounds.top_probs[which], epsilon)
        one[which] = rules.classes_by_length(lengths, rounds.gamma)
        two[which] = bounds.classes(rounds.select(which))
    return {ONE: one, TWO: two}


def _group(held_out: Rounds, said: Mapping[str, torch.Tensor], which: torch.Tensor) -> dict[str, Any]:
    """Accuracies on some of the held-out rounds.

    Args:
        said: by rule, of all of them.
    """
    rounds = held_out.select(which)
    labels = rounds.labels
    by_rule = {rule: one[which] for rule, one in said.items()}

    def gains(head: str) -> dict[str, list[float]]:
        return {rule: accuracy_gain(rounds, by_rule[head], by_rule[rule]) for rule in (MAJORITY, ONE, TWO)}

    return {
        "num_rounds": len(rounds),
        "label_counts": torch.bincount(labels, minlength=NUM_CLASSES).tolist(),
        "accuracy": {rule: float((one == labels).float().mean()) for rule, one in by_rule.items()},
        "balanced_accuracy": {rule: balanced_accuracy(one, labels) for rule, one in by_rule.items()},
        "confusion": {rule: rules.confusion(labels, one) for rule, one in by_rule.items() if rule != MAJORITY},
        "gains": {head: gains(head) for head in (HEAD, SAVED)},
    }


def accuracy_gain(rounds: Rounds, ours: torch.Tensor, theirs: torch.Tensor, num_samples: int = 2000) -> list[float]:
    """Difference of two accuracies and its 95% interval, prompts drawn anew with replacement: `[gain, low, high]`."""
    _, groups = torch.unique(rounds.prompts, return_inverse=True)
    num_groups = int(groups.max()) + 1
    gains = (ours == rounds.labels).double() - (theirs == rounds.labels).double()
    sums = torch.zeros(num_groups, dtype=torch.float64).index_add_(0, groups, gains)
    sizes = torch.bincount(groups, minlength=num_groups).double()
    picks = torch.randint(num_groups, (num_samples, num_groups), generator=torch.Generator().manual_seed(0))
    sampled = sums[picks].sum(dim=1) / sizes[picks].sum(dim=1)
    low, high = torch.quantile(sampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [float(gains.mean()), low, high]


def _speeds(parts: Parts, chosen: Predictions, held_out: Predictions, c: float, miss_cost: float) -> dict[str, Any]:
    """The round model on the held-out rounds; thresholds from the choosing ones, which no network was trained on."""
    rows: dict[str, rules.Outcome] = {}
    epsilons: dict[str, float] = {}
    rounds = parts.held_out

    def add(name: str, fitting: torch.Tensor | None, said: torch.Tensor | None, epsilon: float | None = None) -> None:
        best = rules.best_epsilon(parts.choose, c, fitting, miss_cost) if epsilon is None else epsilon
        epsilons[name] = best
        rows[name] = rules.outcome(rounds, rules.submitted(rounds, best, said), c, miss_cost)

    add("no cut", None, None, 0.0)
    add("confidence", None, None)
    add("head alone", None, held_out.worthiest[HEAD], 0.0)
    for name in held_out.worthiest:
        add("hybrid" if name == HEAD else f"hybrid, {name}", chosen.worthiest[name], held_out.worthiest[name])
    add("hybrid, likeliest classes", chosen.likeliest[HEAD], held_out.likeliest[HEAD])
    add("hybrid, classes known", parts.choose.labels, rounds.labels)
    rows["length known"] = rules.outcome(rounds, rounds.accepted, c, miss_cost)
    best_without = max(("no cut", "confidence"), key=lambda name: rows[name].speed)
    baseline = rows[best_without]
    return {
        "c": c,
        "best_without": best_without,
        "rules": {
            name: {
                "epsilon": epsilons.get(name),
                "speed": one.speed,
                "ratio": one.speed / baseline.speed,
                "interval": list(rules.ratio_interval(one, baseline)),
                "accepted_per_round": one.num_accepted / len(rounds),
                "rollback_per_round": one.num_wasted / len(rounds),
            }
            for name, one in rows.items()
        },
    }


def dear_misses(
    parts: Parts, chosen: torch.Tensor, held_out: torch.Tensor, c: float, miss_cost: float = rules.WAIT_STEPS
) -> list[dict[str, Any]]:
    """What a head would be worth if a miss cost more: a part of a round, a round, two. Each row has a head saved for its own cost.

    Args:
        chosen, held_out: `[n, 3]` logits of the head for these parts.
        c, miss_cost: as for `figures`; the first row is for this cost.
    """
    found = []
    for cost in (miss_cost, *(times * c for times in MISS_COSTS)):
        shifts = rules.best_shifts(chosen, parts.choose, c, cost)
        said = {
            "confidence": (None, None),
            "hybrid": tuple(rules.shifted(one, shifts).argmax(dim=1) for one in (chosen, held_out)),
            "classes known": (parts.choose.labels, parts.held_out.labels),
        }
        rows = {}
        for name, (fitting, its) in said.items():
            epsilon = rules.best_epsilon(parts.choose, c, fitting, cost)
            rows[name] = rules.outcome(parts.held_out, rules.submitted(parts.held_out, epsilon, its), c, cost)
        base, count = rows["confidence"], len(parts.held_out)
        found.append(
            {
                "miss_cost": cost,
                "shifts": shifts,
                "ratio": rows["hybrid"].speed / base.speed,
                "interval": list(rules.ratio_interval(rows["hybrid"], base)),
                "known_ratio": rows["classes known"].speed / base.speed,
                "rollback_per_round": {name: one.num_wasted / count for name, one in rows.items()},
            }
        )
    return found


def judge(found: Mapping[str, Any]) -> Verdict:
    """The verdict, at the c and the cost of a miss asked for."""
    wanted = found["speeds"][0]
    ours, without = wanted["rules"]["hybrid"], wanted["rules"][wanted["best_without"]]
    low, high = ours["interval"]
    known = wanted["rules"]["hybrid, classes known"]["ratio"]
    figures_text = f"{ours['ratio']:.3f} times as fast ({low:.3f} to {high:.3f})"
    if low > 1.0 + MODEL_ERROR:
        lead = f"Worth using: with the head, held-out rounds are {figures_text} as with the best rule without one"
    elif high < 1.0:
        lead = f"Not worth using: with the head, held-out rounds are slower than with the best rule without one, {figures_text}"
    elif low > 1.0:
        lead = f"Not shown to be worth using: {figures_text} as the best rule without a head, no more than the round model may err"
    else:
        lead = (
            f"Not worth using: no difference from the best rule without a head that is more than chance, {figures_text}"
        )
    rollback, rollback_without = ours["rollback_per_round"], without["rollback_per_round"]
    text = (
        f"{lead}; {rollback:.2f} draft tokens are rolled back a round instead of {rollback_without:.2f}. A head that is always "
        f"right would reach {known:.2f}. These are figures of a round model: a round takes c = {wanted['c']:g} draft steps, with a "
        f"rejected token {found['miss_cost']:g} more (--c, --miss-cost), and below an accepted chunk the next one is always there. "
        f"The last flatters what cuts chunks, by up to {MODEL_ERROR:.1%} where it was replayed: compare on your engine."
    )
    return Verdict(ours["ratio"], low, high, rollback, rollback_without, text)


def summary(found: Mapping[str, Any]) -> dict[str, float]:
    """The main figures by name, as they are kept with the head: `head` is the head as saved, `head_likeliest` before its shifts."""
    ours = found["speeds"][0]["rules"]["hybrid"]
    values = {"c": found["speeds"][0]["c"], "miss_cost": found["miss_cost"], "speed_ratio": ours["ratio"]}
    values["speed_ratio_low"], values["speed_ratio_high"] = ours["interval"]
    named = {"majority": MAJORITY, "one_threshold": ONE, "two_thresholds": TWO, "head": SAVED, "head_likeliest": HEAD}
    for name, group in found["groups"].items():
        values[f"{name}_rounds"] = group["num_rounds"]
        for key, rule in named.items():
            values[f"{name}_accuracy_{key}"] = group["accuracy"][rule]
        values[f"{name}_balanced_accuracy_head"] = group["balanced_accuracy"][SAVED]
    return {name: round(float(value), 4) for name, value in values.items()}


# --- words ----------------------------------------------------------------------------------------------------------------


def as_text(found: Mapping[str, Any]) -> str:
    """All figures in tables."""
    counts, prompts = found["num_rounds"], found["num_prompts"]
    parts = [
        f"{counts['train']} rounds of {prompts['train']} prompts to train on, {counts['choose']} of {prompts['choose']} to "
        f"choose by, {counts['held_out']} of {prompts['held_out']} held out; {found['gamma']} draft tokens a round.",
        accuracy_table(found["groups"]),
    ]
    for name, group in found["groups"].items():
        if name != "all" or len(found["groups"]) == 2:
            for rule in (HEAD, SAVED):
                lead = f"{rule[0].upper()}{rule[1:]}, held-out prompts, {name} rounds:\n"
                parts.append(lead + confusion_table(group["confusion"][rule]))
    parts.append(speed_table(found["speeds"]))
    if "dear_misses" in found:
        parts.append(miss_table(found["dear_misses"], found["speeds"][0]["c"]))
    return "\n\n".join(parts)


def accuracy_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Share of held-out rounds whose class is named right, by rule."""
    names = list(next(iter(groups.values()))["accuracy"])
    rows = [
        [rule] + [f"{one['accuracy'][rule]:.1%} ({one['balanced_accuracy'][rule]:.1%})" for one in groups.values()]
        for rule in names
    ]
    headers = [
        "held-out accuracy (mean over the classes)",
        *(f"{name}, {one['num_rounds']} rounds" for name, one in groups.items()),
    ]
    return table(headers, rows)


def confusion_table(matrix: Sequence[Sequence[int]]) -> str:
    """Rounds by what the target accepted and what was said; shares of each row."""
    rows = [
        [f"accepted {CLASS_NAMES[label]}", *(f"{count} ({percent(count / max(1, sum(row)))})" for count in row)]
        for label, row in enumerate(matrix)
    ]
    return table(["", *(f"said {name}" for name in CLASS_NAMES)], rows)


def speed_table(speeds: Sequence[Mapping[str, Any]]) -> str:
    """The round model: speed relative to the best rule without a head, by c."""
    names = list(speeds[0]["rules"])
    rows = []
    for name in names:
        cells = []
        for one in speeds:
            rule = one["rules"][name]
            low, high = rule["interval"]
            cells.append(f"{rule['ratio']:.3f} ({low:.3f}..{high:.3f})")
        rule = speeds[0]["rules"][name]
        rows.append([name, *cells, f"{rule['accepted_per_round']:.2f}", f"{rule['rollback_per_round']:.2f}"])
    headers = ["round model: speed ÷ best without a head", *(f"c = {one['c']:g}" for one in speeds)]
    return table([*headers, f"accepted a round, c = {speeds[0]['c']:g}", "rolled back"], rows)


def miss_table(rows: Sequence[Mapping[str, Any]], c: float) -> str:
    """What the head is worth by what a miss costs."""
    cells = [
        [
            f"{row['miss_cost']:g}",
            f"{row['ratio']:.3f} ({row['interval'][0]:.3f}..{row['interval'][1]:.3f})",
            f"{row['known_ratio']:.3f}",
            *(f"{row['rollback_per_round'][name]:.2f}" for name in ("confidence", "hybrid")),
        ]
        for row in rows
    ]
    headers = [f"a miss costs so many draft steps (c = {c:g})", "hybrid ÷ best confidence", "classes known"]
    return table([*headers, "rolled back a round", "with the head"], cells)
