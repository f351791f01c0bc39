"""What can be calculated of recorded greedy outputs without a draft server: plain decoding, sequential drafting, an upper bound.

Owns the arithmetic, and one pass of the draft model over the recordings (`agreement`), from which all of it follows: a greedy chunk
is accepted as far as the draft's first choice is the target's token at each place. Runs in the process of `tune` or a benchmark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_steps import Model
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.replay import Recording, Replayed, Times

PREFILL_TOKENS = 256
NO_RANK = -1


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the draft model sees one recording; one entry per token of it.

    Attributes:
        ranks: place of the target's token among the draft's candidates there, 0 for the first; `NO_RANK` beyond the last one.
        confidences: the draft's top probability there.
    """

    ranks: tuple[int, ...]
    confidences: tuple[float, ...]

    def run_length(self, start: int, most: int) -> int:
        """How many tokens of a greedy chunk that begins at the token `start` are accepted, at most `most`."""
        length = 0
        while length < most and start + length < len(self.ranks) and self.ranks[start + length] == 0:
            length += 1
        return length


def agreement(model: Model, kv: KVBlocks, recordings: Sequence[Recording], top_k: int) -> list[Agreement]:
    """Feed the recordings to the draft model, token by token, several at a time.

    Args:
        kv: its block pool, empty; it is empty again afterwards.
        top_k: how many candidates to look at.
    """
    found: list[Agreement] = []
    blocks_each = max(-(-(len(one.prompt) + len(one.tokens)) // kv.block_size) for one in recordings)
    at_once = max(1, min(32, kv.num_free // blocks_each))
    for first in range(0, len(recordings), at_once):
        found += _agreement(model, kv, recordings[first : first + at_once], top_k)
    return found


def _agreement(model: Model, kv: KVBlocks, recordings: Sequence[Recording], top_k: int) -> list[Agreement]:
    ranks: list[list[int]] = [[] for _ in recordings]
    confidences: list[list[float]] = [[] for _ in recordings]
    for index, recording in enumerate(recordings):
        kv.allocate(index)
        # All but the prompt's last token, whose prediction is the first one wanted.
        for start in range(0, len(recording.prompt) - 1, PREFILL_TOKENS):
            tokens = recording.prompt[start : min(start + PREFILL_TOKENS, len(recording.prompt) - 1)]
            kv.append(index, len(tokens))
            model.forward([Row(tokens, start, kv.block_ids(index))], [], top_k)
    for step in range(max(len(one.tokens) for one in recordings)):
        alive = [index for index, one in enumerate(recordings) if step < len(one.tokens)]
        rows = []
        for index in alive:
            recording = recordings[index]
            token = recording.tokens[step - 1] if step else recording.prompt[-1]
            kv.append(index, 1)
            rows.append(Row([token], len(recording.prompt) - 1 + step, kv.block_ids(index)))
        for index, candidates in zip(alive, model.forward(rows, [], top_k), strict=True):
            token = recordings[index].tokens[step]
            ids = candidates.token_ids
            ranks[index].append(ids.index(token) if token in ids else NO_RANK)
            confidences[index].append(candidates.probs[0])
    for index in range(len(recordings)):
        kv.free(index)
    return [Agreement(tuple(one), tuple(sure)) for one, sure in zip(ranks, confidences, strict=True)]


def acceptance(agreements: Sequence[Agreement]) -> float:
    """Share of all tokens that are the draft's first choice (alpha)."""
    return coverage(agreements, 1)


def coverage(agreements: Sequence[Agreement], top_k: int) -> float:
    """Share of all tokens that are among the draft's `top_k` first choices."""
    ranks = [rank for one in agreements for rank in one.ranks]
    return sum(0 <= rank < top_k for rank in ranks) / len(ranks)


def sequential(
    recordings: Sequence[Recording], agreements: Sequence[Agreement], gamma: int, times: Times, batch_size: int = 1
) -> Replayed:
    """Draft `gamma` tokens, verify them, and again (vLLM's `draft_model`); 0 is plain decoding.

    The drafting of a round takes `gamma` steps with one token per request.
    """
    result = Replayed(len(recordings), sum(one.num_tokens for one in recordings))
    waiting = list(zip(recordings, agreements, strict=True))[::-1]
    running: list[tuple[Recording, Agreement, int]] = []
    time_ms = 0.0
    while waiting or running:
        while waiting and len(running) < batch_size:
            running.append((*waiting.pop(), 0))
        # The round that ends a prefill has no drafts yet.
        chunks = [min(gamma, len(one.tokens) - done) if done else 0 for one, _, done in running]
        num_drafted = sum(bool(done) for _, _, done in running)
        time_ms += times.round_ms(sum(1 + chunk for chunk in chunks))
        time_ms += gamma * times.step_ms(num_drafted) if num_drafted else 0.0
        accepted = [ours.run_length(done, chunk) for (_, ours, done), chunk in zip(running, chunks, strict=True)]
        result.num_forwards += 1
        result.num_rounds += len(running)
        result.num_draft_tokens += sum(chunks)
        result.num_accepted_tokens += sum(accepted)
        moved = [(one, ours, done + num + 1) for (one, ours, done), num in zip(running, accepted, strict=True)]
        running = [(one, ours, done) for one, ours, done in moved if done < one.num_tokens]
    result.time_s = time_ms / 1e3
    return result


def best_sequential(
    recordings: Sequence[Recording],
    agreements: Sequence[Agreement],
    gammas: Sequence[int],
    times: Times,
    batch_size: int = 1,
) -> tuple[int, Replayed]:
    """The quickest of several numbers of draft tokens, as (number, its row)."""
    rows = [(gamma, sequential(recordings, agreements, gamma, times, batch_size)) for gamma in gammas]
    return min(rows, key=lambda row: row[1].time_s)


def every_outcome_guessed(
    recordings: Sequence[Recording], agreements: Sequence[Agreement], gamma: int, times: Times
) -> Replayed:
    """The least time of any policy, one request at a time: every outcome is a hit, further rows of a draft step are free.

    Depth is not: a draft step makes the tree one token deeper, so the token at place i of the output is drafted after i + 1 steps
    at the earliest. Waiting and cutting are perfect: nothing is verified in vain, and the shortest of all ways is taken.

    Args:
        gamma: most draft tokens of a chunk.
    """
    result = Replayed(len(recordings), sum(one.num_tokens for one in recordings))
    for recording, ours in zip(recordings, agreements, strict=True):
        time_ms, chunks = _quickest(recording, ours, gamma, times)
        result.time_s += time_ms / 1e3
        result.num_forwards += len(chunks)
        result.num_rounds += len(chunks)
        result.num_draft_tokens += sum(chunks)
        result.num_accepted_tokens += sum(chunks)
    return result


def _quickest(recording: Recording, ours: Agreement, gamma: int, times: Times) -> tuple[float, list[int]]:
    """The least time for one request, and the chunks on that way.

    `ready[i]` is when i tokens can be committed first; being there earlier is never worse, as one can wait.
    """
    most = recording.num_tokens
    ready = [0.0] + [math.inf] * most
    came_by = [(0, 0)] * (most + 1)
    for done in range(most):
        longest = ours.run_length(done, min(gamma, most - done)) if done else 0
        for chunk in range(longest + 1):
            start_ms = max(ready[done], times.draft_step_ms * (done + chunk) if chunk else 0.0)
            end_ms = start_ms + times.round_ms(1 + chunk)
            # The last round may commit more than is wanted.
            reached = min(most, done + chunk + 1)
            if end_ms < ready[reached]:
                ready[reached], came_by[reached] = end_ms, (done, chunk)
    chunks = []
    place = most
    while place > 0:
        place, chunk = came_by[place]
        chunks.append(chunk)
    return ready[most], chunks[::-1]


def acceptance_by_position(
    recordings: Sequence[Recording], agreements: Sequence[Agreement], gamma: int
) -> tuple[float, ...]:
    """Share of sequential rounds with chunks of `gamma` tokens in which the first, the first two, ... tokens are accepted."""
    runs = []
    for recording, ours in zip(recordings, agreements, strict=True):
        done = 1
        while done < recording.num_tokens:
            runs.append(ours.run_length(done, gamma))
            done += runs[-1] + 1
    return tuple(sum(run > place for run in runs) / max(1, len(runs)) for place in range(gamma))
