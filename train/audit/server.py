"""The web server of `python -m train audit DATA --serve`: the audit's page, and its corrections.

    GET  /             the page
    GET  /corrections  {"corrections": [{"path", "action", "label"}, …]}
    POST /corrections  the same content: corrections to add, replace or take out

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
from urllib.parse import urlsplit

from train.audit.editing import CorrectionEditor
from train.data import DataError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8010
MAX_BODY_BYTES = 64 << 20
SAME_ORIGIN_SITES = ("same-origin", "none")  # none: by the user, such as from the address bar
SOCKET_TIMEOUT_SECONDS = 60

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class RequestRefused(Exception):
    """A request that gets an error. The message is shown to the user."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class AuditServer(ThreadingHTTPServer):
    """Serves one page and saves the corrections that are made on it."""

    daemon_threads = True

    def __init__(self, page: str, editor: CorrectionEditor, host: str, port: int):
        """Listen. Raises DataError where the address can't be used."""
        self.page = page.encode(errors="replace")
        self.editor = editor
        self.host = host
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), AuditRequestHandler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
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


class AuditRequestHandler(BaseHTTPRequestHandler):
    """One connection to an `AuditServer`."""

    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT_SECONDS
    server: AuditServer

    def do_GET(self) -> None:
        """Answer with the page, or with the corrections that are saved."""
        try:
            self._check_host()
            path = urlsplit(self.path).path
            if path == "/":
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)
            elif path == "/corrections":
                self._send_json(HTTPStatus.OK, {"corrections": self._read_corrections()})
            else:
                raise RequestRefused(HTTPStatus.NOT_FOUND, "no such page")
        except RequestRefused as refused:
            self._refuse(refused)

    def do_POST(self) -> None:
        """Save corrections."""
        try:
            self._check_host()
            self._check_site()
            if urlsplit(self.path).path != "/corrections":
                raise RequestRefused(HTTPStatus.NOT_FOUND, "no such page")
            count = self._save_corrections(self._read_body())
            self._send_json(HTTPStatus.OK, {"count": count})
        except RequestRefused as refused:
            self._refuse(refused)

    # Checks

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

    # Corrections

    def _read_body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise RequestRefused(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json"
            )
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestRefused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        if int(length) > MAX_BODY_BYTES:
            raise RequestRefused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BODY_BYTES} bytes"
            )
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise RequestRefused(HTTPStatus.BAD_REQUEST, "the body is shorter than Content-Length")
        return body

    def _read_corrections(self) -> list[dict[str, str]]:
        try:
            return self.server.editor.read()
        except DataError as error:
            raise RequestRefused(HTTPStatus.CONFLICT, str(error)) from error

    def _save_corrections(self, content: bytes) -> int:
        try:
            return self.server.editor.save(content)
        except DataError as error:
            raise RequestRefused(HTTPStatus.BAD_REQUEST, str(error)) from error
        except OSError as error:
            reason = error.strerror or error
            raise RequestRefused(
                HTTPStatus.INTERNAL_SERVER_ERROR, f"{self.server.editor.file}: {reason}"
            ) from error

    # Answers

    def _refuse(self, refused: RequestRefused) -> None:
        self.close_connection = True  # the body of the request may not have been read
        self._send_json(refused.status, {"error": str(refused)})

    def _send_json(self, status: HTTPStatus, content: object) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: HTTPStatus, content_type: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in SECURITY_HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the page shows what is saved and what is not."""
