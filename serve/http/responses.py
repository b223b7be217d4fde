"""Requests and responses of the service, and errors as RFC 9457 problem+json."""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Any

Header = tuple[bytes, bytes]
JSON, PROBLEM = b"application/json", b"application/problem+json"


@dataclass(slots=True)
class Request:
    """What a handler sees: the ASGI scope and receive, headers by name in lower case, and the request's id."""

    scope: dict
    receive: Any
    headers: dict[bytes, bytes]
    id: str


@dataclass(slots=True)
class Response:
    status: int
    body: bytes
    content_type: bytes = JSON
    headers: list[Header] = field(default_factory=list)
    close: bool = False  # the connection is not used again


class Problem(Exception):
    """Ends a request with this status; `detail` tells the client what is wrong and what to do."""

    def __init__(
        self,
        status: int,
        detail: str,
        reason: str | None = None,
        close: bool = False,
        allow: str = "",
    ):
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.reason = reason  # why it was turned away before any work, for rejected_total
        self.allow = allow  # with 405: the methods that the path does take
        self.close = (
            close  # the connection can't be used any more, e.g. since the body was not read
        )

    def response(self, request_id: str) -> Response:
        body = b'%b, "request_id": "%b"}' % (
            _opening(self.status, self.detail),
            request_id.encode(),
        )
        headers = retry_after(self.status)
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.allow:
            headers.append((b"allow", self.allow.encode()))
        return Response(self.status, body, PROBLEM, headers, self.close)

    def members(self) -> dict[str, Any]:
        return {
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
        }


@lru_cache(64)  # under overload it is the same again and again
def _opening(status: int, detail: str) -> bytes:
    """The body of a problem without its end."""
    return json.dumps({"type": "about:blank", **Problem(status, detail).members()}).encode()[:-1]


def retry_after(status: int) -> list[Header]:
    """The header that tells a client to come back, where that helps."""
    return [(b"retry-after", b"1")] if status in (429, 503) else []


def as_json(value: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(value, separators=(",", ":")).encode())
