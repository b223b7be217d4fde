"""/metrics on a port of its own, answered by the supervisor's process, which does nothing else under load."""

import contextlib
import logging
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from serve import logs
from serve.metrics.shared_counters import Collector

MOST = 16  # connections at once
SECONDS = 10.0  # for one of them, from its beginning to its end


class Handler(BaseHTTPRequestHandler):
    collector: Collector
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "imago", ""

    def do_GET(self) -> None:
        if self.path.split("?")[0] not in ("/metrics", "/"):
            return self.send_error(404)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self.collector)
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        body = encode(registry)
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not logged."""


class Server(ThreadingHTTPServer):
    """A thread and a request for each connection; few of them, and not for long, whoever is at the other end."""

    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[Handler]):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.ends: dict[socket.socket, float] = {}  # of what is open, by time.monotonic
        super().__init__((host, port), handler)

    def process_request(self, request, client_address) -> None:
        if len(self.ends) >= MOST:
            return self.shutdown_request(request)
        self.ends[request] = time.monotonic() + SECONDS
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self.ends.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second."""
        for request, end in list(self.ends.items()):
            if end < time.monotonic():
                with contextlib.suppress(OSError):  # it ended just now
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        """A scraper that leaves early is no fault of ours."""
        ours = not isinstance(sys.exc_info()[1], ConnectionError)
        logs.logger.log(
            logging.ERROR if ours else logging.DEBUG, "a scrape was not answered", exc_info=ours
        )


def start(host: str, port: int, run: str) -> ThreadingHTTPServer:
    """Listen at once; answer from a thread. Raises OSError where the port is taken."""
    handler = type("MetricsHandler", (Handler,), {"collector": Collector(run)})
    server = Server(host, port, handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
