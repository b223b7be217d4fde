"""One request to POST /predict, from its head to its response, by callbacks.

An asyncio task and ASGI messages would cost as much as everything else that an HTTP process does
for a request. So `serve.http.protocol` hands POST /predict to this class, and all other requests to
the ASGI app.
"""

import time
from typing import Any, Protocol

from serve import logs
from serve.http.app import Service
from serve.http.dispatcher import PendingRequest
from serve.http.predict_endpoint import Reservation
from serve.http.responses import Problem, Response, Scope


class PredictConnection(Protocol):
    """The connection of a client, while it answers the request."""

    def end_predict_request(self) -> None:
        """Forget the request: no callback reaches it any more."""

    def take_body(self) -> bytes:
        """Return the bytes of the body that have arrived, and free their buffer."""

    def is_body_complete(self) -> bool:
        """Whether the whole body has arrived."""

    def is_body_withheld(self) -> bool:
        """Whether the client waits for 100 Continue before it sends the body."""

    def send_continue(self) -> None:
        """Send 100 Continue."""

    def send_response(self, response: Response, request_id: str, close: bool) -> None:
        """Send the response. Close the connection after it if `close`, or if HTTP demands it."""


class PredictRequest:
    """Reserves capacity, submits the images and sends the response.

    The connection calls `start`, then `on_body_grown` any number of times and `on_body_complete`
    once; `on_disconnect` may come at any time. After the response it calls nothing more.
    """

    __slots__ = (
        "connection",
        "content_length",
        "pending",
        "request",
        "reservation",
        "service",
        "started",
    )

    def __init__(self, service: Service, connection: PredictConnection, scope: Scope) -> None:
        """Prepare a request with this ASGI scope; `start` admits it."""
        self.started = time.perf_counter()
        self.service = service
        self.connection = connection
        self.request = service.build_request(scope, _receive_nothing)
        self.content_length = 0  # of a body that does not arrive together with its head
        self.reservation: Reservation | None = None  # from the admission to the end
        self.pending: PendingRequest | None = None  # while workers have its images

    def start(self) -> None:
        """Admit the request by its head, or send an error."""
        try:
            self.service.check_access(self.request)
            self.reservation = self.service.predict_endpoint.admit(self.request.headers)
        except Problem as problem:
            self.fail(problem)
            return

        if self.connection.is_body_complete():
            self.on_body_complete()
            return
        self.content_length = int(self.request.headers.get(b"content-length", b"0"))
        if self.connection.is_body_withheld():
            self.connection.send_continue()

    def on_body_grown(self, size: int) -> None:
        """Reserve the `size` bytes of the body that have arrived so far."""
        if self.reservation is None:
            return
        try:
            self.service.predict_endpoint.reserve(self.reservation, 0, size)
        except Problem as problem:
            self.connection.take_body()
            self.fail(problem)

    def on_body_complete(self) -> None:
        """Parse the body and submit its images."""
        if self.reservation is None:
            return
        endpoint = self.service.predict_endpoint
        try:
            content = self.connection.take_body()
            inputs = endpoint.parse(self.request, content)
            endpoint.reserve(self.reservation, len(inputs.images), len(content))
            self.pending = endpoint.submit(inputs, self.on_answers)
        except Problem as problem:
            self.fail(problem)
        except Exception:
            self.fail_unexpectedly()

    def on_answers(self, pending: PendingRequest) -> None:
        """Send the response: every image has an answer, or the deadline has passed."""
        endpoint = self.service.predict_endpoint
        try:
            answers = endpoint.collect_answers(pending)
            response = endpoint.build_response(self.request.id, answers)
        except Problem as problem:
            self.fail(problem)
            return
        except Exception:
            self.fail_unexpectedly()
            return
        self.respond(response)

    def fail(self, problem: Problem) -> None:
        """Send an error."""
        if self.connection.is_body_withheld():
            problem.close = True
        self.respond(self.service.reject(problem, self.request.id))

    def fail_unexpectedly(self) -> None:
        """Log the exception that is handled now and send status 500."""
        logs.logger.exception("a request failed", extra={"fields": {"request_id": self.request.id}})
        self.fail(Problem(500, "the service failed on this request", close=True))

    def respond(self, response: Response) -> None:
        """Send the response and record the request."""
        self._release()
        if self.service.cross_site.has_origins:
            self.service.cross_site.add_headers(self.request.headers, response)
        close = response.close or self.service.state.draining
        self.connection.send_response(response, self.request.id, close)
        self.service.record(self.request, response, time.perf_counter() - self.started)

    def on_disconnect(self) -> None:
        """Drop the request: the client has left."""
        if self.pending is not None:
            self.pending.cancel()
        was_admitted = self.reservation is not None
        self._release()
        if was_admitted:
            self.service.record(self.request, None, time.perf_counter() - self.started)

    def _release(self) -> None:
        """Release the capacity and break the reference cycles.

        The garbage collector would find them only much later.
        """
        self.connection.end_predict_request()
        self.pending = None
        if self.reservation is not None:
            self.service.predict_endpoint.release(self.reservation)
            self.reservation = None


async def _receive_nothing() -> dict[str, Any]:
    """Replace ASGI's receive, which is not called: the body comes through the connection."""
    raise RuntimeError("the body of POST /predict does not come through ASGI")
