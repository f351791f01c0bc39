"""When a connection to a remote draft server is made, and when again."""

from vllm_specbranch.back_off import HEALTHY_AFTER_S, LONGEST_BACK_OFF_S
from vllm_specbranch.remote_server import RemoteServer


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def wait_for_connection(server: RemoteServer, clock: Clock) -> float:
    started_s = clock.now_s
    while not server.ensure_running():
        clock.now_s += 0.25
    return clock.now_s - started_s


def test_connections_are_tried_again_after_a_growing_back_off() -> None:
    clock = Clock()
    server = RemoteServer(["tcp://draft:1"], clock=clock)
    assert not server.is_running()
    assert server.ensure_running()
    assert not server.ensure_running(), "one connection at a time"
    waits = []
    for _ in range(8):
        server.kill()
        server.kill()
        assert not server.is_running()
        waits.append(wait_for_connection(server, clock))
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_BACK_OFF_S, LONGEST_BACK_OFF_S]
    clock.now_s += HEALTHY_AFTER_S + 1
    server.kill()
    assert wait_for_connection(server, clock) == 0.5, "a long healthy life ends the series"
    assert (server.address, server.pid, server.num_starts) == ("tcp://draft:1", None, 10)


def test_a_final_refusal_is_asked_again_but_seldom() -> None:
    clock = Clock()
    server = RemoteServer(["tcp://draft:1"], clock=clock)
    server.ensure_running()
    server.refused(is_final=True)
    assert wait_for_connection(server, clock) == LONGEST_BACK_OFF_S
    server.refused(is_final=False)
    assert wait_for_connection(server, clock) == 1.0


def test_a_stopped_one_stays_so() -> None:
    clock = Clock()
    server = RemoteServer(["tcp://draft:1"], clock=clock)
    server.ensure_running()
    server.stop()
    server.stop()
    clock.now_s += 1e6
    assert not server.is_running()
    assert not server.ensure_running()
