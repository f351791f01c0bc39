"""Under what `bench_decode` compares its engines: prompts, requests at the same time, and durations of emulated forwards.

Owns the conditions of a run and the work that each of them is: prompts as token ids. Runs in the process of the benchmark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_specbranch.errors import ConfigError
from vllm_specbranch.measure_messages import Emulation
from vllm_specbranch.prompts import FIELD, Prompt, default_prompts_path, read_prompts

_FOLDER = Path(__file__).resolve().parent / "prompts"
SHIPPED_SETS = {
    "humaneval": _FOLDER / "humaneval.jsonl",
    "gsm8k": _FOLDER / "gsm8k.jsonl",
    "mt_bench": _FOLDER / "mt_bench.jsonl",
    "python_holdout": _FOLDER / "python_holdout.json",
    "demo": default_prompts_path(),
}
# A prompt that is used again is used without its last tokens, so many more each time; and keeps so many.
CUT_TOKENS = 4
LEAST_TOKENS = 8


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of one origin.

    Attributes:
        name: of a shipped set, or a path.
    """

    name: str
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True, slots=True)
class Condition:
    """One setting in which every engine is measured: one table of the result.

    Attributes:
        prompt_set: its name.
        batch_size: requests at the same time.
        emulation: durations of the forwards; None for those of the real cores.
    """

    prompt_set: str
    batch_size: int
    emulation: Emulation | None = None

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.prompt_set}, batch {self.batch_size}, {describe_emulation(self.emulation)}"


def describe_emulation(emulation: Emulation | None) -> str:
    """What a table or a picture says of where its times come from."""
    if emulation is None:
        return "real devices"
    return (
        f"emulated: target {emulation.target_forward_ms:g} ms, draft step {emulation.draft_step_ms:g} ms "
        f"(+{emulation.draft_token_cost:.0%} per further row)"
    )


def parse_emulation(text: str, field: str) -> Emulation | None:
    """Parse `TARGET_MS:DRAFT_MS[:ROW_COST]`, or `none` for the real devices.

    Raises:
        ConfigError: anything else, or a duration that is not positive.
    """
    if text == "none":
        return None
    allowed = "TARGET_MS:DRAFT_MS[:ROW_COST], for example 20:4 or 20:4:0.02 (above 0; ROW_COST from 0), or none"
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError as error:
        raise ConfigError(text, allowed, field) from error
    if len(numbers) not in (2, 3) or not all(0 < one < 1e5 for one in numbers[:2]):
        raise ConfigError(text, allowed, field)
    if len(numbers) == 3 and not 0 <= numbers[2] <= 10:
        raise ConfigError(text, allowed, field)
    more = {"draft_token_cost": numbers[2]} if len(numbers) == 3 else {}
    return Emulation(numbers[0], numbers[1], **more)


def read_prompt_sets(names: Sequence[str], most: int) -> list[PromptSet]:
    """Read the first prompts of each set.

    Args:
        names: of shipped sets, or paths of files.
        most: prompts of each.

    Raises:
        ConfigError: neither a shipped set nor a file that can be read.
    """
    found = []
    for name in dict.fromkeys(names):
        path = SHIPPED_SETS.get(name, Path(name))
        if name not in SHIPPED_SETS and not path.suffix:
            raise ConfigError(name, "one of " + ", ".join(SHIPPED_SETS) + ", or a file", FIELD)
        found.append(PromptSet(name, tuple(read_prompts(path, most))))
    return found


def conditions(
    sets: Sequence[PromptSet], batch_sizes: Sequence[int], emulations: Sequence[Emulation | None]
) -> list[Condition]:
    """Every combination, each once."""
    found = [Condition(one.name, size, how) for how in emulations for one in sets for size in batch_sizes]
    return list(dict.fromkeys(found))


def work_of(token_ids: Sequence[Sequence[int]], num_prompts: int) -> list[list[int]]:
    """Exactly so many prompts, all different: the given ones, and then again with fewer and fewer of their last tokens.

    Args:
        token_ids: of the set's prompts.
        num_prompts: how many are wanted.

    Raises:
        ConfigError: the prompts are too few and too short for that.
    """
    found: dict[tuple[int, ...], None] = {}
    longest = max(map(len, token_ids))
    for cut in range(0, max(1, longest - LEAST_TOKENS), CUT_TOKENS):
        for ids in token_ids:
            if not cut or len(ids) - cut >= LEAST_TOKENS:
                found.setdefault(tuple(ids[: len(ids) - cut]))
            if len(found) == num_prompts:
                return [list(one) for one in found]
    raise ConfigError(len(token_ids), f"more or longer prompts: {num_prompts} different ones are needed", FIELD)


def cut_prompts(token_ids: Sequence[Sequence[int]], most_tokens: int) -> list[list[int]]:
    """The first tokens of each prompt."""
    return [list(ids[:most_tokens]) for ids in token_ids]
