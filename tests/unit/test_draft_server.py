"""The draft server in memory: right tokens, no leaked block, a reply to every commit, whatever the engine does.

What it submits for a commit: test_draft_server_chunks; what it does with too little of something: test_draft_server_limits.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.draft_engine import PEER, make_engine
from vllm_specbranch import messages
from vllm_specbranch.draft_loop import serve
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.errors import WireError
from vllm_specbranch.transport import memory_pair


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
