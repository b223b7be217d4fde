"""An HTTP server of files in memory, which can break off, change and refuse."""

import contextlib
import hashlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HEADERS = ("Range", "If-Range", "Authorization")


@dataclass
class SeenRequest:
    path: str
    headers: dict[str, str]  # those of `HEADERS` that were sent


@dataclass
class FileServer:
    """What the server answers; a test may change it at any time."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)  # instead of a file
    requests: list[SeenRequest] = field(default_factory=list)
    bytes_before_break: int | None = None  # the connection is closed after so many bytes
    headers: dict[str, str] = field(default_factory=dict)  # of each answer
    has_validators: bool = True  # whether files have an entity tag
    before_body: Callable[[], None] = lambda: None

    def ranges(self) -> list[str | None]:
        """Return the header Range of each request."""
        return [request.headers.get("Range") for request in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FileServer

    def do_GET(self) -> None:
        state = self.state
        path = self.path.partition("?")[0]
        sent = {name: self.headers[name] for name in HEADERS if self.headers[name]}
        state.requests.append(SeenRequest(self.path, sent))
        status = state.statuses.get(path, 200 if path in state.files else 404)
        if status != 200:
            self._answer(status, {}, b"")
            return

        content = state.files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        headers = {"ETag": etag} if state.has_validators else {}
        requested = sent.get("Range")
        if requested is None or sent.get("If-Range") != etag:
            self._answer(200, headers, content)
            return
        start = int(requested.removeprefix("bytes=").removesuffix("-"))
        if start >= len(content):
            self._answer(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
            return
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206, headers, content[start:])

    do_HEAD = do_GET

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**self.state.headers, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.state.before_body()
        limit = self.state.bytes_before_break
        # The client may have read enough.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[:limit])
            if limit is not None and limit < len(body):
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_WR)

    def log_message(self, *arguments: object) -> None:
        pass


@contextlib.contextmanager
def file_server() -> Iterator[FileServer]:
    """Run a server of files on a free port."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state = FileServer(f"http://127.0.0.1:{server.server_address[1]}")
    handler.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()
