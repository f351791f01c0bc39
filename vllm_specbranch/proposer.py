"""The proposer: tells the draft server what the target decided, and hands its drafts to vLLM's scheduler.

Owns the order of messages of an engine step and which requests the server knows. vLLM makes one per target worker
(`custom_class`); it is active on the output rank only. Everything it knows of vLLM's V1 model runner is in `_Runner`. Runs in
the target's worker.

    execute_model  -> begin_step      opens and closes go out; the draft's prefill runs while the target's does
    sample         -> propose         outcomes go out; nothing is waited for
    (outputs are queued)
    take_draft_token_ids -> collect   the reply comes in, within the reply timeout
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds

from vllm_specbranch import messages
from vllm_specbranch.draft_distributions import ChunkDistributions, SampledDraftTokenIds, is_sound, most_top_m
from vllm_specbranch.draft_link import LINK_GONE, DraftLink
from vllm_specbranch.draft_sampling import seeded_key, unseeded_key
from vllm_specbranch.draft_side import make_link
from vllm_specbranch.engine_pace import EnginePace
from vllm_specbranch.metrics import EngineCounters, rates
from vllm_specbranch.ray_cluster import target_place
from vllm_specbranch.scheduler import SpecBranchSchedulerOutput
from vllm_specbranch.scorer import Scorer
from vllm_specbranch.snapshots import Sample
from vllm_specbranch.speculative_config import SpecBranchSpeculativeConfig
from vllm_specbranch.target_head import FeatureObserver, TargetHead

logger = logging.getLogger("vllm.specbranch.proposer")

# The server stops waiting for its own draft steps in time for the reply to arrive before the timeout.
WAIT_SHARE = 0.5
STATUS_TIMEOUT_S = 2.0
# vLLM's own limit: below it a request is greedy.
GREEDY_TEMPERATURE = 1e-5
# Five bytes a token at most, so well below the limit of one message.
MAX_TOKENS_PER_MESSAGE = 500_000


class _InputBatch(Protocol):
    req_ids: list[str]


class _Runner(Protocol):
    """What is used of vLLM's V1 model runner."""

    input_batch: _InputBatch


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _survives(
    fallback: Callable[_P, _T],
) -> Callable[[Callable[Concatenate["Proposer", _P], _T]], Callable[Concatenate["Proposer", _P], _T]]:
    """Let no failure of ours reach vLLM: the first one is logged with its trace, and drafting is over for this engine.

    Args:
        fallback: what to return then; takes the method's arguments.
    """

    def decorate(method: Callable[Concatenate["Proposer", _P], _T]) -> Callable[Concatenate["Proposer", _P], _T]:
        @functools.wraps(method)
        def guarded(self: "Proposer", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
            try:
                return method(self, *args, **kwargs)
            except Exception:
                logger.exception("specbranch failed in %s; this engine goes on without drafts", method.__name__)
                self.give_up()
                return fallback(*args, **kwargs)

        return guarded

    return decorate


def _num_decode_tokens(scheduled: SchedulerOutput) -> int:
    """Tokens of a step that verifies and does nothing else; 0 for one with a prefill."""
    num_verified = len(scheduled.num_scheduled_tokens) + sum(map(len, scheduled.scheduled_spec_decode_tokens.values()))
    return num_verified if scheduled.total_num_scheduled_tokens == num_verified else 0


class Proposer:
    """vLLM's custom proposer for `method: specbranch`.

    Args:
        vllm_config: of the target; its speculative config is a `SpecBranchSpeculativeConfig`.

    Attributes:
        counters: of this engine.
        feature_observer: called once per step, before the commits go out, with what the length head sees; only where the target's
            hidden states are taken (a trained head, or `head_layers`), on the output rank.
        draft_observer: called with each draft that goes to the scheduler, as it came. With `head_layers` it carries
            `top_probs`.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        speculative = vllm_config.speculative_config
        assert isinstance(speculative, SpecBranchSpeculativeConfig)
        self._config = speculative.specbranch
        self._seed: int = vllm_config.model_config.seed
        # Engines of one data-parallel group have one seed, and must not draw alike.
        self._rank: int = vllm_config.parallel_config.data_parallel_index
        self._max_top_m = most_top_m(self._config, vllm_config.scheduler_config.max_num_seqs)
        self._max_model_len: int = vllm_config.model_config.max_model_len
        self._vocab_size: int = vllm_config.model_config.get_vocab_size()
        self.counters = EngineCounters()
        self.scorer = Scorer(self.counters, self._vocab_size)
        self._head = TargetHead(speculative.feature_layers, self._config.trained_head, self.counters)
        self.feature_observer: FeatureObserver | None = None
        self.draft_observer: Callable[[messages.Draft], None] | None = None
        self._report: messages.Report | None = None
        self._runner: _Runner | None = None
        self._link: DraftLink | None = None
        self._expected: dict[str, int] = {}
        self._has_given_up = False
        if get_tensor_model_parallel_rank() == 0:
            max_num_seqs = vllm_config.scheduler_config.max_num_seqs
            try:
                self._link = self._open_link(speculative, self._vocab_size, max_num_seqs, vllm_config.parallel_config)
            except Exception:
                logger.exception("specbranch cannot start its draft server; this engine goes on without drafts")
                self.give_up()
        self._generation = 0
        self._known: set[str] = set()
        self._undraftable: set[str] = set()
        # What the draft server has no place for, in the order in which it is tried again.
        self._turned_away: dict[str, None] = {}
        self._sampling: dict[str, messages.Sampling | None] = {}
        self._num_requests = 0
        self._round = 0
        self._may_wait = False
        self._pace = EnginePace(self._config.reply_timeout_ms)

    def _open_link(
        self, speculative: SpecBranchSpeculativeConfig, vocab_size: int, max_num_seqs: int, parallel_config: Any
    ) -> DraftLink:
        on_ray = self._config.is_on_ray
        link = make_link(
            self._config,
            speculative.draft,
            vocab_size=vocab_size,
            max_model_len=self._max_model_len,
            max_num_seqs=max_num_seqs,
            counters=self.counters,
            target=target_place(parallel_config, speculative.ray_address) if on_ray else None,
        )
        # The server takes as long to start as the target does: start both at once.
        try:
            link.poll()
        except BaseException:
            link.close()
            raise
        return link

    # --- what vLLM calls --------------------------------------------------------------------------------------------------

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """The draft model is loaded by the draft server: nothing to do here."""

    def attach(self, runner: _Runner) -> None:
        """Take the model runner, whose batch order `propose` needs."""
        self._runner = runner

    def load_head(self, runner: Any) -> None:
        """Prepare a loaded target for the length head, on every rank; see `TargetHead.load`."""
        self._head.load(runner, self._link is not None)

    def take_hidden_states(
        self,
        num_scheduled: Mapping[str, int],
        num_draft_tokens: Sequence[int] | None,
        sampled: Sequence[Sequence[int]],
        hidden_states: Sequence[Any],
    ) -> None:
        """Take the target's hidden states of this step; on every rank, whether or not we have given up. See `TargetHead.take`."""
        self._head.take(num_scheduled, num_draft_tokens, sampled, hidden_states, self._link is not None)

    @_survives(lambda timeout_s: None)
    def wait_until_up(self, timeout_s: float) -> None:
        """Wait for the draft server while the engine starts, so that the first request is drafted for."""
        if self._link is not None and not self._link.wait_until_up(timeout_s):
            logger.warning("The draft server did not start; requests are decoded without drafts until it does.")

    @_survives(lambda scheduled: None)
    def begin_step(self, scheduled: SchedulerOutput) -> None:
        """Take in what this step verifies, on every rank. On the output rank send opens and closes, look after the draft server."""
        ours = scheduled if isinstance(scheduled, SpecBranchSchedulerOutput) else None
        self.scorer.begin_step(scheduled.scheduled_spec_decode_tokens, ours.draft_distributions if ours else {})
        if self._link is None:
            return
        started_s = time.perf_counter()
        self._pace.begin(started_s, _num_decode_tokens(scheduled))
        self._may_wait = ours is not None and not ours.num_waiting_requests
        self.scorer.check_origin()
        self._link.poll()
        if self._link.generation != self._generation:
            self._generation = self._link.generation
            self._known.clear()
            self._turned_away.clear()
        closes = [one for one in scheduled.finished_req_ids if one in self._known]
        for request_id in list(self._turned_away)[: len(closes)]:
            del self._turned_away[request_id]
        for request_id in scheduled.finished_req_ids:
            self._forget(request_id)
        for request in scheduled.scheduled_new_reqs:
            self._sampling[request.req_id] = self._sampling_of(request)
        opens = [self._open(one) for one in scheduled.scheduled_new_reqs if self._is_draftable(one)]
        if opens or closes:
            self._send_step(opens, closes)
        self.counters.propose_s += time.perf_counter() - started_s

    @_survives(lambda sampled_token_ids, *_args, **_kwargs: [[] for _ in sampled_token_ids])
    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: npt.NDArray[np.int32],
        token_ids_cpu: npt.NDArray[np.int32],
        slot_mappings: object = None,
    ) -> list[list[int]]:
        """Send what the target decided; drafts are collected later.

        Args:
            sampled_token_ids: per row of the batch the committed tokens of this step, empty for an unfinished prefill.
            num_tokens_no_spec: `[num_reqs]`, committed tokens per row, these included.
            token_ids_cpu: `[num_reqs, max_model_len]`, all tokens per row.
            slot_mappings: unused.

        Returns:
            An empty list per row: vLLM requires lists, and asks for the drafts again in `take_draft_token_ids`.
        """
        del slot_mappings
        nothing: list[list[int]] = [[] for _ in sampled_token_ids]
        if self._link is None or self._runner is None:
            return nothing
        started_s = time.perf_counter()
        self._pace.sampled(started_s)
        commits: list[messages.Commit] = []
        opens: list[messages.Open] = []
        self._expected = {}
        request_ids = self._runner.input_batch.req_ids
        classes = self._head.classes(request_ids, sampled_token_ids, num_tokens_no_spec, self.feature_observer)
        for row, tokens in enumerate(sampled_token_ids):
            if not tokens:
                self._may_wait = False
                continue
            request_id, num_tokens = request_ids[row], int(num_tokens_no_spec[row])
            self.scorer.observe(request_id, len(tokens))
            if not self._link.is_up or num_tokens >= self._link.draft_max_model_len:
                continue
            if request_id in self._known:
                position, num_draft_tokens = num_tokens - len(tokens), self.scorer.num_scheduled(request_id)
                head_class = classes.get(request_id)
                commits.append(messages.Commit(request_id, position, list(tokens), num_draft_tokens, head_class))
                self._expected[request_id] = num_tokens
            elif request_id not in self._undraftable and request_id not in self._turned_away:
                sampling = self._sampling.get(request_id)
                opens.append(messages.Open(request_id, token_ids_cpu[row, :num_tokens].tolist(), sampling))
        if opens:
            self._send_step(opens, [])
        self._send_commits(commits)
        finished_s = time.perf_counter()
        self._pace.sent(finished_s)
        self.counters.propose_s += finished_s - started_s
        return nothing

    @_survives(lambda: None)
    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Collect the reply to this step's commits; what does not come within the reply timeout is not drafted."""
        if self._link is None or not self._expected:
            return None
        started_s = time.perf_counter()
        self._pace.looked(started_s)
        if self._config.deterministic:
            reply = self._link.receive_patiently(self._round)
        else:
            reply = self._link.receive(self._round, self._pace.reply_timeout_ms)
        finished_s = time.perf_counter()
        waited_s = finished_s - started_s
        self.counters.wait_s += waited_s
        self.counters.longest_wait_s = max(self.counters.longest_wait_s, waited_s)
        expected, self._expected = self._expected, {}
        if reply is None:
            return None
        self.counters.num_replies += 1
        self._report = reply.report
        if reply.report is not None:
            answer_us = reply.report.counters.get("answer_us", 0)
            self.counters.messages_s += self._pace.answered(finished_s, waited_s, answer_us)
        self._known.difference_update(reply.unknown)
        if reply.is_full:
            self._turned_away |= dict.fromkeys(one for one in reply.unknown if one in expected)
        drafts = SampledDraftTokenIds([], [])
        for draft in reply.drafts:
            if not draft.tokens or max(draft.tokens) >= self._vocab_size:
                continue
            if expected.get(draft.request_id) == draft.position:
                self._hand_over(draft, drafts)
        return drafts

    @_survives(lambda drafts: drafts)
    def with_sample(self, drafts: DraftTokenIds | None) -> DraftTokenIds | None:
        """Let the numbers for `/metrics` go to the scheduler with a step's drafts, also where there are none; output rank only."""
        if self._link is None and not self._has_given_up:
            return drafts
        ours = drafts if isinstance(drafts, SampledDraftTokenIds) else SampledDraftTokenIds([], [])
        state: dict[str, float] = {
            "has_given_up": self._has_given_up,
            "reply_timeout_s": self._pace.reply_timeout_ms / 1e3,
        }
        state |= self._link.state() if self._link else LINK_GONE
        ours.sample = Sample(self.counters.as_dict(), state, self._report)
        self._report = None
        return ours

    def _hand_over(self, draft: messages.Draft, drafts: SampledDraftTokenIds) -> None:
        """Add one request's draft to what goes to the scheduler."""
        if self.draft_observer is not None:
            self.draft_observer(draft)
        drafts.req_ids.append(draft.request_id)
        drafts.draft_token_ids.append(draft.tokens[: self._config.num_speculative_tokens])
        self.scorer.hand_over(draft.request_id, draft.tokens)
        if not draft.q_ids:
            return
        if is_sound(draft, self._vocab_size):
            known = ChunkDistributions(draft.position, tuple(draft.tokens), draft.q_ids, draft.q_probs)
            drafts.distributions[draft.request_id] = known
        else:
            self.counters.num_unsound_distributions += 1

    def shutdown(self) -> None:
        """End the draft server. Safe to call again."""
        if self._link is not None:
            self._link.close()

    def give_up(self) -> None:
        """End drafting for good; vLLM goes on as if there were no proposer."""
        link, self._link = self._link, None
        self._expected = {}
        self._has_given_up = True
        if link is not None:
            with contextlib.suppress(Exception):
                link.close()

    # --- details ----------------------------------------------------------------------------------------------------------

    def _is_draftable(self, request: NewRequestData) -> bool:
        """Whether the draft model can follow a request: text given as token ids, within the draft's context."""
        assert self._link is not None
        is_text = request.prompt_token_ids is not None and request.prompt_embeds is None and not request.mm_features
        if not is_text or len(request.req_id) > messages.MAX_ID_LENGTH:
            self._undraftable.add(request.req_id)
            return False
        assert request.prompt_token_ids is not None
        return self._link.is_up and len(request.prompt_token_ids) < self._link.draft_max_model_len

    def _open(self, request: NewRequestData) -> messages.Open:
        assert request.prompt_token_ids is not None
        return messages.Open(request.req_id, request.prompt_token_ids, self._sampling.get(request.req_id))

    def _sampling_of(self, request: NewRequestData) -> messages.Sampling | None:
        """How the drafts of a request are drawn; None for greedy ones.

        With structured output vLLM cuts a chunk at the first token that the grammar does not allow, which is a look at what was
        drawn: such a request is drafted for greedily and verified as one-hot (rule 2 of the design, section 3).
        """
        params = request.sampling_params
        self._num_requests += 1
        if self._config.draft_sample_method == "greedy" or params is None or params.structured_outputs is not None:
            return None
        if params.temperature < GREEDY_TEMPERATURE:
            return None
        key = (
            unseeded_key(self._seed, self._rank, self._num_requests) if params.seed is None else seeded_key(params.seed)
        )
        # What the target's top_k will never take need not be drafted.
        top_m = min(self._max_top_m, params.top_k) if params.top_k > 0 else self._max_top_m
        return messages.Sampling(params.temperature, top_m, key)

    def _send_step(self, opens: list[messages.Open], closes: list[str]) -> None:
        """Send opens and closes; after a restart all requests are opened at once, so large prompts get a message each."""
        assert self._link is not None
        if sum(len(one.tokens) for one in opens) > MAX_TOKENS_PER_MESSAGE and len(opens) > 1:
            half = len(opens) // 2
            self._send_step(opens[:half], closes)
            self._send_step(opens[half:], [])
        elif self._link.send(messages.StepBegin(opens, closes)):
            self._known.update(one.request_id for one in opens)

    def _forget(self, request_id: str) -> None:
        self._known.discard(request_id)
        self._undraftable.discard(request_id)
        self._turned_away.pop(request_id, None)
        self._sampling.pop(request_id, None)
        self.scorer.forget(request_id)

    def _send_commits(self, commits: list[messages.Commit]) -> None:
        if not commits:
            return
        assert self._link is not None
        self._round += 1
        max_wait_ms = WAIT_SHARE * self._pace.reply_timeout_ms if self._may_wait else 0.0
        self.counters.num_commit_batches += 1
        if not self._link.send(messages.CommitBatch(self._round, max_wait_ms, commits, self._pace.message)):
            self._expected = {}

    def status(self) -> dict[str, Any]:
        """Counters of both sides and the rates made from them; plain values only. Asks the draft server, so it takes a while."""
        if self._link is None and not self._has_given_up:
            return {}
        server = self._link.query_status(STATUS_TIMEOUT_S) if self._link else None
        engine = self.counters.as_dict()
        server_counters = dict(server.counters) if server else {}
        return {
            "engine": engine,
            "accepted_by_position": dict(self.counters.accepted_by_position),
            "drafted_by_position": dict(self.counters.drafted_by_position),
            "rates": rates(engine, server_counters),
            "server": server_counters,
            "server_timings_us": dict(server.timings_us) if server else {},
            "num_requests": server.num_requests if server else None,
            "num_blocks_held": server.num_blocks_held if server else None,
            "num_blocks": server.num_blocks if server else None,
            "is_up": self._link is not None and self._link.is_up,
            "server_pid": self._link.server_pid if self._link else None,
            "round_s": self._pace.round_s,
        }
