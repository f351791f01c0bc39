"""The Grafana board of `examples/`: a dashboard that Grafana can import, and queries of metrics that there are."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.unit.test_draft_sessions import Bench
from vllm_specbranch import http_status
from vllm_specbranch.metrics import METRICS, PREFIX
from vllm_specbranch.transport import memory_pair

REPOSITORY = Path(__file__).resolve().parents[2]
BOARD: dict[str, Any] = json.loads((REPOSITORY / "examples" / "grafana" / "specbranch.json").read_text())
PANELS: list[dict[str, Any]] = [one for one in BOARD["panels"] if one["type"] != "row"]
QUERIES: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]
NAME = re.compile(rf"vllm:[a-z0-9_]+|{http_status.PREFIX}[a-z0-9_]+")
GRID_WIDTH = 24  # Grafana's.


def test_it_has_what_an_import_needs() -> None:
    assert BOARD["id"] is None, "Grafana gives it one"
    assert BOARD["uid"] and len(BOARD["uid"]) <= 40
    assert BOARD["title"]
    assert 36 <= BOARD["schemaVersion"] <= 41
    assert {"from", "to"} <= BOARD["time"].keys()
    assert isinstance(BOARD["tags"], list) and isinstance(BOARD["annotations"]["list"], list)
    kinds = {panel["type"] for panel in PANELS}
    assert kinds == {one["id"] for one in BOARD["__requires"] if one["type"] == "panel"}


def test_panels_stand_on_the_grid_and_none_covers_another() -> None:
    numbers = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    boxes = [panel["gridPos"] for panel in BOARD["panels"]]
    for box in boxes:
        assert box["h"] > 0 and box["w"] > 0 and box["x"] >= 0 and box["y"] >= 0
        assert box["x"] + box["w"] <= GRID_WIDTH
    for one, other in itertools.combinations(boxes, 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y, (one, other)


def test_every_panel_asks_the_chosen_data_source_for_something() -> None:
    variables = {one["name"]: one for one in BOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in PANELS:
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters)
        assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(BOARD["panels"]))) - {"__rate_interval"}
    assert used == set(variables)


def vllm_s_own_names() -> str:
    folder = Path(vllm.__path__[0]) / "v1"
    return "".join((folder / name).read_text() for name in ("metrics/loggers.py", "spec_decode/metrics.py"))


@pytest.fixture(scope="module")
def draft_server_s_names() -> set[str]:
    status = http_status.HttpStatus("127.0.0.1:0")
    status.watch(Bench().server, memory_pair()[1])
    status.close()
    gauges = {http_status.PREFIX + name for name, _, _ in status.gauges()}
    return gauges | {f"{http_status.PREFIX}{name}_total" for name, _, _ in status.counters()}


@pytest.mark.parametrize("query", [*QUERIES, *(one["definition"] for one in BOARD["templating"]["list"][1:])])
def test_every_metric_it_asks_for_exists(query: str, draft_server_s_names: set[str]) -> None:
    names = NAME.findall(query)
    assert names
    for name in names:
        if name.startswith(PREFIX):
            assert name in {one.name for one in METRICS}
        elif name.startswith(http_status.PREFIX):
            assert name in draft_server_s_names
        else:
            assert f'"{name.removesuffix("_total")}"' in vllm_s_own_names()


@pytest.mark.parametrize("query", QUERIES)
def test_counters_are_asked_for_their_growth_and_gauges_for_their_value(query: str) -> None:
    for found in NAME.finditer(query):
        # A draft server that engines share is none of theirs.
        labels = "" if found[0].startswith(http_status.PREFIX) else '{model_name=~"$model_name", engine=~"$engine"}'
        before, after = query[: found.start()], query[found.end() :]
        assert after.startswith(labels)
        grows = before.endswith(("rate(", "increase("))
        assert grows == found[0].endswith("_total") == after.startswith(f"{labels}[$__rate_interval])")
    depth = list(itertools.accumulate((mark == "(") - (mark == ")") for mark in query))
    assert min(depth) >= 0 and depth[-1] == 0


def test_what_operators_ask_about_is_on_it() -> None:
    asked = set(NAME.findall(" ".join(QUERIES)))
    wanted = (
        "hits_total misses_total rollback_tokens_total forks_total draft_rows_total reply_timeouts_total breaker_open "
        "draft_server_alive draft_server_ready draft_server_restarts_total draft_requests draft_queued_rows "
        "draft_kv_blocks_held reclaimed_blocks_total paused_rounds_total turned_away_total expired_requests_total "
        "flood_messages_total malformed_messages_total refused_messages_total"
    )
    assert {PREFIX + suffix for suffix in wanted.split()} <= asked
