"""The draft server in memory: right tokens, no leaked block, a reply to every commit, whatever the engine does."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft_engine import PEER, make_engine
from vllm_specbranch import messages
from vllm_specbranch.draft_loop import serve
from vllm_specbranch.draft_model import Row
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.errors import WireError
from vllm_specbranch.token_tree import Candidates
from vllm_specbranch.transport import memory_pair


@pytest.mark.parametrize("policy", ["pearl", "specbranch", "fanout", "best_first"])
def test_an_accepted_chunk_with_the_expected_bonus_token_is_a_hit(policy: str) -> None:
    engine = make_engine(policy=policy)
    engine.model.confidences = (0.8, 0.95)
    engine.open("a", [1, 2, 3, 4, 5])
    engine.run(100)
    engine.commit({"a": engine.follow("a", 0)})
    assert engine.hits["a"], "the first token after the prompt was the draft's first choice"
    for _ in range(5):
        engine.run(100)
        engine.commit({"a": engine.follow("a", len(engine.drafts["a"]))})
        assert engine.hits["a"]


def test_specbranch_hits_on_a_second_candidate_where_pearl_misses() -> None:
    hits = {}
    for policy in ("pearl", "specbranch"):
        engine = make_engine(policy=policy)
        engine.model.confidences = (0.05,)  # unsure: floor(4 * 0.95) = 3 branches, and every chunk is cut at once
        engine.open("a", [1, 2, 3])
        engine.run(100)
        node = engine.server._requests[PEER, "a"].tree.node(engine.server._requests[PEER, "a"].tree.root)
        assert node.candidates is not None
        second = node.candidates.token_ids[-1] if policy == "pearl" else node.candidates.token_ids[1]
        other = second if policy == "specbranch" else (second + 1) % 50
        engine.commit({"a": (3, [other])})
        hits[policy] = engine.hits["a"]
    assert hits == {"pearl": False, "specbranch": True}


def test_a_miss_goes_on_empty_or_waits_as_told() -> None:
    lengths = {}
    for on_miss in ("go", "wait:2", "wait:4"):
        engine = make_engine(policy="specbranch", stop_rule="none", on_miss=on_miss)
        engine.open("a", [1, 2, 3])
        engine.run(100)
        expected = engine.model.chain([1, 2, 3], 1, 4)[0]
        miss = next(
            token for token in range(50) if token not in engine.server._requests[PEER, "a"].tree.node(0).children
        )
        assert miss != expected
        engine.commit({"a": (3, [miss])})
        assert not engine.hits["a"]
        lengths[on_miss] = len(engine.drafts["a"])
    assert lengths == {"go": 0, "wait:2": 2, "wait:4": 4}


def test_a_wait_ends_at_its_limit() -> None:
    engine = make_engine(stop_rule="none", on_miss="wait:4")
    engine.open("a", [1, 2, 3])
    engine.run(100)
    engine.commit({"a": (3, [49])}, max_wait_ms=0.0, most_steps=0)
    assert engine.drafts["a"] == []


def test_tokens_may_be_withdrawn() -> None:
    engine = make_engine()
    engine.open("a", list(range(20)))
    engine.run(100)
    engine.commit({"a": engine.follow("a", 0)})
    engine.run(3)
    engine.commit({"a": (7, [30, 31])})
    engine.run(100)
    engine.commit({"a": engine.follow("a", len(engine.drafts["a"]))})
    assert engine.sequences["a"][:9] == [*range(7), 30, 31]


def test_a_gap_makes_the_request_unknown_and_frees_it() -> None:
    engine = make_engine()
    engine.open("a", [1, 2, 3])
    engine.run(10)
    replies = engine.server.handle(PEER, messages.CommitBatch(1, 0.0, [messages.Commit("a", 5, [1], 0, None)], None))
    assert replies == [(PEER, messages.DraftBatch(1, True, [], ["a"]))]
    assert engine.server.kv.num_held == 0
    engine.server.check_integrity()


def test_a_long_prompt_delays_other_drafts_by_one_chunk_at_most() -> None:
    engine = make_engine(limits=Limits(prefill_tokens=32))
    engine.open("short", [1, 2, 3])
    engine.run(100)
    engine.open("long", list(range(50)) * 8)
    engine.commit({"short": engine.follow("short", 0)})
    counters = engine.server.counters
    while counters.num_prefill_tokens < 384:
        before = counters.num_prefill_tokens
        _, worked = engine.server.step()
        assert worked
        assert counters.num_prefill_tokens - before <= 32


def test_a_refused_message_opens_and_commits_nothing_but_closes_what_has_ended() -> None:
    engine = make_engine()
    engine.open("a", [1, 2, 3])
    engine.run(10)
    held = engine.server.kv.num_held
    with pytest.raises(WireError, match="outside the vocabulary"):
        engine.server.handle(PEER, messages.CommitBatch(1, 0.0, [messages.Commit("a", 3, [50], 0, None)], None))
    assert engine.server.kv.num_held == held
    with pytest.raises(WireError, match="outside the vocabulary"):
        engine.server.handle(PEER, messages.StepBegin([messages.Open("b", [999], None)], ["a"]))
    assert engine.server.kv.num_held == 0, "the close counts, the bad open does not"


def test_another_vocabulary_is_refused_at_the_handshake() -> None:
    engine = make_engine()
    (_, reply), *_ = engine.server.handle(b"other", messages.Hello("s", 51, 500, False, None))
    assert isinstance(reply, messages.Refused)
    assert "51" in reply.reason


def test_a_new_session_drops_the_old_requests_of_that_engine_only() -> None:
    engine = make_engine()
    engine.open("a", [1, 2, 3])
    engine.server.handle(b"other", messages.Hello("s", 50, 500, False, None))
    engine.server.handle(b"other", messages.StepBegin([messages.Open("a", [1, 2], None)], []))
    engine.server.handle(PEER, messages.Hello("s2", 50, 500, False, None))
    status = engine.server.handle(PEER, messages.StatusQuery(1))[0][1]
    assert isinstance(status, messages.Status)
    assert status.num_requests == 1
    engine.server.handle(b"other", messages.StepBegin([], ["a"]))
    assert engine.server.kv.num_held == 0


def test_a_request_at_the_end_of_the_draft_context_gets_no_drafts_and_holds_no_blocks() -> None:
    engine = make_engine()
    engine.server._model.max_model_len = 12
    engine.model.max_model_len = 12
    engine.open("a", [1, 2, 3, 4, 5])
    for _ in range(12):
        engine.run(50)
        engine.commit({"a": engine.follow("a", min(1, len(engine.drafts["a"])))})
    assert engine.drafts["a"] == []
    assert engine.server.kv.num_held == 0


def test_a_request_too_large_for_the_pool_is_left_alone() -> None:
    engine = make_engine(num_blocks=8)
    engine.open("big", list(range(40)))
    engine.open("small", [1, 2, 3])
    engine.run(200)
    engine.commit({"big": engine.follow("big", 0), "small": engine.follow("small", 0)})
    engine.run(200)
    engine.commit({"big": engine.follow("big", 0), "small": engine.follow("small", 0)})
    assert engine.drafts["big"] == []
    assert engine.server.counters.num_evictions > 0


def test_more_requests_than_rows_all_get_their_turn() -> None:
    engine = make_engine(policy="pearl", limits=Limits(num_rows=4))
    for number in range(12):
        engine.open(f"r{number}", [number, 1, 2])
    engine.run(200)
    for _ in range(6):
        engine.commit({name: engine.follow(name, len(engine.drafts[name])) for name in engine.sequences})
        for _ in range(3 * 4):
            engine.server.step()
    lengths = [len(engine.sequences[name]) for name in engine.sequences]
    assert min(lengths) >= 0.6 * max(lengths), lengths


def test_serve_answers_until_told_to_stop_and_survives_a_refused_message() -> None:
    engine = make_engine()
    client, endpoint = memory_pair()
    client.send(messages.Hello("s", 50, 500, False, None))
    client.send(messages.StepBegin([messages.Open("a", [1, 2, 3], None)], []))
    client.send(messages.StepBegin([messages.Open("b", [999], None)], []))
    client.send(messages.CommitBatch(1, 0.0, [messages.Commit("a", 3, [4], 0, None)], None))
    client.send(messages.Shutdown())
    serve(engine.server, endpoint)
    replies = [client.recv(0.0) for _ in range(3)]
    assert [type(reply) for reply in replies] == [messages.Ready, messages.Failure, messages.DraftBatch]
    assert engine.server.counters.num_refused_messages == 1


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(["pearl", "specbranch", "fanout", "best_first"]),
    on_miss=st.sampled_from(["auto", "go", "wait:2"]),
    num_blocks=st.sampled_from([12, 24, 60, 400]),
    gamma=st.integers(1, 6),
    stop_rule=st.sampled_from(["none", "confidence", "adaedl"]),
    deterministic=st.booleans(),
    in_flight=st.booleans(),
)
def test_any_engine_behaviour_gets_the_draft_models_own_tokens_and_distributions_and_leaks_nothing(
    seed: int,
    policy: str,
    on_miss: str,
    num_blocks: int,
    gamma: int,
    stop_rule: str,
    deterministic: bool,
    in_flight: bool,
) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        num_blocks,
        Limits(rng.choice([2, 3, 64]), rng.choice([40, 512]), 20),
        policy=policy,
        on_miss=on_miss,
        num_speculative_tokens=gamma,
        stop_rule=stop_rule,
        deterministic=deterministic,
    )
    engine.in_flight = in_flight and not deterministic
    for number in range(25):
        if len(engine.sequences) < 4 and rng.random() < 0.4:
            sampling = messages.Sampling(rng.choice([0.3, 1.0]), rng.choice([1, 4, 50]), rng.randrange(2**62))
            prompt = [rng.randrange(50) for _ in range(rng.choice([1, 3, 4, 9, 30]))]
            engine.open(f"r{number}", prompt, rng.choice([None, sampling]))
        engine.run(rng.choice([0, 1, 2, 5, 30]))
        outcomes = {}
        for name in list(engine.sequences):
            kind = rng.random()
            if kind < 0.05:
                engine.close(name)
            elif kind < 0.1 and len(engine.sequences[name]) > 2:
                position = rng.randrange(1, len(engine.sequences[name]))
                outcomes[name] = (position, [rng.randrange(50) for _ in range(rng.randrange(1, 4))])
            elif kind < 0.9:
                num_accepted = rng.randint(0, len(engine.drafts[name]))
                outcomes[name] = engine.follow(name, num_accepted, rng.choice([None, None, rng.randrange(50)]))
        if outcomes:
            engine.commit(outcomes, max_wait_ms=rng.choice([0.0, 1e4]))
    for name in list(engine.sequences):
        engine.close(name)
    engine.run(100)
    assert engine.server.kv.num_held == 0
    engine.server.check_integrity()


@pytest.mark.parametrize("sampling", [None, messages.Sampling(0.3, 4, 5)])
def test_top_probabilities_come_with_the_chunk_if_the_engine_asked(sampling: messages.Sampling | None) -> None:
    for wanted in (False, True):
        engine = make_engine(stop_rule="none", on_miss="wait:4")
        engine.server.handle(PEER, messages.Hello("s2", 50, 500, wanted, None))
        engine.open("a", [1, 2, 3], sampling)
        replies = engine.server.handle(
            PEER, messages.CommitBatch(1, 1e4, [messages.Commit("a", 3, [4], 0, None)], None)
        )
        batches = []
        while not batches or not batches[-1].is_final:
            replies += engine.server.step()[0]
            batches += [one for _, one in replies if isinstance(one, messages.DraftBatch)]
            replies = []
        context = [1, 2, 3, 4]
        for batch in batches:
            (draft,) = batch.drafts
            contexts = [context + draft.tokens[:index] for index in range(len(draft.tokens))]
            expected = [engine.model.predict(one, engine.top_k, sampling).probs[0] for one in contexts]
            assert draft.top_probs == (pytest.approx(expected) if wanted else [])
            assert messages.decode_for_engine(messages.encode(batch)) == batch
        assert len(draft.tokens) == 4


def test_a_class_holds_for_one_round() -> None:
    engine = make_engine(stop_threshold=0.5)
    engine.model.confidences = (0.4, 0.9)
    engine.open("a", [1, 2, 3])
    lengths: dict[int | None, list[int]] = {None: [], 0: [], 1: [], 2: []}
    for round_index in range(40):
        engine.run(100)
        head_class = (None, 0, 1, 2)[round_index % 4]
        engine.commit({"a": engine.follow("a", len(engine.drafts["a"]))}, head_class=head_class)
        lengths[head_class].append(len(engine.drafts["a"]))
    assert set(lengths[0]) == {0}
    assert set(lengths[2]) == {4}
    assert min(lengths[1]) < 4 and set(lengths[1]) | set(lengths[None]) >= {0, 1}


@pytest.mark.parametrize("deterministic", [False, True])
def test_whether_a_reply_waits_is_decided_once_a_step(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(stop_rule="none", on_miss="wait:4", deterministic=deterministic)
    decisions = 0
    right = type(engine.server)._waits_for

    def counted(*args: Any) -> Any:
        nonlocal decisions
        decisions += 1
        return right(*args)

    monkeypatch.setattr(type(engine.server), "_waits_for", counted)
    engine.open("a", [1, 2, 3])
    engine.run(100)
    before = engine.server.counters.num_steps
    engine.commit({"a": (3, [49])})
    assert len(engine.drafts["a"]) == 4, "one step for each token was waited for"
    assert decisions == 1 + engine.server.counters.num_steps - before == 5, "when the batch came, and after each step"


def test_what_is_closed_while_its_reply_waits_is_drafted_no_further() -> None:
    engine = make_engine(stop_rule="none", on_miss="wait:4")
    for name in ("a", "b"):
        engine.open(name, [1, 2, 3])
    engine.run(100)
    commits = [messages.Commit(name, 3, [49], 0, None) for name in ("a", "b")]
    assert engine.server.handle(PEER, messages.CommitBatch(1, 1e4, commits, None)) == []
    engine.server.handle(PEER, messages.StepBegin([], ["a"]))
    replies = []
    while not replies:
        replies, _ = engine.server.step()
        assert engine.model.rows_per_forward[-1] == 1
        engine.server.check_integrity()
    (_, batch), *_ = replies
    assert isinstance(batch, messages.DraftBatch)
    assert {draft.request_id: len(draft.tokens) for draft in batch.drafts} == {"b": 4}


def test_sampled_drafts_are_sent_ahead_while_the_reply_waits() -> None:
    """So that a late reply cannot make the fate of a token depend on how long the chunk grew after it (rule 2)."""
    engine = make_engine(stop_rule="none", on_miss="wait:4")
    engine.open("drawn", [1, 2, 3], messages.Sampling(1.0, 8, 5))
    engine.open("greedy", [1, 2, 4])
    engine.run(100)
    misses = {
        name: next(token for token in range(50) if token not in root.children)
        for name in engine.sequences
        for request in [engine.server._requests[PEER, name]]
        for root in [request.tree.node(request.tree.root)]
    }
    engine.commit({name: (3, [miss]) for name, miss in misses.items()})
    assert {name: len(tokens) for name, tokens in engine.drafts.items()} == {"drawn": 4, "greedy": 4}
    assert engine.num_ahead == 3, "after each of the first three tokens, of the sampled request only"


def test_a_choice_that_is_no_branch_is_submitted_as_any_other() -> None:
    """After a lost reply the branch point lies inside the chain: it has children, and the drawn token may not be one of them."""
    lengths = []
    for key in range(40):
        engine = make_engine(stop_rule="none", on_miss="go", num_speculative_tokens=2)
        engine.open("a", [1, 2, 3], messages.Sampling(1.0, 8, key))
        engine.run(100)
        engine.commit({"a": engine.follow("a", 0)})
        engine.run(100)
        engine.commit({"a": engine.follow("a", 1)})
        engine.run(100)
        first = engine.drafts["a"][:1]
        if not first:
            continue
        # The reply was lost: the target went on alone, and said what had been drafted first.
        engine.drafts["a"] = []
        engine.commit({"a": (len(engine.sequences["a"]), first)})
        lengths.append(len(engine.drafts["a"]))
    assert len(lengths) > 10
    assert min(lengths) >= 1


def test_narrowing_keeps_the_chunk() -> None:
    engine = make_engine(stop_rule="none")
    engine.open("a", [1, 2, 3], messages.Sampling(1.0, 8, 1))
    request = engine.server._requests[PEER, "a"]
    engine.run(1)
    root = request.tree.node(request.tree.root)
    assert root.candidates is not None
    for token in root.candidates.token_ids:
        if token not in root.children:
            request.extend(request.tree.root, token)
    request.narrow()
    assert list(root.children) == [root.choice]
    engine.server.check_integrity()


@pytest.mark.parametrize("policy", ["fanout", "best_first"])
def test_a_likely_rejection_inside_the_chunk_is_a_hit(policy: str) -> None:
    hits = 0
    engine = make_engine(policy=policy, on_miss="go", max_branches=32)
    engine.model.confidences = (0.4,)
    engine.open("a", [1, 2, 3])
    engine.run(100)
    engine.commit({"a": engine.follow("a", 0)})
    for _ in range(12):
        engine.run(100)
        draft = engine.drafts["a"]
        assert len(draft) >= 2, "what was drafted ahead is submitted"
        second = engine.model.predict([*engine.sequences["a"], draft[0]], engine.top_k).token_ids[1]
        engine.commit({"a": engine.follow("a", 1, second)})
        hits += engine.hits["a"]
    assert hits == 12


def test_a_price_above_all_worth_ends_drafting_and_scouts_go_on() -> None:
    """Where verification costs more than it can gain, nothing is submitted, awaited or drafted, but for a scout now and then."""
    engine = make_engine(policy="best_first")
    for name in ("a", "b"):
        engine.open(name, [1, 2, 3])
    engine.run(100)
    # A token more makes a round longer by 8 ms, in which the batch commits more than one token anyway.
    for index in range(60):
        pace = messages.Pace(2 + index % 3, 1e3 * (2.0 + 8.0 * (index % 3)), 0.0)
        engine.commit({name: engine.follow(name, 0) for name in ("a", "b")}, pace=pace, round_s=0.01)
        engine.run(20)
    assert next(iter(engine.server._peers.values())).price > 1.0
    submitted, steps = [], []
    for _ in range(256):
        before = engine.server.counters.num_steps
        engine.commit({name: engine.follow(name, 0) for name in ("a", "b")}, pace=pace, round_s=0.01)
        engine.run(20)
        steps.append(engine.server.counters.num_steps > before)
        submitted.append(sum(bool(draft) for draft in engine.drafts.values()))
    assert 0 < sum(submitted) <= 2 * 8
    assert sum(steps) <= 2 * 9


@pytest.mark.parametrize("policy", ["pearl", "specbranch", "fanout", "best_first"])
def test_deterministic_drafts_do_not_depend_on_what_was_served_before(policy: str) -> None:
    engine = make_engine(policy=policy, deterministic=True)
    runs = []
    for _ in range(3):
        rng = random.Random(3)
        engine.open("a", [1, 2, 3])
        chunks = []
        for _ in range(12):
            engine.commit({"a": engine.follow("a", rng.randint(0, len(engine.drafts["a"])), rng.choice([None, 7]))})
            chunks.append((engine.drafts["a"], engine.hits["a"]))
        engine.close("a")
        runs.append(chunks)
    assert runs == runs[:1] * 3


def test_a_request_whose_reply_was_overtaken_drafts_no_further_than_a_chunk() -> None:
    """Its reply waited, was late, and the next round names other requests only: it is not to draft on for ever."""
    engine = make_engine(policy="best_first", on_miss="wait:4")
    for name in ("a", "b"):
        engine.open(name, [1, 2, 3])
    engine.run(100)
    commits = [messages.Commit(name, 3, [49], 0, None) for name in ("a", "b")]
    engine.server.handle(PEER, messages.CommitBatch(1, 1e4, commits, None))
    engine.server.handle(PEER, messages.CommitBatch(2, 0.0, [messages.Commit("a", 4, [48], 0, None)], None))
    for _ in range(100):
        engine.server.step()
    tree = engine.server._requests[PEER, "b"].tree
    assert max(tree.node(leaf).position for leaf in tree.leaves()) <= 3 + 1 + engine.gamma


def test_what_a_row_costs_is_learned_anew_after_a_bad_start() -> None:
    """Where rows seem dear only one is fed, and then nothing shows that they are cheap: now and then all are."""
    engine = make_engine(policy="best_first", max_branches=32)
    engine.model.confidences = (0.4,)
    forward = engine.model.forward

    def timed(rows: Sequence[Row], *args: Any) -> list[Candidates]:
        slow = 5.0 if engine.model.num_forwards < 12 else 0.02
        engine.clock.now_s += 1e-3 * (1.0 + slow * (len(rows) - 1))
        return forward(rows, *args)

    engine.model.forward = timed  # type: ignore[method-assign]
    engine.open("a", [1, 2, 3])
    for _ in range(150):
        engine.run(8)
        engine.commit({"a": engine.follow("a", min(1, len(engine.drafts["a"])))})
        if len(engine.sequences["a"]) > 300:
            engine.close("a")
            engine.open("a", [1, 2, 3])
    assert engine.server._timings.row_cost < 0.1
    assert sum(engine.model.rows_per_forward[-200:]) > 400
