"""A web server for one person on this machine: the labelling page, and whatever a subclass adds.

    GET  /label…       the labelling page and its requests, as `LabelApp` answers them
    POST /label/labels save labels

It listens on the loopback interface unless told otherwise. Pages of other sites can neither write
(Origin and Sec-Fetch-Site are checked) nor read through a name that resolves to this machine (Host
is checked: DNS rebinding).
"""

import ipaddress
import json
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from models.labelling.app import LabelApp, LabelProblem

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8010
MAX_BODY_BYTES = 64 << 20
MAX_LENGTH_DIGITS = 20  # of Content-Length; int() raises for thousands of them
SAME_ORIGIN_SITES = ("same-origin", "none")  # none: by the user, such as from the address bar
SOCKET_TIMEOUT_SECONDS = 60

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class RequestRefused(Exception):
    """A request that gets an error. The message is shown to the user."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class LocalServer(ThreadingHTTPServer):
    """Serves the labelling page of `app`, if there is one."""

    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        app: LabelApp | None,
        handler: "type[LocalRequestHandler] | None" = None,
    ):
        """Listen. Raises ValueError where the address can't be used."""
        self.app = app
        self.host = host
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), handler or LocalRequestHandler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"--host {host} --port {port}: {reason}; give another port, or 0 for any free one"
            ) from error

    def server_bind(self) -> None:
        """Bind without the look-up of this machine's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name = self.host
        self.server_port = self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close their connection; print other errors."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """URL of the page."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}/"

    def is_own_host(self, host: str) -> bool:
        """Whether a Host header names this server, by a name that no other site can choose."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self.host.lower()):
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_loopback_only()

    def _is_loopback_only(self) -> bool:
        address = ipaddress.ip_address(str(self.server_address[0]).partition("%")[0])
        return address.is_loopback


class LocalRequestHandler(BaseHTTPRequestHandler):
    """One connection to a `LocalServer`."""

    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT_SECONDS
    server: LocalServer

    def do_GET(self) -> None:
        """Answer a request for a page or for data."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Save."""
        self._answer("POST")

    def _answer(self, method: str) -> None:
        try:
            self._check_host()
            if method == "POST":
                self._check_site()
            path = self._split_target().path
            if not self.answer(method, path):
                self._answer_label(method, path)
        except (RequestRefused, LabelProblem) as refused:
            self._refuse(refused.status, str(refused))

    def answer(self, method: str, path: str) -> bool:
        """Answer the further paths of a subclass; return whether this is one. Raises as below."""
        if method == "GET" and path == "/":
            self.send(HTTPStatus.FOUND, "text/plain", b"", {"Location": "label"})
            return True
        return False

    def _answer_label(self, method: str, path: str) -> None:
        """Answer a request of the labelling page. Raises RequestRefused, or LabelProblem."""
        app = self.server.app
        if app is None or not f"{path}/".startswith("/label/"):
            raise RequestRefused(HTTPStatus.NOT_FOUND, "no such page")
        body = self.read_body() if method == "POST" else b""
        query = dict(parse_qsl(self._split_target().query))
        reply = app.handle(method, unquote(path), query, body)
        self.send(HTTPStatus.OK, reply.content_type, reply.body, reply.headers)

    # Checks

    def _split_target(self) -> SplitResult:
        """Return the parts of the request's target. Raises RequestRefused."""
        try:
            return urlsplit(self.path)
        except ValueError as error:
            raise RequestRefused(
                HTTPStatus.BAD_REQUEST, f"the target is no URL: {error}"
            ) from error

    def _check_host(self) -> None:
        """Refuse requests for another host: its page would read this server's answers."""
        if not self.server.is_own_host(self.headers.get("Host", "")):
            raise RequestRefused(
                HTTPStatus.FORBIDDEN, f"the request is for another host; open {self.server.url}"
            )

    def _check_site(self) -> None:
        """Refuse requests that a page of another site sends; other programs name no origin."""
        site = self.headers.get("Sec-Fetch-Site", "same-origin").lower()
        host = self.headers.get("Host", "").lower()
        origin = self.headers.get("Origin")
        is_other_origin = origin is not None and origin.lower().partition("://")[2] != host
        if site not in SAME_ORIGIN_SITES or is_other_origin:
            raise RequestRefused(
                HTTPStatus.FORBIDDEN, "requests by web pages of other sites are refused"
            )

    def read_body(self) -> bytes:
        """Return the body, which must be JSON. Raises RequestRefused."""
        if self.headers.get_content_type() != "application/json":
            raise RequestRefused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json"
            )
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestRefused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        size = int(length[:MAX_LENGTH_DIGITS])
        if size > MAX_BODY_BYTES:
            raise RequestRefused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BODY_BYTES} bytes"
            )
        body = self.rfile.read(size)
        if len(body) < size:
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "the body is shorter than Content-Length")
        return body

    # Answers

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # the body of the request may not have been read
        self.send_json(status, {"error": message, "detail": message})

    def send_json(self, status: int, content: object) -> None:
        """Send an answer as JSON."""
        self.send(status, "application/json", json.dumps(content).encode())

    def send(
        self, status: int, content_type: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        """Send an answer. `headers` are added to those that keep other pages out."""
        self.send_response(status)
        for name, value in {**SECURITY_HEADERS, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the page shows what is saved and what is not."""
