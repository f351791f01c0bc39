"""What a draft server reports to an engine: the engine's own counts, also where several share the server."""

from tests.draft_engine import BLOCK_SIZE
from tests.fakes import FakeDraftModel
from vllm_specbranch.config import SpecBranchConfig
from vllm_specbranch.draft_main import make_server
from vllm_specbranch.draft_peers import OF_REQUESTS
from vllm_specbranch.draft_server import DraftServer
from vllm_specbranch.draft_work import Limits
from vllm_specbranch.errors import WireError
from vllm_specbranch.kv_blocks import KVBlocks
from vllm_specbranch.messages import Commit, CommitBatch, Hello, Open, Report, StepBegin
from vllm_specbranch.metrics import DraftServerCounters

ONE, TWO = b"one", b"two"


def make() -> DraftServer:
    config = SpecBranchConfig.from_user({"model": "draft", "num_speculative_tokens": 4, "on_miss": "go"})
    return make_server(config, FakeDraftModel(400, BLOCK_SIZE), KVBlocks(400, BLOCK_SIZE), Limits())


def greet(server: DraftServer, *peers: bytes) -> None:
    for peer in peers:
        server.handle(peer, Hello("s", 50, 500, False, None))


def work(server: DraftServer, peer: bytes, names: str, num_rounds: int = 3) -> None:
    server.handle(peer, StepBegin([Open(name, [1, 2, 3], None) for name in names], []))
    for number in range(num_rounds):
        server.step()
        commits = [Commit(name, 3 + number, [number], 0, None) for name in names]
        server.handle(peer, CommitBatch(number, 0.0, commits, None))
    server.step()


def report(server: DraftServer, peer: bytes) -> Report:
    found = server.report(peer)
    assert found is not None
    return found


def test_an_engine_alone_is_told_all_that_the_server_counts() -> None:
    server = make()
    greet(server, ONE)
    work(server, ONE, "abc")
    server.handle(ONE, CommitBatch(9, 0.0, [Commit("nobody", 3, [1], 0, None)], None))
    server.refuse(WireError("garbage"))
    told = report(server, ONE)
    assert told.counters == server.counters.as_dict()
    assert all(told.counters[f"num_{name}"] for name in ("rounds", "drafted_tokens", "forks", "steps", "rows"))
    assert told.counters["num_refused_messages"] == told.counters["num_unknown_requests"] == 1
    assert (told.num_requests, told.num_blocks_held, told.num_blocks) == (3, server.kv.num_held, 400)


def test_engines_that_share_a_server_are_told_their_own_and_together_all() -> None:
    server = make()
    greet(server, ONE, TWO)
    work(server, ONE, "abc")
    work(server, TWO, "a", num_rounds=5)
    one, two = report(server, ONE), report(server, TWO)
    assert (one.num_requests, two.num_requests) == (3, 1)
    assert (one.counters["num_rounds"], two.counters["num_rounds"]) == (9, 5)
    assert one.num_blocks_held + two.num_blocks_held == server.kv.num_held
    assert min(one.num_blocks_held, two.num_blocks_held) > 0
    everything = server.counters.as_dict()
    # A step may feed rows of both.
    for name in OF_REQUESTS - {"num_steps", "num_wait_steps"}:
        assert one.counters[name] + two.counters[name] == everything[name], name
    assert max(one.counters["num_steps"], two.counters["num_steps"]) <= everything["num_steps"]
    assert one.counters["num_steps"] + two.counters["num_steps"] >= everything["num_steps"]
    assert one.life != two.life


def test_counts_outlast_a_second_handshake_and_begin_anew_with_a_new_connection() -> None:
    server = make()
    greet(server, ONE)
    work(server, ONE, "a")
    server.refuse(WireError("garbage"))
    before = report(server, ONE)
    greet(server, ONE)
    again = report(server, ONE)
    assert (again.life, again.counters) == (before.life, before.counters)
    assert (again.num_requests, again.num_blocks_held) == (0, 0)
    greet(server, TWO)
    new = report(server, TWO)
    assert new.life > before.life
    assert not any(new.counters.values()), "nothing of what was before it came"
    server.refuse(WireError("garbage"))
    assert report(server, TWO).counters["num_refused_messages"] == 1


def test_engines_that_the_server_does_not_know_are_told_nothing() -> None:
    assert make().report(ONE) is None


def test_every_name_is_one_of_the_server_s_counters() -> None:
    assert DraftServerCounters().as_dict().keys() > OF_REQUESTS
