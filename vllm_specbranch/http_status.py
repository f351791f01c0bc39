"""What a draft server of its own tells over HTTP: `/metrics` for Prometheus, `/health` and `/ready` for whoever restarts it.

Owns the port, its threads, and the names of the metrics: those of `metrics`, of all engines together, under a prefix of their own,
because engines tell their shares of the same counts themselves. Owns none of the figures: whole numbers are read beside the serving
thread, which takes no lock for it. Without keys: for a network that only operators reach, and off unless it is asked for; whoever
knocks anyway gets so many connections for so long. Runs in the draft server process.

    /health   200 while the serving thread turns (also while a model loads), 503 once it has hung for HUNG_AFTER_S
    /ready    200 while the server serves, 503 before the model is loaded and from SIGTERM on
"""

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vllm_specbranch.addresses import tcp_host_and_port
from vllm_specbranch.draft_sessions import SharedDraftServer
from vllm_specbranch.errors import ConfigError, WireError
from vllm_specbranch.metrics import METRICS
from vllm_specbranch.transport import ServerEndpoint

PREFIX = "specbranch_draft_server_"
# A turn lasts half a second where nothing happens; a forward that hangs ends the process sooner (`draft_loop.LONGEST_FORWARD_S`).
HUNG_AFTER_S = 15.0
# A connection is ended after this, whatever it was about; and of all together there are no more at a time.
LONGEST_CONNECTION_S = 5.0
MOST_CONNECTIONS = 32
POLL_S = 0.05

_COUNTERS = [one for one in METRICS if one.key.startswith("server.")]


class HttpStatus:
    """The port, open from the start, and what is behind it once a server serves.

    Args:
        address: `host:port`; the host `*` is every interface, the port 0 any.
        clock: seconds, as the server's `turned_s`.

    Raises:
        ConfigError: no such address.
        WireError: it cannot be used, or is taken.
    """

    def __init__(self, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._server: SharedDraftServer | None = None
        self._endpoint: ServerEndpoint | None = None
        registry = CollectorRegistry()
        registry.register(_ServerCollector(self))
        ProcessCollector(registry=registry)
        self._http = _listen(address, self, registry)
        threading.Thread(target=self._http.serve_forever, args=(POLL_S,), name="http", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self._http.server_address[1]
        return port

    def watch(self, server: SharedDraftServer, endpoint: ServerEndpoint) -> None:
        """From now on tell of this server, which is about to serve at this endpoint."""
        server.turned_s = self._clock()
        self._endpoint = endpoint
        self._server = server

    @property
    def is_healthy(self) -> bool:
        """Whether the serving thread turns, or there is none yet."""
        return self._server is None or self._clock() - self._server.turned_s < HUNG_AFTER_S

    @property
    def is_ready(self) -> bool:
        """Whether it serves."""
        return self._server is not None and not self._server.is_stopping and self.is_healthy

    def gauges(self) -> Iterator[tuple[str, str, float]]:
        """(name, documentation, value) of how it stands."""
        yield (
            "ready",
            "1 once the model is loaded, while the server neither hangs nor ends.",
            self.is_ready,
        )
        server = self._server
        if server is None:
            return
        yield "engines", "Engines heard of within the last 30 s.", server.num_engines
        yield "requests", "Open requests of all engines.", server.num_requests
        yield "queued_rows", "Rows left for later by the newest draft step.", server.num_queued_rows
        yield "kv_blocks_held", "KV blocks of the draft model in use.", server.kv.num_held
        yield "kv_blocks", "KV blocks of the draft model in all.", server.kv.num_blocks
        yield (
            "turn_age_seconds",
            "Time since the serving thread last looked for messages.",
            self._clock() - server.turned_s,
        )

    def counters(self) -> Iterator[tuple[str, str, float]]:
        """(name, documentation, value) of what has been counted."""
        if self._server is None or self._endpoint is None:
            return
        counters = self._server.counters.as_dict()
        # These two the server learns with its next reply only.
        counters |= {
            "num_malformed_messages": self._endpoint.num_dropped,
            "num_flood_messages": self._endpoint.num_refused,
        }
        for one in _COUNTERS:
            yield one.suffix.removesuffix("_total"), one.documentation, counters[one.key.removeprefix("server.")]
        yield "answers", "Commit batches answered.", counters["num_answers"]
        yield (
            "answer_seconds",
            "Time from taking commit batches in until they were answered.",
            counters["answer_us"] / 1e6,
        )
        yield "handling_seconds", "Time in which commit batches were handled.", counters["handling_us"] / 1e6

    def close(self) -> None:
        """Let go of the port. Safe to call again."""
        self._http.shutdown()
        self._http.server_close()


class _ServerCollector(Collector):
    """Reads a server at every scrape."""

    def __init__(self, status: HttpStatus) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        for name, documentation, value in self._status.gauges():
            yield GaugeMetricFamily(PREFIX + name, documentation, value)
        for name, documentation, value in self._status.counters():
            yield CounterMetricFamily(PREFIX + name, documentation, value)


class _HttpServer(http.server.ThreadingHTTPServer):
    """A thread for each connection, of which there are few at a time, none for long."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[http.server.BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._began_s: dict[socket.socket, float] = {}
        super().__init__(("" if host == "*" else host, port), handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self._began_s) >= MOST_CONNECTIONS:
            self.shutdown_request(request)
            return
        self._began_s[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._began_s.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """End what has lasted too long; between any two looks for new connections."""
        now_s = time.monotonic()
        for request, began_s in list(self._began_s.items()):
            if now_s - began_s > LONGEST_CONNECTION_S:
                # Its thread sees the end of the stream.
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go in the middle are none of ours to report: the log must not be theirs to fill."""


def _listen(address: str, status: HttpStatus, registry: CollectorRegistry) -> _HttpServer:
    try:
        host, port = tcp_host_and_port(f"tcp://{address}", to_bind=True)
    except WireError as error:
        raise ConfigError(address, "host:port, with * for every interface and 0 for any port", "--http") from error

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = LONGEST_CONNECTION_S
        server_version = "vllm-specbranch"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            code, kind, content = _answer(path, self.headers.get("Accept", ""), status, registry)
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Probes come every few seconds: not for the log."""

    try:
        return _HttpServer(host, port, Handler)
    except OSError as error:
        raise WireError(f"cannot listen at {address} (--http): {error.strerror or error}") from error


def _answer(path: str, accepted: str, status: HttpStatus, registry: CollectorRegistry) -> tuple[HTTPStatus, str, bytes]:
    """(status, content type, content) for a path.

    Args:
        accepted: what the client says that it reads.
    """
    match path:
        case "/metrics":
            encode, kind = choose_encoder(accepted)
            return HTTPStatus.OK, kind, encode(registry)
        case "/health":
            is_good = status.is_healthy
        case "/ready":
            is_good = status.is_ready
        case _:
            return HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /health, /ready\n"
    code = HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE
    return code, "text/plain", b"yes\n" if is_good else b"no\n"
