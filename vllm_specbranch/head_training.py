"""Training of a length head: rounds in, head out. No engine, no files.

Owns the split, the standardisation, the optimisation and the calibration of the classes; what the result is worth is the business
of `head_report`. Runs in the process of `vllm-specbranch train-head`.

Rounds of one prompt resemble each other, so the split is by prompt: what is held out comes from prompts that training has not seen.

Differs from paper (arXiv:2506.01979): the loss weighs classes by their rarity, as there, but then the head would name rare
classes too often to be right as often as it can; a part of the weights is taken back after training, as much as makes the
choosing prompts come out best.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vllm_specbranch.errors import ConfigError
from vllm_specbranch.head_data import Rounds
from vllm_specbranch.length_head import NUM_CLASSES, LengthHead

LEAST_PROMPTS = 10
# How much of the logarithm of the class frequencies is given back to the classes.
PRIOR_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Features that hardly vary say nothing, and must not be blown up.
LEAST_DEVIATION = 1e-5
_ROWS_AT_ONCE = 1024

OnEpoch = Callable[[int, float, float], object]
# What a network sees of some rounds: `[n, num_inputs] float32`. Asked for a few rounds at a time: of large targets, a float32 copy
# of all features would not fit into memory.
Columns = Callable[[Rounds], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Parts:
    """Rounds by what they are for; no prompt is in two of them.

    Attributes:
        train: for the weights.
        choose: for the best epoch, the thresholds, and how much of the class weights is taken back.
        held_out: for the figures.
    """

    train: Rounds
    choose: Rounds
    held_out: Rounds


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """The paper's, where it says.

    Attributes:
        num_epochs: at most.
        learning_rate: at the start; it falls along a half cosine to a hundredth of that.
        patience: training ends when so many epochs have not made the loss on the choosing rounds any less.
    """

    num_epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    patience: int = 6
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """A head, ready for use, and how it came to be.

    Attributes:
        head: in evaluation mode, on the CPU.
        epoch: the one that was kept, from 1.
        losses: of every epoch, (training, choosing).
        prior_share: how much of the class weights was taken back, 0..1.
    """

    head: LengthHead
    epoch: int
    losses: list[tuple[float, float]]
    prior_share: float


def split(rounds: Rounds, seed: int, choose_share: float = 0.1, held_out_share: float = 0.2) -> Parts:
    """Split by prompt, the same for the same seed and prompts.

    Raises:
        ConfigError: the rounds are of too few prompts.
    """
    prompts = torch.unique(rounds.prompts)
    if len(prompts) < LEAST_PROMPTS:
        raise ConfigError(
            len(prompts), f"rounds of at least {LEAST_PROMPTS} prompts, some of them to be held out", "--prompts"
        )
    shuffled = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))]
    num_held_out = max(1, round(held_out_share * len(prompts)))
    num_choose = max(1, round(choose_share * len(prompts)))
    held_out, choose = shuffled[:num_held_out], shuffled[num_held_out : num_held_out + num_choose]
    train = shuffled[num_held_out + num_choose :]
    return Parts(*(rounds.select(torch.isin(rounds.prompts, some)) for some in (train, choose, held_out)))


def class_weights(labels: torch.Tensor) -> torch.Tensor:
    """`[3]`, inverse to how frequent each class is, 1 on average over the rounds; a class that never comes up counts as one round.

    Args:
        labels: `[n] int64`.
    """
    counts = torch.bincount(labels, minlength=NUM_CLASSES).clamp(min=1).float()
    return counts.sum() / (NUM_CLASSES * counts)


def features_of(rounds: Rounds) -> torch.Tensor:
    """`[n, num_features] float32`: the target's features, which are what the head sees."""
    return rounds.features.float()


def train(
    rounds: Rounds,
    choosing: Rounds,
    settings: TrainSettings,
    columns: Columns = features_of,
    on_epoch: OnEpoch = lambda *_: None,
) -> Trained:
    """Train a head with cross-entropy; the epoch with the least loss on the choosing rounds is kept.

    Args:
        columns: what it sees of each round.
        on_epoch: called after each with (number from 1, training loss, choosing loss).
    """
    labels = rounds.labels
    # The caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(settings.seed)
        head = LengthHead(columns(rounds.select(slice(1))).shape[1])
        _standardise(head, rounds, columns)
        weights = class_weights(labels)
        optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        num_steps = settings.num_epochs * -(-len(labels) // settings.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, num_steps, eta_min=settings.learning_rate / 100
        )
        best, best_epoch, losses = _state(head), 0, []
        for epoch in range(1, settings.num_epochs + 1):
            head.train()
            total = 0.0
            for batch in _batches(len(labels), settings.batch_size):
                loss = nn.functional.cross_entropy(head(columns(rounds.select(batch))), labels[batch], weights)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += float(loss.detach()) * len(batch)
            on_choosing = _loss(head, choosing, columns, weights)
            losses.append((total / len(labels), on_choosing))
            on_epoch(epoch, *losses[-1])
            if on_choosing <= min(one for _, one in losses):
                best, best_epoch = _state(head), epoch
            if epoch - best_epoch >= settings.patience:
                break
        head.load_state_dict(best)
    head.eval()
    share = _take_weights_back(head, weights, choosing, columns)
    return Trained(head, best_epoch, losses, share)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of 32 rows are too small to be shared: threads that wait for each other make them slower tenfold."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def predict(head: nn.Module, rounds: Rounds, columns: Columns = features_of) -> torch.Tensor:
    """`[n] int64`, the class of each round."""
    return logits_of(head, rounds, columns).argmax(dim=1)


def logits_of(head: nn.Module, rounds: Rounds, columns: Columns = features_of) -> torch.Tensor:
    """`[n, 3]`, in evaluation mode, some rounds at a time."""
    head.eval()
    with torch.inference_mode():
        return torch.cat([head(part) for part in _parts(rounds, columns)])


def _parts(rounds: Rounds, columns: Columns) -> Iterator[torch.Tensor]:
    for start in range(0, len(rounds), _ROWS_AT_ONCE):
        yield columns(rounds.select(slice(start, start + _ROWS_AT_ONCE)))


def joint_inputs(rounds: Rounds, *, with_features: bool = True) -> torch.Tensor:
    """Features and the draft's confidences as log-odds: what a head could see that runs where both are known.

    At temperature 0 all confidences of the chunk; at temperature > 0 the first one only: the later ones depend on what was
    drawn, and whether a drawn token is submitted must not (rule 2 of the design, section 3). Those are 0, and a last column
    says which case it is.

    Args:
        with_features: without, the confidences alone.

    Returns:
        `[n, num_features + gamma + 1] float32`.
    """
    odds = torch.logit(rounds.top_probs.double().clamp(1e-4, 1 - 1e-4)).float()
    is_sampled = rounds.temperatures > 0
    odds[:, 1:][is_sampled] = 0.0
    columns = [odds, is_sampled.float()[:, None]]
    return torch.cat([rounds.features.float(), *columns] if with_features else columns, dim=1)


def _standardise(head: LengthHead, rounds: Rounds, columns: Columns) -> None:
    mean = torch.zeros(head.num_features, dtype=torch.float64)
    for part in _parts(rounds, columns):
        mean += part.double().sum(dim=0) / len(rounds)
    variance = torch.zeros_like(mean)
    for part in _parts(rounds, columns):
        variance += (part.double() - mean).square().sum(dim=0) / len(rounds)
    deviation = variance.sqrt()
    scale = torch.where(deviation > LEAST_DEVIATION, deviation, torch.ones_like(deviation))
    head.standardise(mean.float(), scale.float())


def _state(head: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}


def _batches(num_rows: int, batch_size: int) -> Iterator[torch.Tensor]:
    yield from torch.randperm(num_rows).split(batch_size)


def _loss(head: nn.Module, rounds: Rounds, columns: Columns, weights: torch.Tensor) -> float:
    return float(nn.functional.cross_entropy(logits_of(head, rounds, columns), rounds.labels, weights))


def shift_classes(head: LengthHead, shifts: tuple[float, float]) -> None:
    """Take so much from the logits of classes 0 and 2 for good (see `head_rules.best_shifts`).

    Mutates: the last bias of the head.
    """
    zero, two = shifts
    _shift(head, torch.tensor([zero, 0.0, two]))


def _shift(head: LengthHead, less: torch.Tensor) -> None:
    last = [one for one in head.modules() if isinstance(one, nn.Linear)][-1]
    with torch.no_grad():
        last.bias.sub_(less)


def _take_weights_back(head: LengthHead, weights: torch.Tensor, rounds: Rounds, columns: Columns) -> float:
    """Shift the classes by the share of the log-weights that makes most of the choosing rounds come out right; returns it.

    Mutates: the last bias of the head.
    """
    logits, shift, labels = logits_of(head, rounds, columns), weights.log(), rounds.labels

    def correct(share: float) -> int:
        return int(((logits - share * shift).argmax(dim=1) == labels).sum())

    best = max(PRIOR_SHARES, key=correct)
    _shift(head, best * shift)
    return best


def balanced_accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the classes that come up of how many of them are named right."""
    shares: Sequence[float] = [
        float((predicted[labels == one] == one).float().mean()) for one in range(NUM_CLASSES) if (labels == one).any()
    ]
    return math.fsum(shares) / len(shares)
