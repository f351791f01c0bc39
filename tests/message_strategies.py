"""Hypothesis strategies for what travels between the engine and the draft server."""

from hypothesis import strategies as st

from vllm_specbranch.messages import (
    MAX_ID_LENGTH,
    Commit,
    CommitBatch,
    Draft,
    DraftBatch,
    EngineMessage,
    Failure,
    Farewell,
    Hello,
    Open,
    Pace,
    Ready,
    Refused,
    Report,
    Sampling,
    ServerMessage,
    Shutdown,
    Status,
    StatusQuery,
    StepBegin,
    Terms,
)

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
identifiers = text | st.just("x" * MAX_ID_LENGTH)
int32s = st.integers(0, 300) | st.integers(0, MAX_INT32)
sizes = st.integers(1, MAX_INT32)
counts = st.integers(0, 300) | st.integers(0, MAX_INT64)
token_lists = st.lists(int32s, max_size=8)
some_tokens = st.lists(int32s, min_size=1, max_size=8)
durations_us = st.floats(0, 1e15)
durations_ms = st.floats(0, 60_000)

samplings = st.builds(Sampling, st.floats(1e-5, 2.0), st.integers(1, 1024), counts)
opens = st.builds(Open, identifiers, some_tokens, st.none() | samplings)
commits = st.builds(Commit, identifiers, int32s, some_tokens, counts, st.none() | st.integers(0, 2))
paces = st.builds(Pace, counts, durations_us, durations_us)
terms = st.builds(Terms, identifiers, identifiers, st.integers(1, 64))
drafts = st.builds(
    Draft,
    identifiers,
    int32s,
    token_lists,
    st.booleans(),
    st.binary(max_size=40),
    st.binary(max_size=40),
    st.lists(st.floats(0, 1), max_size=8),
)


def few(elements: st.SearchStrategy) -> st.SearchStrategy[list]:
    """Short lists of something."""
    return st.lists(elements, max_size=4)


engine_messages: st.SearchStrategy[EngineMessage] = st.one_of(
    st.builds(Hello, identifiers, sizes, sizes, st.booleans(), st.none() | terms),
    st.builds(StepBegin, few(opens), few(identifiers)),
    st.builds(CommitBatch, counts, durations_ms, few(commits), st.none() | paces),
    st.builds(StatusQuery, counts),
    st.just(Shutdown()),
)
reports = st.builds(Report, counts, counts, counts, counts, counts, st.dictionaries(text, counts, max_size=4))
server_messages: st.SearchStrategy[ServerMessage] = st.one_of(
    st.builds(Ready, identifiers, sizes, sizes, sizes),
    st.builds(Refused, identifiers, text, st.booleans()),
    st.builds(Farewell, text),
    st.builds(DraftBatch, counts, st.booleans(), few(drafts), few(identifiers), st.none() | reports, st.booleans()),
    st.builds(
        Status,
        counts,
        counts,
        counts,
        counts,
        st.dictionaries(text, counts, max_size=4),
        st.dictionaries(text, durations_us, max_size=4),
    ),
    st.builds(Failure, text),
)
