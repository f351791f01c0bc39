"""The long form of the lossless comparison: longer answers, and a draft server that is killed again and again.

Run by `make test-long`; what it printed last is kept in benchmarks/results/test-long.txt.
"""

from collections.abc import Callable

import pytest

from tests.e2e.conftest import RunEngine

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("policy", ["specbranch", "pearl"])
def test_128_new_tokens_while_the_draft_server_is_stopped_and_killed(
    run_engine: RunEngine, prompts: list[list[int]], assert_same: Callable[..., None], policy: str
) -> None:
    plain = run_engine([{"prompts": prompts, "max_tokens": 128, "batch_size": 16}])["jobs"][0]["answers"]
    signals = [["SIGSTOP", 0.3], ["SIGCONT", 1.0], ["SIGSTOP", 2.0], ["SIGCONT", 1.0], ["SIGKILL", 0.0]]
    disturbed = {"prompts": prompts, "max_tokens": 128, "disturb": {"after_s": 0.5, "signals": signals}}
    # After each kill the next job's status query finds the new server; it has the pause to load.
    disturbed["disturb"]["then_wait_s"] = 5.0  # type: ignore[index]
    calm = {"prompts": prompts, "max_tokens": 128}
    jobs = [disturbed | {"batch_size": 4}, calm | {"batch_size": 16}, calm | {"batch_size": 1}]
    result = run_engine(jobs, speculative={"policy": policy}, in_process=False)
    for done in result["jobs"]:
        assert_same(done["answers"], plain)
    engine = result["status"]["engine"]
    print(f"{policy}: {engine}; rates {result['status']['rates']}")
    assert result["jobs"][0]["events"] == [name for name, _ in signals]
    assert engine["num_server_deaths"] == 1
    assert engine["num_accepted_tokens"] > 0
