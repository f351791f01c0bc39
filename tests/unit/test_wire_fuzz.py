"""Mutated messages against a real server: no crash, no hang, no growth; `tests/wire_fuzz.py` says how they are made."""

from collections import Counter

import psutil
import pytest

from tests.wire_fuzz import MAX_REQUESTS, PEERS, Fuzzer, record_session
from vllm_specbranch import messages

MAX_GROWTH_BYTES = 32 << 20


def kinds(data: list[bytes]) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in data:
        for decode in (messages.decode_for_server, messages.decode_for_engine):
            try:
                found[type(decode(one)).__name__] += 1
            except messages.WireError:
                continue
    return found


def test_the_corpus_has_every_kind_of_message() -> None:
    wanted = {kind.__name__ for union in (messages.EngineMessage, messages.ServerMessage) for kind in union.__args__}
    corpus = record_session()
    assert set(kinds(corpus)) == wanted
    assert any(b"Sampling" in one for one in corpus)
    drafts = [messages.decode_for_engine(one) for one in corpus if b"DraftBatch" in one[:14]]
    batches = [one for one in drafts if isinstance(one, messages.DraftBatch)]
    assert any(draft.q_ids for batch in batches for draft in batch.drafts), "with a distribution"
    assert any(batch.report for batch in batches)


def check(count: int, seed: int) -> Fuzzer:
    fuzzer = Fuzzer(seed)
    process = psutil.Process()
    fuzzer.run(count // 4)
    before = process.memory_info().rss
    fuzzer.run(count - count // 4)
    grown = process.memory_info().rss - before
    print(
        f"{count} mutated messages: {fuzzer.num_to_server} understood by the server ({fuzzer.num_refused} refused), "
        f"{fuzzer.num_to_engine} by the engine, {fuzzer.num_answers} answers, {fuzzer.most_requests} requests at most, "
        f"{grown / 2**20:.1f} MiB more than after the first quarter"
    )
    assert fuzzer.most_requests <= MAX_REQUESTS * len(PEERS)
    assert grown < MAX_GROWTH_BYTES
    # A fuzz that gets nothing past the decoder tests the decoder only.
    assert min(fuzzer.num_to_server, fuzzer.num_to_engine) > count // 50
    assert fuzzer.num_refused > count // 2000
    return fuzzer


def test_a_few_thousand_mutated_messages() -> None:
    check(6_000, 1)


@pytest.mark.steps
def test_two_hundred_thousand_mutated_messages() -> None:
    """No exception leaves the server or the line, memory stays, and afterwards the server works as before."""
    fuzzer = check(200_000, 2)
    for peer in PEERS:
        fuzzer.server._end_session(peer)
    fuzzer.server.check_integrity()
    assert fuzzer.server.kv.num_held == 0
