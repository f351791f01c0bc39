"""Parts that benchmarks take away: each is there, is really away inside the context, and is back after it."""

import pytest

from tests.draft_engine import Engine, make_engine
from vllm_specbranch.draft_ablations import PARTS, without
from vllm_specbranch.draft_server import DraftServer
from vllm_specbranch.errors import ConfigError
from vllm_specbranch.planner import Planner


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_away_and_comes_back(name: str) -> None:
    owner, attribute, instead = PARTS[name]
    # Its own, not an inherited one: another class would go on using that.
    assert attribute in vars(owner)
    before = vars(owner)[attribute]
    with without([name]):
        assert vars(owner)[attribute] is instead
    assert vars(owner)[attribute] is before


def test_all_parts_at_once() -> None:
    with without(PARTS):
        assert not DraftServer.takes_messages_in_flight
    assert DraftServer.takes_messages_in_flight


def test_an_unknown_part_is_refused_and_nothing_stays_away() -> None:
    before = Planner.num_rows
    with pytest.raises(ConfigError, match="'magic'"), without(["row budget", "magic"]):
        pass
    assert Planner.num_rows is before


@pytest.mark.parametrize("name", [None, *PARTS])
def test_a_server_drafts_without_it(name: str | None) -> None:
    with without([name] if name else []):
        engine: Engine = make_engine(policy="best_first")
        engine.open("a", [1, 2, 3])
        engine.run(12)
        engine.commit({"a": (3, [4])})
        engine.run(12)
        engine.commit({"a": engine.follow("a", 1)})
        assert engine.drafts["a"]
