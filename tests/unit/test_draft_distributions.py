"""What is taken for a distribution when a reply enters the engine."""

from array import array

import numpy as np
import pytest

from vllm_specbranch.draft_distributions import ChunkDistributions, is_sound
from vllm_specbranch.messages import Draft

VOCAB = 10


def draft(
    tokens: list[int],
    ids: list[list[int]],
    probs: list[list[float]],
    q_ids: bytes | None = None,
    q_probs: bytes | None = None,
) -> Draft:
    packed_ids = array("i", [one for row in ids for one in row]).tobytes()
    packed_probs = array("f", [one for row in probs for one in row]).tobytes()
    return Draft(
        "a", 7, tokens, True, packed_ids if q_ids is None else q_ids, packed_probs if q_probs is None else q_probs, []
    )


IDS = [[1, 2, 3], [4, 5, 6]]
PROBS = [[0.5, 0.3, 0.2], [0.7, 0.3, 0.0]]


def test_a_sound_draft() -> None:
    assert is_sound(draft([1, 5], IDS, PROBS), VOCAB)


@pytest.mark.parametrize(
    ("why", "wrong"),
    [
        ("a token that its row does not hold", draft([7, 5], IDS, PROBS)),
        ("a token of probability 0", draft([1, 6], IDS, PROBS)),
        ("a sum far from 1", draft([1, 5], IDS, [[0.5, 0.3, 0.1], PROBS[1]])),
        ("a negative probability", draft([1, 5], IDS, [[1.2, 0.3, -0.5], PROBS[1]])),
        ("not a number", draft([1, 5], IDS, [[0.5, float("nan"), 0.5], PROBS[1]])),
        ("infinity", draft([1, 5], IDS, [[float("inf"), 0.3, 0.2], PROBS[1]])),
        ("an id beyond the vocabulary", draft([1, 5], [[1, 2, VOCAB], IDS[1]], PROBS)),
        ("a negative id", draft([1, 5], [[1, 2, -1], IDS[1]], PROBS)),
        ("no probabilities", draft([1, 5], IDS, PROBS, q_probs=b"")),
        ("more ids than probabilities", draft([1, 5], [[1, 2, 3, 7], [4, 5, 6, 7]], PROBS)),
        ("rows of different lengths", draft([1, 5], [[1, 2, 3], [4, 5]], [[0.5, 0.3, 0.2], [0.7, 0.3]])),
        ("half a number", draft([1, 5], IDS, PROBS, q_ids=b"\x01" * 23, q_probs=b"\x01" * 23)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_else_is_not(why: str, wrong: Draft) -> None:
    assert not is_sound(wrong, VOCAB), why


def test_rows_come_back_as_they_were_packed() -> None:
    one = draft([1, 5], IDS, PROBS)
    ids, probs = ChunkDistributions(7, (1, 5), one.q_ids, one.q_probs).rows(2)
    assert ids.tolist() == IDS
    assert np.array_equal(probs, np.array(PROBS, np.float32))
    assert ChunkDistributions(7, (1, 5), one.q_ids, one.q_probs).rows(1)[0].tolist() == IDS[:1]


def test_tokens_match_up_to_the_first_other_one() -> None:
    known = ChunkDistributions(7, (1, 5, 6), b"", b"")
    for token_ids, expected in (([], 0), ([1], 1), ([1, 5, 6], 3), ([1, 5, 6, 7], 3), ([1, -1, 6], 1), ([2, 5, 6], 0)):
        assert known.num_matching(token_ids) == expected
