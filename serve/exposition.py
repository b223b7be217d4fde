"""/metrics on a port of its own, answered by the supervisor's process, which does nothing else under load."""
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from serve.metrics import Collector


class Handler(BaseHTTPRequestHandler):
    collector: Collector
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "imago", ""
    timeout = 5  # seconds for a scraper to say what it wants

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
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not logged."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: type[Handler]):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)


def start(host: str, port: int, run: str) -> ThreadingHTTPServer:
    """Listen at once; answer from a thread. Raises OSError where the port is taken."""
    handler = type("MetricsHandler", (Handler,), {"collector": Collector(run)})
    server = Server(host, port, handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
