"""Requests, responses and problems: the types that all HTTP code of the service shares.

Errors are RFC 9457 problem details (application/problem+json).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Any, BinaryIO, NamedTuple, Protocol

from starlette import types

Header = tuple[bytes, bytes]
Scope = Mapping[str, Any]  # of ASGI; read only
Receive = types.Receive
Send = types.Send

JSON = b"application/json"
PROBLEM_JSON = b"application/problem+json"

# In logs and traces, the status of a request whose client left before the response, as in nginx.
CLIENT_CLOSED_REQUEST = 499

SECURITY_HEADERS: list[Header] = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class ClientConnection(Protocol):
    """The connection to a client, as the service sees it. `serve.http.protocol` implements it."""

    def set_disconnect_callback(self, callback: Callable[[], object] | None) -> None:
        """Call `callback` if the client disconnects; None calls nothing."""

    def is_body_withheld(self) -> bool:
        """Whether the client of the current request waits for 100 Continue with its body."""

    def enforce_timeouts(self, now: float) -> None:
        """Close the connection if its client is too slow. `now` is the event loop's time [s]."""

    def idle_since(self) -> float | None:
        """Return the event loop's time [s] since which the client is idle, None if it is not."""

    def close_idle(self) -> None:
        """Close the connection, which is idle."""


@dataclass(slots=True)
class Request:
    """A request as handlers see it."""

    scope: Scope  # of ASGI
    receive: Receive  # of ASGI
    headers: dict[bytes, bytes]  # by lower-case name
    id: str

    @property
    def connection(self) -> ClientConnection:
        """The connection that the request came over."""
        return self.scope["state"]["connection"]


class OpenFile(NamedTuple):
    """A file that is the body of a response. It is read while it is sent, and then closed."""

    stream: BinaryIO
    size: int  # in bytes


@dataclass(slots=True)
class Response:
    """A response whose length is known before it is sent."""

    status: int
    body: bytes
    content_type: bytes = JSON
    headers: list[Header] = field(default_factory=list)
    close: bool = False  # close the connection after this response
    file: OpenFile | None = None  # instead of `body`


class Problem(Exception):
    """Ends a request with an error status."""

    def __init__(
        self,
        status: int,
        detail: str,
        reason: str | None = None,
        close: bool = False,
        allow: str = "",
    ) -> None:
        """Describe an error.

        detail: tells the client what is wrong and what to do.
        reason: label of imago_rejected_total, for requests that are rejected before any work.
        close: whether the connection must be closed, e.g. because the body was not read.
        allow: with status 405, the methods that the path does allow.
        """
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.reason = reason
        self.close = close
        self.allow = allow

    def response(self, request_id: str) -> Response:
        """Return the problem as a response to the request with this id."""
        members = _problem_members(self.status, self.detail)
        body = b'%b, "request_id": "%b"}' % (members, request_id.encode())

        headers = retry_after(self.status)
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.allow:
            headers.append((b"allow", self.allow.encode()))
        return Response(self.status, body, PROBLEM_JSON, headers, self.close)

    def members(self) -> dict[str, Any]:
        """Return the members that describe the problem: title, status, detail."""
        return {
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }


@lru_cache(64)  # an overloaded service sends the same problem many times
def _problem_members(status: int, detail: str) -> bytes:
    """Return the JSON object of a problem without its closing brace."""
    problem = {"type": "about:blank", **Problem(status, detail).members()}
    return json.dumps(problem).encode()[:-1]


def retry_after(status: int) -> list[Header]:
    """Return the Retry-After header for a status that passes with time, else no header."""
    return [(b"retry-after", b"1")] if status in (429, 503) else []


def json_response(value: Any, status: int = 200) -> Response:
    """Return a response with `value` as compact JSON."""
    return Response(status, json.dumps(value, separators=(",", ":")).encode())


def _build_head_start(status: HTTPStatus) -> bytes:
    """Return the status line and the security headers."""
    lines = [b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())]
    for name, value in SECURITY_HEADERS:
        lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines)


_HEAD_STARTS = {status.value: _build_head_start(status) for status in HTTPStatus}


def encode_response(
    response: Response, request_id: str, server_headers: list[Header], close: bool
) -> bytes:
    """Return the bytes of an HTTP/1.1 response, head and body.

    server_headers: those that every response of the server has, such as Date.
    close: whether to announce that the connection will be closed.
    """
    parts = [_HEAD_STARTS[response.status]]
    for header in (*server_headers, *response.headers):
        parts.append(b"%b: %b\r\n" % header)
    parts.append(
        b"content-type: %b\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b\r\n"
        % (
            response.content_type,
            len(response.body),
            request_id.encode(),
            b"connection: close\r\n" if close else b"",
        )
    )
    parts.append(response.body)
    return b"".join(parts)
