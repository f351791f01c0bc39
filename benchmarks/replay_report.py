"""What `replay` writes: one line per pair, c and b; and what the engine made of the same prompts.

Owns layout; replays nothing. Runs in the process of the benchmark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_specbranch.report import number, percent, table

# How a setting is called in brackets; those that are not here are not shown.
_SHORT = {"num_speculative_tokens": "", "max_branches": "k", "on_miss": ""}


@dataclass(slots=True)
class Line:
    """One line of the table.

    Attributes:
        rows: by policy, as `replay_study.as_json` has them.
        settings: that the policy chose.
    """

    noise: float
    c: float
    b: float
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, dict[str, object]] = field(default_factory=dict)

    def add(self, name: str, settings: Mapping[str, object], row: dict[str, Any]) -> None:
        """Add a column."""
        self.rows[name] = row
        self.settings[name] = dict(settings)

    def cell(self, name: str) -> str:
        """The speed-up, and in brackets what it takes."""
        chosen = self.settings[name]
        words = [
            f"{short}{str(chosen[key]).removeprefix('wait:')}"
            for key, short in _SHORT.items()
            if key in chosen and chosen[key] != "go"
        ]
        return number(self.rows[name]["speed_up"]) + (f" ({' '.join(words)})" if words else "")

    def describe(self) -> str:
        """All columns in words."""
        return ", ".join(f"{name} {self.cell(name)}" for name in self.rows)


def lines_as_table(lines: Sequence[Line]) -> str:
    """The table for people: how many times faster than plain decoding."""
    names = list(lines[0].rows)
    headers = ["noise", "c", "b", *names]
    rows = [[f"{one.noise:g}", f"{one.c:g}", f"{one.b:g}", *(one.cell(name) for name in names)] for one in lines]
    legend = (
        "Times plain decoding; in brackets the settings that were best: draft tokens, tokens waited for after a miss, k branches.\n"
        "c: draft steps per target round; b: cost of a further token in a draft step; noise: on the draft's weights."
    )
    return table(headers, rows) + "\n" + legend


def engine_text(check: Mapping[str, Any]) -> str:
    """What the engine made of it, in words."""
    parts = []
    for one in check["deterministic"]:
        verdict = "agree" if one["agrees"] else "DO NOT AGREE"
        parts.append(
            f"{one['name']}, deterministic: engine {one['engine']['num_rounds']} rounds, {one['engine']['num_hits']} hits; replay "
            f"{one['replay']['num_rounds']} rounds, {one['replay']['num_hits']} hits: they {verdict}."
        )
    for one in check["observed"]:
        parts.append(
            f"{one['name']}: {number(one['round_ms'])} ms per round; {number(one['replay_round_ms'])} ms in a replay with "
            f"the same times: target forward {number(one['target_forward_ms'])}, waiting for drafts {number(one['wait_ms'])}, "
            f"messages {number(one['messages_ms'])}, proposer {number(one['propose_ms'])}, "
            f"rest of vLLM {number(one['rest_ms'])} ms. Rounds {number(one['num_rounds'], 0)}, "
            f"in the replay {one['replay_rounds']}; {_share(one['share_of_oracle'])} of the replay's speed, "
            f"{_share(one['share_of_oracle_in_vllm'])} with what vLLM adds to a plain forward "
            f"({number(check['around_plain_forwards_ms'])} ms). {number(100 * one['overrun_share'], 1)}% of its forwards overran."
        )
    return "\n".join(parts)


def _share(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{percent(found['median'])} [{percent(low)}..{percent(high)}]"
