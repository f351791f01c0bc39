"""What the draft server submits for a commit: what is a hit, how long the chunk gets, and what a reply waits for after a miss.

In memory, with a fake model.
"""

import random
from typing import Any

import pytest

from tests.draft_engine import PEER, make_engine
from vllm_specbranch import messages


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
