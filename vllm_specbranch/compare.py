"""Are the token ids of two engines the same, and if not, was it a tie?

Owns the comparison and the sentence about it. The gap of the target's two best logits is computed with transformers in float32,
apart from vLLM. Runs in the process of the demo or a benchmark; imports torch only when there is a difference.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# DESIGN rule 5: below this gap of the two best logits a float32 run may pick either.
TIE_GAP = 1e-5

Outputs = Sequence[Sequence[int]]
# (prefix of token ids, one for each difference) -> gap of the target's two best logits after each
GapOf = Callable[[Sequence[Sequence[int]]], list[float]]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place at which an engine's output for one prompt leaves that of plain decoding.

    Attributes:
        prompt: index of the prompt.
        position: index in the output.
        expected, got: token ids; None where the output had already ended.
        gap: of the target's two best logits there; None until measured.
    """

    engine: str
    prompt: int
    position: int
    expected: int | None
    got: int | None
    gap: float | None = None

    @property
    def is_tie(self) -> bool:
        """Whether the gap is so small that either token was right."""
        return self.gap is not None and self.gap < TIE_GAP


def first_differences(engine: str, expected: Outputs, got: Outputs) -> list[Difference]:
    """Compare outputs prompt by prompt; what follows a first difference says nothing more.

    Raises:
        ValueError: not the same number of prompts.
    """
    found = []
    for prompt, (left, right) in enumerate(zip(expected, got, strict=True)):
        for position in range(max(len(left), len(right))):
            one = left[position] if position < len(left) else None
            other = right[position] if position < len(right) else None
            if one != other:
                found.append(Difference(engine, prompt, position, one, other))
                break
    return found


def with_gaps(
    differences: Sequence[Difference], prompts: Outputs, expected: Outputs, gap_of: GapOf
) -> list[Difference]:
    """Measure the gap at each difference, on the common prefix."""
    if not differences:
        return []
    prefixes = [[*prompts[one.prompt], *expected[one.prompt][: one.position]] for one in differences]
    return [
        Difference(one.engine, one.prompt, one.position, one.expected, one.got, gap)
        for one, gap in zip(differences, gap_of(prefixes), strict=True)
    ]


def verdict(differences: Sequence[Difference], names: Sequence[str], num_tokens: int) -> str:
    """One line: identical, or where not and by what gap.

    Args:
        differences: with their gaps.
        names: of the prompts.
        num_tokens: compared in all, over all engines.
    """
    if not differences:
        return f"token ids: IDENTICAL to plain vLLM ({num_tokens} tokens of {len(names)} prompts compared)"
    places = "; ".join(
        f"{one.engine}, prompt {names[one.prompt]}, position {one.position}, logit gap "
        + ("unknown" if one.gap is None else f"{one.gap:.1e}")
        for one in differences
    )
    kind = "equal but for ties" if all(one.is_tie for one in differences) else "DIFFERENT from plain vLLM"
    return f"token ids: {kind}: {places} ({num_tokens} tokens of {len(names)} prompts compared)"


def transformers_gaps(model: str) -> GapOf:
    """Return a function that computes gaps with transformers in float32; the model is loaded at its first call."""

    def gap_of(prefixes: Sequence[Sequence[int]]) -> list[float]:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        gaps = []
        with torch.inference_mode():
            for prefix in prefixes:
                best = loaded(torch.tensor([list(prefix)])).logits[0, -1].topk(2).values
                gaps.append(float(best[0] - best[1]))
        return gaps

    return gap_of


def as_json(differences: Sequence[Difference]) -> list[Mapping[str, object]]:
    """Plain values, for results."""
    names = ("engine", "prompt", "position", "expected", "got", "gap")
    return [{name: getattr(one, name) for name in names} for one in differences]
