"""The web server of `python -m train audit DATA --serve`: the audit's page, and its corrections.

    GET  /             the page
    GET  /corrections  {"corrections": [{"path", "action", "label"}, …]}
    POST /corrections  the same content: corrections to add, replace or take out
    GET  /label        the labelling page, with the suspicious labels

`models.labelling.local_server` says how requests of other sites are refused.
"""

from http import HTTPStatus

from models.labelling import LabelApp, LocalRequestHandler, LocalServer, RequestRefused
from train.audit.editing import CorrectionEditor
from train.data import DataError

PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class AuditServer(LocalServer):
    """Serves one page and saves the corrections that are made on it."""

    def __init__(
        self, page: str, editor: CorrectionEditor, app: LabelApp | None, host: str, port: int
    ):
        """Listen. `app` is the labelling page. Raises DataError for an address of no use."""
        self.page = page.encode(errors="replace")
        self.editor = editor
        try:
            super().__init__(host, port, app, AuditRequestHandler)
        except ValueError as error:
            raise DataError(str(error)) from error


class AuditRequestHandler(LocalRequestHandler):
    """One connection to an `AuditServer`."""

    server: AuditServer

    def answer(self, method: str, path: str) -> bool:
        """Answer with the page, or read or save corrections. Raises RequestRefused."""
        if (method, path) == ("GET", "/"):
            headers = {"Content-Security-Policy": PAGE_POLICY}
            self.send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page, headers)
        elif (method, path) == ("GET", "/corrections"):
            self.send_json(HTTPStatus.OK, {"corrections": self._read_corrections()})
        elif (method, path) == ("POST", "/corrections"):
            count = self._save_corrections(self.read_body())
            self.send_json(HTTPStatus.OK, {"count": count})
        else:
            return False
        return True

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
