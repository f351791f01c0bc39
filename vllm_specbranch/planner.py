"""Policies: what to submit, which rows to feed, when to wait. Pure decisions on a token tree; where to fork is in `branching`.

Owns the acceptance estimates and the length head that is learned while serving, no other state, no clock and no model: the draft
server measures, asks, and carries out. Runs in the draft server process.

    PEARL (arXiv:2408.11850): one chain; all drafted tokens are submitted; a miss goes on with an empty chunk.
    SpecBranch (arXiv:2506.01979): a chunk ends where the draft model is unsure, unless a length head says that none or all of it
        will be accepted (section 4, "hybrid drafting"), and k candidates are forked at that branch point (section 5, "branch
        resampling").
    fanout (SSD, arXiv:2603.03251): all drafted tokens are submitted; candidates at every position of the chunk.
    best_first (ours): a chunk is as long as its tokens pay for their verification; the likeliest outcomes are drafted for, in rows
        as many as pay for the time they add to a draft step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_specbranch.acceptance import AcceptanceModel
from vllm_specbranch.branching import Branching, num_ranks
from vllm_specbranch.config import ONLINE_HEAD, SpecBranchConfig
from vllm_specbranch.online_head import OnlineHead
from vllm_specbranch.setting_values import OnMiss
from vllm_specbranch.token_tree import Candidates, TokenTree

# Lambda of AdaEDL's bound (arXiv:2410.18351), entropy in nats.
ENTROPY_WEIGHT = 0.2
# Of a greedy row, as many probabilities are looked at one by one; the rest counts as one more outcome.
ENTROPY_CANDIDATES = 64
# What a length head says of the next draft (section 5 of the design); any other class cuts by the rules.
NONE_ACCEPTED, ALL_ACCEPTED = 0, 2
# Tokens to wait for after a miss where times must not matter.
DETERMINISTIC_WAIT_TOKENS = 4


def entropy(probs: Sequence[float]) -> float:
    """Entropy in nats of a distribution given by its largest probabilities; what they leave counts as one outcome."""
    rest = 1.0 - sum(probs)
    return -sum(prob * math.log(prob) for prob in (*probs, rest) if prob > 1e-9)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What could be submitted for a request now.

    Attributes:
        end: the node where the chunk ends, the branch point; the root for an empty chunk.
        num_tokens: draft tokens from the root (exclusive) to `end`.
        is_complete: more drafting would not make it longer.
        survival: estimated chance that all of it is accepted.
    """

    end: int
    num_tokens: int
    is_complete: bool
    survival: float


@dataclass(frozen=True, slots=True)
class WaitCosts:
    """What a longer wait is weighed against. All times in seconds.

    Attributes:
        delay_s: by how much one more draft step before the reply would hold up the engine.
        token_s: target time per committed token of one request.
        acceptance: chance that one more drafted token is accepted, 0..1.
        num_waiting: requests of this engine step; each is delayed by a wait.
        steps_per_round: draft steps that fit into a round; infinite before rounds were measured.
        price: of the verification of one more token, as in `Planner.chunk`.
    """

    delay_s: float
    token_s: float
    acceptance: float
    num_waiting: int
    steps_per_round: float = math.inf
    price: float = 0.0


class Planner:
    """The policy of one engine.

    Args:
        config: policy, chunk length, branches and rules.
    """

    def __init__(self, config: SpecBranchConfig) -> None:
        self._config = config
        self._max_chunk = config.num_speculative_tokens
        self._num_ranks = num_ranks(config)
        self._weighs_rows = config.policy == "best_first" and not config.deterministic
        # PEARL has no such rule, and measured times must not matter where drafts have to repeat themselves.
        self.weighs_load = config.policy != "pearl" and not config.deterministic
        self.acceptance = AcceptanceModel(learns=not config.deterministic)
        self.branching = Branching(config, self.acceptance)
        self._stop_rule = config.stop_rule
        self._threshold = 0.0 if config.stop_rule == "none" else config.stop_threshold
        self._takes_classes = config.policy != "pearl"
        # What it learns depends on what was served before.
        is_online = config.length_head == ONLINE_HEAD and self._takes_classes and not config.deterministic
        self.online_head = OnlineHead(config.num_speculative_tokens) if is_online else None
        self._on_miss = config.on_miss
        if config.deterministic and config.on_miss.kind == "auto":
            # What `auto` weighs are measured times.
            self._on_miss = OnMiss("wait", min(DETERMINISTIC_WAIT_TOKENS, config.num_speculative_tokens))

    def unlearned(self) -> "Planner":
        """Another one with the same settings, which has learned nothing yet."""
        return Planner(self._config)

    @property
    def num_candidates(self) -> int:
        """How many top candidates a draft step must return for a greedy row; a sampled one gets its whole distribution."""
        return max(self._num_ranks, ENTROPY_CANDIDATES) if self._stop_rule == "adaedl" else self._num_ranks

    def score(self, candidates: Candidates) -> float:
        """What the stop rule compares with its threshold: a function of the distribution, never of a token drawn from it.

        `confidence`: the top probability, the paper's q(x) (which at temperature > 0 must not be that of the drawn token).
        `adaedl`: the lower bound on the acceptance probability 1 - sqrt(lambda H(q)) of arXiv:2410.18351, 0..1.
        """
        if self._stop_rule == "adaedl":
            return max(0.0, 1.0 - math.sqrt(ENTROPY_WEIGHT * entropy(candidates.probs)))
        return candidates.probs[0]

    def chunk(self, tree: TokenTree, price: float = 0.0, length_class: int | None = None) -> Chunk:
        """The chunk that could be submitted now: along the draft's choices, up to the stop rule, the price or the limit.

        A forward stopping rule: whether a token enters depends on the distribution it was drawn from, never on the token.

        Args:
            price: least chance of acceptance that a token must have, with all before it, to be worth its verification.
            length_class: of a length head: 0 submits nothing, so that the branch point is the root; 2 knows no stop rule (the price
                is a rule of load, and holds); 1 and None are cut by the rules. Ignored by `pearl`. A function of committed tokens
                and of the root's distribution, for a sampled request.
        """
        node = tree.node(tree.root)
        survival = 1.0
        threshold = self._threshold
        if self._takes_classes and length_class == NONE_ACCEPTED:
            return Chunk(node.node_id, 0, True, survival)
        if self._takes_classes and length_class == ALL_ACCEPTED:
            threshold = 0.0
        for length in range(self._max_chunk):
            if node.candidates is None:
                return Chunk(node.node_id, length, price >= 1.0, survival)
            if node.score < threshold or survival * node.accepted < price:
                return Chunk(node.node_id, length, True, survival)
            child = node.children.get(node.choice)
            if child is None:
                return Chunk(node.node_id, length, False, survival)
            survival *= node.accepted
            node = tree.node(child)
        return Chunk(node.node_id, self._max_chunk, True, survival)

    def rows(self, tree: TokenTree) -> list[tuple[float, int]]:
        """(value, leaf) for each leaf that a draft step could feed."""
        leaves = ((leaf, tree.node(leaf)) for leaf in tree.leaves())
        return [
            (node.value, leaf) for leaf, node in leaves if node.candidates is None and node.position <= node.deepest
        ]

    def num_rows(self, values: Sequence[float], row_cost: float) -> int:
        """How many of the rows that could be fed pay for what they add to the draft step.

        All but for `best_first`, which takes as many as give the most value per time: one more as long as its value, relative to
        that of the rows before it, is more than the time it adds, relative to theirs.

        Args:
            values: `[n]` of the rows, the greatest first.
            row_cost: time that one more row adds, relative to a step with one row.
        """
        if not self._weighs_rows:
            return len(values)
        value = time = 0.0
        for index, one in enumerate(values):
            if index and one * time <= row_cost * value:
                return index
            value += one
            time += row_cost if index else 1.0
        return len(values)

    def wants_more(self, chunk: Chunk, *, hit: bool) -> bool:
        """Whether a request would wait for a longer chunk under the fixed rules (`go`, `wait:N`); `auto` always would."""
        if chunk.is_complete or self._on_miss.kind == "go":
            return False
        if self._on_miss.kind == "wait":
            return not hit and chunk.num_tokens < self._on_miss.num_tokens
        return True

    def worth_waiting(self, growing: Sequence[Chunk], costs: WaitCosts) -> bool:
        """Whether one more draft step before the reply pays, for the whole engine step (section 4 of the design).

        One more token of a chunk saves `token_s` if it is accepted, less what its verification costs; the step delays every request
        of the batch. What is not waited for is drafted anyway while the target verifies, and is there for the next round: the
        fewer steps fit into a round, the more a wait just moves tokens from one round to the next. Where they make no full chunk
        its gain counts in that proportion (as replays show, `benchmarks/replay.py`).

        Args:
            growing: the chunks that the step would make longer.
            costs: measured times.
        """
        if not growing or self._on_miss.kind != "auto":
            return bool(growing)
        share = min(1.0, costs.steps_per_round / self._max_chunk)
        worth = (chunk.survival * costs.acceptance - costs.price for chunk in growing)
        gain_s = share * sum(one for one in worth if one > 0.0) * costs.token_s
        return gain_s > costs.num_waiting * costs.delay_s
