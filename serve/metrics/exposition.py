"""`/metrics` on its own port, answered by threads of the supervisor, which is idle under load."""

import contextlib
import logging
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from serve import logs
from serve.metrics.collector import CounterCollector

MAX_CONNECTIONS = 16  # at once
CONNECTION_SECONDS = 10.0  # after which a connection is closed, answered or not


class MetricsHandler(BaseHTTPRequestHandler):
    """Answers `GET /metrics`, and `GET /` with the same."""

    server: "MetricsServer"
    protocol_version = "HTTP/1.1"
    server_version = "imago"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one scrape."""
        path = self.path.split("?")[0]
        if path not in ("/metrics", "/"):
            self.send_error(404)
            return

        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        body = encode(self.server.registry)

        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Do nothing: scrapes are not logged."""


class MetricsServer(ThreadingHTTPServer):
    """One thread and one request per connection; their number and duration are limited."""

    daemon_threads = True
    request_queue_size = 128  # connections that the kernel holds; others try again after a second

    def __init__(self, host: str, port: int, run_directory: str):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(CounterCollector(run_directory))
        # Open connections, the oldest first, and the time.monotonic() at which each is closed.
        self.deadlines: dict[Any, float] = {}
        super().__init__((host, port), MetricsHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread. If too many connections are open, close the oldest one.

        A scrape takes milliseconds, so the oldest is one whose client sends or takes nothing.
        """
        connections = list(self.deadlines)  # threads remove some
        if len(connections) >= MAX_CONNECTIONS:
            self.deadlines.pop(connections[0], None)
            _disconnect(connections[0])
        self.deadlines[request] = time.monotonic() + CONNECTION_SECONDS
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and forget its deadline."""
        self.deadlines.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Close the connections that took too long. `serve_forever` calls this twice a second."""
        now = time.monotonic()
        for request, deadline in list(self.deadlines.items()):
            if deadline < now:
                _disconnect(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a failed scrape: at debug level if the scraper disconnected, else as an error."""
        disconnected = isinstance(sys.exc_info()[1], ConnectionError)
        logs.logger.log(
            logging.DEBUG if disconnected else logging.ERROR,
            "a scrape was not answered",
            exc_info=not disconnected,
        )


def _disconnect(connection: socket.socket) -> None:
    """End the thread that reads from or writes to a connection, unless it has ended already."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def start(host: str, port: int, run_directory: str) -> MetricsServer:
    """Serve the metrics of a run directory from a thread. Raises OSError if the port is in use."""
    server = MetricsServer(host, port, run_directory)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
