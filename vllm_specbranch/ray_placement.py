"""A draft server that Ray places: when it is begun, where it came to be, and when it is gone.

Owns the Ray driver, a child process (`ray_driver`), and all that is asked of it; a thread reads its reports, so nothing here ever
waits for Ray. Which node has room, and restarts of the actor, are Ray's. Runs in the target's worker (output rank).

    ensure_running --number--> driver: actor found or created, draft server started --Placed--> the channel connects
    is_running is False <------- the actor or its draft server has ended ------------Ended----
    kill: the driver is killed, and with it Ray ends the actor; the next start begins with another driver
"""

import contextlib
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable

import msgspec
import zmq

from vllm_specbranch import placement
from vllm_specbranch.back_off import HUNG_S, BackOff
from vllm_specbranch.config import SpecBranchConfig, child_environment, shared_environment
from vllm_specbranch.draft_model import DraftModelSettings
from vllm_specbranch.keys import ClientKeys
from vllm_specbranch.messages import EngineMessage, ServerMessage
from vllm_specbranch.placement import (
    EXIT_CONFIG,
    LONGEST_START_S,
    STOP_TIMEOUT_S,
    TARGET_ONLY_VARIABLES,
    beside_target,
    make_private_directory,
    warn_of_shared_cores,
)
from vllm_specbranch.ray_messages import NAMESPACE, Ended, Order, Placed, TargetPlace, read_report
from vllm_specbranch.transport import ClientChannel, connect

logger = logging.getLogger("vllm.specbranch.ray_placement")

# What is run in the child process.
driver_module: tuple[str, ...] = ("vllm_specbranch.ray_driver",)


class Start:
    """One start of a draft server, as far as it has come. Written by the thread that reads the driver's reports.

    Args:
        number: counted over all starts of an engine.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.placed: Placed | None = None
        self.ended: Ended | None = None
        self.is_settled = threading.Event()

    def take(self, report: Placed | Ended) -> None:
        """Note what has become of it."""
        if isinstance(report, Placed):
            self.placed = report
        else:
            self.ended = report
        self.is_settled.set()


class PlacedChannel:
    """A `ClientChannel` to a draft server whose address is not known yet.

    Args:
        start: what says where the server is.
        open_channel: connects to it.
    """

    def __init__(self, start: Start, open_channel: Callable[[Placed], ClientChannel]) -> None:
        self._start = start
        self._open_channel = open_channel
        self._channel: ClientChannel | None = None
        self._unsent: EngineMessage | None = None
        self._is_closed = False

    def _connected(self) -> ClientChannel | None:
        if self._channel is None and self._start.placed is not None and not self._is_closed:
            self._channel = self._open_channel(self._start.placed)
            if self._unsent is not None:
                self._channel.send(self._unsent)
                self._unsent = None
        return self._channel

    @property
    def num_dropped(self) -> int:
        """As of the channel, once there is one."""
        return self._channel.num_dropped if self._channel else 0

    def send(self, message: EngineMessage) -> bool:
        """As of the channel; until there is one, the last message is kept: before a server answers, all are greetings."""
        channel = self._connected()
        if channel is not None:
            return channel.send(message)
        self._unsent = None if self._is_closed else message
        return not self._is_closed

    def recv(self, timeout_ms: float) -> ServerMessage | None:
        """As of the channel; part of the time may go by before there is one."""
        until_s = time.monotonic() + timeout_ms / 1e3
        if self._channel is None and timeout_ms > 0:
            self._start.is_settled.wait(timeout_ms / 1e3)
        channel = self._connected()
        left_ms = 1e3 * (until_s - time.monotonic())
        if channel is not None:
            return channel.recv(max(0.0, left_ms))
        # It has ended before it was placed: its owner will see that, and must not spin until then.
        if left_ms > 0:
            time.sleep(left_ms / 1e3)
        return None

    def drain(self) -> None:
        """As of the channel, once there is one."""
        if self._channel is not None:
            self._channel.drain()

    def close(self) -> None:
        """As of the channel. Again does nothing."""
        self._is_closed = True
        if self._channel is not None:
            self._channel.close()


class RayServer:
    """A draft server under an actor of Ray's. No method waits for Ray.

    Args:
        config: the engine's settings.
        model: what the server loads.
        target: where the target runs.
        clock: seconds, monotonic.
    """

    longest_start_s = LONGEST_START_S
    longest_silence_s = HUNG_S
    is_shared = False

    def __init__(
        self,
        config: SpecBranchConfig,
        model: DraftModelSettings,
        target: TargetPlace,
        *,
        on_cpu: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._model = model
        self._target = target
        self._on_cpu = on_cpu
        self._cores = beside_target(config, on_cpu=on_cpu)
        self._name = f"draft-{uuid.uuid4().hex[:12]}"
        self._directory = make_private_directory()
        public, secret = zmq.curve_keypair()
        self._public_key, self._secret_key = public, secret
        self._driver: subprocess.Popen[bytes] | None = None
        self._num_drivers = 0
        self._start = Start(0)
        self._back_off = BackOff(clock)
        self._is_open = False
        self._is_stopped = False
        self.is_hopeless = False

    @property
    def address(self) -> str:
        """A name for where the newest server listens; `open_channel` knows what is behind it."""
        return f"ray:{NAMESPACE}/{self._actor_name}#{self._start.number}"

    @property
    def pid(self) -> int | None:
        """Process id of the newest draft server on its node, once it is placed."""
        return self._start.placed.pid if self._start.placed else None

    @property
    def num_starts(self) -> int:
        """How often a draft server was begun."""
        return self._start.number

    @property
    def _actor_name(self) -> str:
        # An actor ends a moment after its driver: the next driver's must not be taken for it.
        return f"{self._name}-{self._num_drivers}"

    def open_channel(self, address: str) -> ClientChannel:
        """A channel to the newest draft server, wherever it comes to be."""
        del address
        return PlacedChannel(self._start, self._connect)

    def _connect(self, placed: Placed) -> ClientChannel:
        if placed.server_key is None:
            return connect(placed.address)
        return connect(placed.address, ClientKeys(self._public_key, self._secret_key, placed.server_key.encode()))

    def is_running(self) -> bool:
        """Whether there is a draft server, or there will be one. Reports its end once, in the log."""
        if self._is_open and self._start.ended is not None:
            self._is_open = False
            self._report_end(self._start.ended)
        return self._is_open

    def _report_end(self, ended: Ended) -> None:
        if ended.status == EXIT_CONFIG:
            self.is_hopeless = True
            # What the actor has taken is for others now.
            self._kill_driver()
            logger.error(
                "The draft server cannot work with these settings (its own line says why); no drafts from now on."
            )
            return
        wait_s = self._back_off.failed()
        logger.warning(
            "The draft server under Ray is gone (%s). Requests go on without drafts; next start in %.1f s.",
            ended.reason,
            wait_s,
        )

    def ensure_running(self) -> bool:
        """Ask for a draft server if there is none and the back-off is over.

        Returns:
            Whether one has been asked for now.
        """
        if self.is_running() or self.is_hopeless or self._is_stopped or not self._back_off.is_over:
            return False
        try:
            self._begin()
        except OSError as error:
            self._kill_driver()
            wait_s = self._back_off.postpone()
            logger.warning("The draft server cannot be started by Ray (%s); next try in %.1f s.", error, wait_s)
            return False
        return True

    def _begin(self) -> None:
        if self._driver is None or self._driver.poll() is not None:
            self._kill_driver()
            self._launch_driver()
        start = Start(self._start.number + 1)
        self._start = start
        assert self._driver is not None and self._driver.stdin is not None
        self._driver.stdin.write(b"%d\n" % start.number)
        self._driver.stdin.flush()
        self._back_off.started()
        self._is_open = True

    def _launch_driver(self) -> None:
        self._num_drivers += 1
        driver = subprocess.Popen(
            [sys.executable, "-m", *driver_module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment({}, TARGET_ONLY_VARIABLES),
            # As with a draft server (`placement.launch`): stopped, it would outlive this process.
            process_group=0,
        )
        self._driver = driver
        # It inherits the target's cores, and would hand them on to a Ray that it starts.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(driver.pid, placement.available_cores())
        threading.Thread(target=self._listen, args=(driver,), name="ray-reports", daemon=True).start()
        assert driver.stdin is not None
        driver.stdin.write(msgspec.json.encode(self._order()) + b"\n")

    def _order(self) -> Order:
        num_gpus = self._config.draft_ray_num_gpus
        amounts = {
            "CPU": self._config.draft_ray_num_cpus,
            "GPU": (0.0 if self._on_cpu else 1.0) if num_gpus is None else num_gpus,
            **dict(self._config.draft_ray_resources),
        }
        return Order(
            name=self._actor_name,
            target=self._target,
            resources={name: amount for name, amount in amounts.items() if amount > 0},
            directory=str(self._directory),
            client_key=self._public_key.decode(),
            cores=self._cores,
            on_cpu=self._on_cpu,
            environment=shared_environment(),
            module=placement.server_module,
            model=self._model,
            config=self._config,
        )

    def _listen(self, driver: "subprocess.Popen[bytes]") -> None:
        """Take in what a driver says, until it ends; a thread of its own."""
        assert driver.stdout is not None
        with driver.stdout:
            for line in driver.stdout:
                with contextlib.suppress(msgspec.DecodeError):
                    report = read_report(line)
                    if report.number == self._start.number:
                        self._start.take(report)
                        self._report_place(report)
        status = driver.wait()
        # Another driver may have begun meanwhile: its starts are not this one's.
        if driver is self._driver and self._start.ended is None:
            self._start.take(Ended(self._start.number, f"Ray's driver process ended with status {status}"))

    def _report_place(self, report: Placed | Ended) -> None:
        if not isinstance(report, Placed):
            return
        logger.info(
            "Ray has placed the draft server on node %s: %s, pid %d", report.node_id, report.address, report.pid
        )
        is_beside_target = report.server_key is None
        if self._on_cpu and self._cores is None and is_beside_target and report.number == 1:
            warn_of_shared_cores()

    def kill(self) -> None:
        """Give up a draft server that does not answer, with its actor; `ensure_running` begins anew."""
        if self._is_open:
            self._is_open = False
            self._back_off.failed()
        self._kill_driver()

    def _kill_driver(self) -> None:
        driver, self._driver = self._driver, None
        if driver is None:
            return
        driver.kill()
        self._close_lifeline(driver)

    def _close_lifeline(self, driver: "subprocess.Popen[bytes]") -> None:
        assert driver.stdin is not None
        # Something may wait there that was never read.
        with contextlib.suppress(OSError):
            driver.stdin.close()

    def refused(self, is_final: bool) -> None:
        """The server does not draft for this engine, and another start would end the same way."""
        del is_final
        self.is_hopeless = True
        self.stop()

    def stop(self) -> None:
        """End the draft server, its actor and the driver. Safe to call again."""
        self._is_open = False
        self._is_stopped = True
        driver, self._driver = self._driver, None
        if driver is not None:
            self._close_lifeline(driver)
            try:
                driver.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                driver.kill()
        shutil.rmtree(self._directory, ignore_errors=True)
