"""A reference of speculative decoding with sampled drafts, in plain Python, and the exact enumeration of its outcomes.

Owns three things. `enumerate_outcomes` runs a program once per sequence of random choices and adds up their probabilities, so
that a distribution is computed and not sampled. `Generation` is one request of the system from its first output token to its
last: the draft model's draws, chunks, branches, evictions and losses, and the verification; every rule of the design's section 3
is a method, so that a test can break one. As in the product, the draft's stream has a number for each prefix, so a token that was
drawn at a prefix comes out again there. `verify` is the same verification with its random numbers given, to be compared with
vLLM's rejection sampler. The real `draft_sampling.draw` runs inside, with a `LazyUniform` for its number. No model, no tensors,
no clock.

    output        chunk, drawn at once                 outcome of the round
    t0 ... t[i-1] x[i] ... x[i+n-1]  | candidates      x[i] ... x[i+a-1] y      a accepted, then y from the target
    number        of t0 ... x[i-1]   | none: not drawn the target's own
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Generic, TypeVar, cast

from vllm_specbranch.draft_sampling import draw

Prefix = tuple[int, ...]  # Output tokens; the position of the next one is its length.
Row = tuple[float, ...]  # `[vocab_size]` probabilities of the next token.
Table = Callable[[Prefix], Row]
Outcome = TypeVar("Outcome", bound=Hashable)

# Options that are rounding dust of float64 are never taken; what they weigh is lost to no one who looks at 1e-9.
DUST = 1e-13
MAX_PATHS = 300_000


class World:
    """The random choices of one run: the first ones as scripted, after them always the first option.

    Args:
        script: which option to take at each fork, by its rank among the possible ones.
    """

    def __init__(self, script: Sequence[int]) -> None:
        self._script = script
        self.trail: list[tuple[int, int]] = []  # Of each fork so far: rank taken, number of options.
        self.probability = 1.0

    def choose(self, weights: Sequence[float]) -> int:
        """Take option i with probability `weights[i] / sum(weights)`; one that is certain is no fork."""
        total = sum(weights)
        least = DUST * total
        options = [index for index, weight in enumerate(weights) if weight > least]
        if len(options) == 1:
            return options[0]
        depth = len(self.trail)
        rank = self._script[depth] if depth < len(self._script) else 0
        self.trail.append((rank, len(options)))
        self.probability *= weights[options[rank]] / total
        return options[rank]

    def happens(self, probability: float) -> bool:
        """An event of its own."""
        return probability > 0.0 and self.choose((1.0 - probability, probability)) == 1


class Explorer(Generic[Outcome]):
    """Depth-first search over all choices of a program, which is run from its start for each path.

    Args:
        program: must do the same whenever the same options are taken.
    """

    def __init__(self, program: Callable[[World], Outcome]) -> None:
        self._program = program
        self.num_paths = 0

    def run(self) -> dict[Outcome, float]:
        """The probability of each outcome.

        Raises:
            RuntimeError: there are more than `MAX_PATHS` paths, or the probabilities do not add up to 1, which a program
                that is no function of its choices brings about.
        """
        outcomes: dict[Outcome, float] = {}
        script: list[int] = []
        while True:
            world = World(script)
            outcome = self._program(world)
            outcomes[outcome] = outcomes.get(outcome, 0.0) + world.probability
            self.num_paths += 1
            trail = world.trail
            while trail and trail[-1][0] + 1 == trail[-1][1]:
                trail.pop()
            if not trail:
                break
            if self.num_paths >= MAX_PATHS:
                raise RuntimeError(f"more than {MAX_PATHS} paths")
            script = [rank for rank, _ in trail]
            script[-1] += 1
        if abs(sum(outcomes.values()) - 1.0) > 1e-10:
            raise RuntimeError(
                f"probabilities of {self.num_paths} paths add up to {sum(outcomes.values())!r}, not to 1"
            )
        return outcomes


def enumerate_outcomes(program: Callable[[World], Outcome]) -> dict[Outcome, float]:
    """The exact distribution of what a program returns."""
    return Explorer(program).run()


class LazyUniform:
    """One uniform number of [0, 1), known only as far as it has been compared: it lies in `[low, high)`.

    Stands where the real code has a float. All comparisons agree with each other, as those of one number do.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.low = 0.0
        self.high = 1.0

    def __lt__(self, bound: float) -> bool:
        if bound >= self.high:
            return True
        if bound <= self.low:
            return False
        is_below = self._world.choose((bound - self.low, self.high - bound)) == 0
        if is_below:
            self.high = bound
        else:
            self.low = bound
        return is_below

    __le__ = __lt__  # A single number has probability 0.


def accept_probability(p: Row, q: Mapping[int, float] | None, token: int) -> float:
    """min(1, p / q) of a draft token; q is 1 at the token if it has no q (one-hot). Padding (-1) is never accepted."""
    if token < 0:
        return 0.0
    drafted = 1.0 if q is None else q.get(token, 0.0)
    return min(1.0, p[token] / drafted) if drafted > 0.0 else 0.0


def residual(p: Row, q: Mapping[int, float] | None, token: int) -> list[float]:
    """(p - q)+, not normalised: what a recovered token is sampled from after `token` was rejected."""
    if q is None:
        return [0.0 if index == token else prob for index, prob in enumerate(p)]
    return [max(prob - q.get(index, 0.0), 0.0) for index, prob in enumerate(p)]


def verify(
    tokens: Sequence[int],
    q_rows: Sequence[Mapping[int, float] | None],
    p_rows: Sequence[Sequence[float]],
    bonus: int,
    uniforms: Sequence[float],
    noise: Sequence[float],
) -> list[int]:
    """Verification of one chunk with its random numbers given, as vLLM's rejection sampler takes them.

    Args:
        tokens: `[n]` draft tokens.
        q_rows: `[n]` what each was drawn from, by token id; None for one-hot.
        p_rows: `[n][vocab_size]` the target's distribution at each.
        bonus: token sampled from the target after all of them.
        uniforms: `[n]` a token is accepted if `p / q >= u`.
        noise: `[vocab_size]` exponential variates; the recovered token has the greatest `(p - q)+ / noise`, the lowest id of
            equal ones.

    Returns:
        The committed tokens: 1 to n + 1.
    """
    committed: list[int] = []
    for token, q, row, number in zip(tokens, q_rows, p_rows, uniforms, strict=True):
        p = tuple(row)
        accepted = accept_probability(p, q, token)
        # A token that cannot be accepted for want of a q is not, even at u = 0.
        if token < 0 or (q is not None and q.get(token, 0.0) <= 0.0) or not number <= accepted:
            scores = [left / variate for left, variate in zip(residual(p, q, token), noise, strict=True)]
            return [*committed, scores.index(max(scores))]
        committed.append(token)
    return [*committed, bonus]


@cache
def top(row: Row, count: int) -> tuple[int, ...]:
    """The most likely token ids, best first, the lower id first of equal ones; none without probability."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    return tuple(token for token in order[:count] if row[token] > 0.0)


@cache
def truncated(row: Row, count: int) -> Mapping[int, float]:
    """The most likely tokens of a row, best first, with their probabilities renormalised."""
    kept = top(row, count)
    total = sum(row[token] for token in kept)
    return MappingProxyType({token: row[token] / total for token in kept})


def capped(weights: Sequence[float], cap: int) -> Sequence[float]:
    """The weights of min(i, cap) for an i with these: numbers beyond the cap make no difference, and are no fork."""
    return weights if len(weights) <= cap else (*weights[:cap], sum(weights[cap:]))


def never_stops(prefix: Prefix, row: Row) -> bool:
    """No rule: chunks end at gamma or where the drafts do."""
    del prefix, row
    return False


@dataclass(frozen=True)
class Rules:
    """How the system drafts, and what befalls it. Probabilities are those of events independent of everything drawn.

    Attributes:
        horizon: number of output tokens of the request.
        gamma: most tokens in a chunk.
        top_m: the draft's distribution is cut to so many tokens and renormalised.
        stops: whether a chunk ends at a prefix, from the prefix and the draft's full distribution there.
        num_branches: candidates forked at the branch point, the end of the chunk.
        forks_everywhere: candidates are forked at every position of the chunk as well.
        waits: `[..]` weight of each number of draft steps that a miss leaves time for.
        evictions: per round: the drafts are dropped after they were drawn, and drawn again as after a miss.
        lost_replies: per round: the chunk is drawn and not verified.
        trims: per round: the scheduler admits only some number of tokens below gamma, each as likely.
        lost_records: per token: its q is lost on the way, and it is verified as one-hot.
        is_greedy: the draft takes its first choice, verified as one-hot.
    """

    horizon: int
    gamma: int
    top_m: int
    stops: Callable[[Prefix, Row], bool] = never_stops
    num_branches: int = 0
    forks_everywhere: bool = False
    waits: tuple[float, ...] = (1.0,)
    evictions: float = 0.0
    lost_replies: float = 0.0
    trims: float = 0.0
    lost_records: float = 0.0
    is_greedy: bool = False


@dataclass(frozen=True)
class Drafted:
    """A draft token under verification: where it was drawn, and from what (None: one-hot)."""

    prefix: Prefix
    token: int
    q: Mapping[int, float] | None


class Generation:
    """One request, round by round: draft, verify, commit. Each rule is a method, so that a test can break one.

    Args:
        world: makes all random choices.
        target: p.
        draft: q, neither truncated nor renormalised.
        rules: see there.
    """

    def __init__(self, world: World, target: Table, draft: Table, rules: Rules) -> None:
        self.world = world
        self.target = target
        self.draft = draft
        self.rules = rules
        self.output: Prefix = ()
        self.numbers: dict[Hashable, LazyUniform] = {}
        self.tokens: dict[Prefix, int] = {}  # What was drawn at a prefix and is remembered.
        self.nodes: set[Prefix] = set()  # The token tree below the output.
        self.num_ready = rules.gamma  # The first draft has all the time of the target's prefill.

    def run(self) -> Prefix:
        """All output tokens."""
        while len(self.output) < self.rules.horizon:
            self.commit(self.verified(self.submitted()))
        return self.output

    # The draft model's side.

    def number(self, prefix: Prefix) -> LazyUniform:
        """The number of the request's stream that a draw at this prefix uses, and no draw at any other."""
        return self.stream(prefix)

    def stream(self, key: Hashable) -> LazyUniform:
        """The stream itself: one independent number per key."""
        return self.numbers.setdefault(key, LazyUniform(self.world))

    def truncated(self, prefix: Prefix) -> Mapping[int, float]:
        """The distribution that is drawn from, by token id."""
        return truncated(self.draft(prefix), self.rules.top_m)

    def drawn(self, prefix: Prefix) -> int:
        """The draft token at a prefix."""
        if prefix not in self.tokens:
            q = self.truncated(prefix)
            greedy = self.rules.is_greedy
            self.tokens[prefix] = next(iter(q)) if greedy else self.drawn_from(q, self.number(prefix))
        return self.tokens[prefix]

    def drawn_from(self, q: Mapping[int, float], number: LazyUniform) -> int:
        """One draw, by the real code."""
        return list(q)[draw(list(q.values()), cast(float, number))]

    def recorded(self, prefix: Prefix, token: int) -> Mapping[int, float] | None:
        """The q that goes to the target with the token drawn at a prefix."""
        del token
        return None if self.rules.is_greedy else self.truncated(prefix)

    def enters(self, prefix: Prefix) -> bool:
        """Whether the token drawn at a prefix belongs to the chunk: a look at the prefix only."""
        return not self.rules.stops(prefix, self.draft(prefix))

    def chain(self) -> list[Drafted]:
        """What the draft server would submit now."""
        chunk: list[Drafted] = []
        prefix = self.output
        limit = min(self.num_ready, self.rules.gamma, self.rules.horizon - len(prefix))
        while len(chunk) < limit and self.enters(prefix):
            token = self.drawn(prefix)
            chunk.append(Drafted(prefix, token, self.recorded(prefix, token)))
            prefix += (token,)
        return chunk

    def grow(self, chunk: Sequence[Drafted]) -> None:
        """Put the chunk and the candidates into the tree; the candidates are the draft's first choices, not drawn."""
        ends = [drafted.prefix for drafted in chunk] if self.rules.forks_everywhere else []
        branch_point = (*self.output, *(drafted.token for drafted in chunk))
        for prefix in (*ends, branch_point):
            self.nodes.update((*prefix, token) for token in top(self.draft(prefix), self.rules.num_branches))
        self.nodes.update((*drafted.prefix, drafted.token) for drafted in chunk)

    def steps_after_miss(self) -> int:
        """How many tokens there is time to draft below a prefix that nobody expected."""
        return self.world.choose(capped(self.rules.waits, self.rules.horizon - len(self.output)))

    def forget_drafts(self) -> None:
        """An eviction. What is drawn later at the same prefix uses the same number."""
        self.tokens.clear()
        self.nodes.clear()

    # Between the two.

    def submitted(self) -> list[Drafted]:
        """The chunk that is verified in this round."""
        chunk = self.chain()
        if chunk and self.world.happens(self.rules.evictions):
            self.forget_drafts()
            self.num_ready = self.steps_after_miss()
            chunk = self.chain()
        self.grow(chunk)
        if not chunk or self.world.happens(self.rules.lost_replies):
            return []
        return self.admitted(chunk)

    def admitted(self, chunk: list[Drafted]) -> list[Drafted]:
        """What the scheduler has room for: it admits tokens one by one, and does not ask how many there are."""
        gamma, trims = self.rules.gamma, self.rules.trims
        room = (*(trims / gamma for _ in range(gamma)), 1.0 - trims)
        return chunk[: self.world.choose(capped(room, len(chunk)))]

    def commit(self, tokens: Sequence[int]) -> None:
        """Walk the tree: on a hit a full draft may be there at once, on a miss only what there was time for."""
        self.output = (*self.output, *tokens)[: self.rules.horizon]
        if len(self.output) == self.rules.horizon:
            return
        hit = self.output in self.nodes
        self.nodes = {node for node in self.nodes if hit and node[: len(self.output)] == self.output}
        self.num_ready = self.rules.gamma if hit else self.steps_after_miss()

    # The target model's side: rejection sampling (arXiv:2211.17192, algorithm 1).

    def verified(self, chunk: Sequence[Drafted]) -> list[int]:
        """The committed tokens of a round. The one after the horizon is nobody's business and left out."""
        committed: list[int] = []
        for drafted in chunk:
            p = self.target(drafted.prefix)
            q = None if self.world.happens(self.rules.lost_records) else drafted.q
            if not self.accepts(drafted, accept_probability(p, q, drafted.token)):
                return [*committed, self.recovered(drafted, residual(p, q, drafted.token))]
            committed.append(drafted.token)
        prefix = (*self.output, *committed)
        return committed if len(prefix) == self.rules.horizon else [*committed, self.world.choose(self.target(prefix))]

    def accepts(self, drafted: Drafted, probability: float) -> bool:
        """The target's own choice to accept a draft token."""
        del drafted
        return self.world.happens(probability)

    def recovered(self, drafted: Drafted, weights: Sequence[float]) -> int:
        """The target's own choice of a token in place of a rejected one."""
        del drafted
        return self.world.choose(weights)


def autoregressive(target: Table, horizon: int) -> dict[Prefix, float]:
    """The target's own distribution of its first `horizon` tokens: what every lossless system must give."""
    reached: dict[Prefix, float] = {(): 1.0}
    for _ in range(horizon):
        reached = {
            (*prefix, token): probability * prob
            for prefix, probability in reached.items()
            for token, prob in enumerate(target(prefix))
            if prob > 0.0
        }
    return reached


def max_difference(left: Mapping[Outcome, float], right: Mapping[Outcome, float]) -> float:
    """The greatest absolute difference between the probabilities of one outcome."""
    return max(abs(left.get(outcome, 0.0) - right.get(outcome, 0.0)) for outcome in {*left, *right})


def difference(
    rules: Rules, target: Table, draft: Table, system: Callable[[World, Table, Table, Rules], Generation] = Generation
) -> float:
    """How far a system's output is from the target's own, over all outputs of `horizon` tokens."""
    outcomes = enumerate_outcomes(lambda world: system(world, target, draft, rules).run())
    return max_difference(outcomes, autoregressive(target, rules.horizon))
