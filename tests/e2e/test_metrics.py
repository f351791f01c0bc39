"""Our metrics where one API server counts them all; `test_serve` has two. Run by `make test-long`: it needs a server of its own."""

import pytest

from tests.e2e.conftest import last_core
from tests.e2e.serving import assert_metrics_are_the_counters, serving
from vllm_specbranch.metrics import METRICS, PREFIX

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def test_our_metrics_are_the_counters_with_one_api_server(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[list[int]]
) -> None:
    with serving(tmp_path_factory.mktemp("metrics"), [], last_core()) as server:
        shown = server.metrics(PREFIX)
        assert {one.name for one in METRICS if one.is_counter} <= shown.keys(), "counters stand at 0 from the start"
        assert not {one.name for one in METRICS if not one.is_counter} & shown.keys(), "no step yet: nothing is known"
        for prompt in prompts[:8]:
            server.call("/v1/completions", {"model": "pair", "prompt": prompt, "max_tokens": 24, "ignore_eos": True})
        told = assert_metrics_are_the_counters(server)
        assert told["server.num_hits"] > 0
        assert told["server.num_rounds"] == told["server.num_hits"] + told["server.num_misses"]
        (accepted,) = server.metric("vllm:spec_decode_num_accepted_tokens_total")
        assert accepted == server.status()["engine"]["num_accepted_tokens"]
