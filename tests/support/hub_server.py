"""A Hugging Face hub on this machine: serves files of repositories as the real hub does."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `directory/<owner>/<repository>/<file>` at the hub's addresses; lists its requests."""

    def __init__(self, directory: Path, status: int | None = None) -> None:
        """`status`: answer each request with it, such as 503."""
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(has_body=False)

            def do_GET(self) -> None:
                self._answer(has_body=True)

            def _answer(self, has_body: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                repository, _, file = self.path.lstrip("/").partition("/resolve/main/")
                path = directory / repository / file
                if status is not None or not path.is_file():
                    self.send_response(status or 404)
                    if path.parent.is_dir():
                        self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return

                content = path.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if has_body:
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Close the port; the next connection is refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
