"""One POST /predict from head to answer, by callbacks.

An asyncio task and ASGI messages cost as much as all else that an HTTP process does for a request; so the connection
hands /predict to this class instead of to an ASGI app, and all other paths go to `serve.http.app` as usual.
"""

import time
from typing import TYPE_CHECKING

from serve import logs
from serve.http.dispatcher import Ask
from serve.http.predict_endpoint import Place
from serve.http.responses import Problem, Response

if TYPE_CHECKING:
    from serve.http.app import Front
    from serve.http.protocol import Connection


class Exchange:
    """`cycle` is uvicorn's request and response; its body fills while the client sends."""

    __slots__ = ("ask", "connection", "cycle", "front", "place", "request", "started")

    def __init__(self, front: "Front", connection: "Connection", cycle):
        self.front, self.connection, self.cycle = front, connection, cycle
        self.ask: Ask | None = None
        self.place: Place | None = None  # from its admission to its end

    def begin(self) -> None:
        """Admit it by its head."""
        if self.connection.exchange is not self:
            return  # the client left first
        self.started = time.perf_counter()
        self.request = self.front.request(self.cycle.scope, None)
        try:
            self.front.authorize(self.request.headers)
            self.place = self.front.predictor.enter(self.request.headers)
        except Problem as problem:
            return self.fail(problem)
        if not self.cycle.more_body:
            self.arrived()
        elif self.cycle.waiting_for_100_continue:
            self.cycle.waiting_for_100_continue = False
            self.connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def grew(self) -> None:
        """More of the body is there, and not all of it yet."""
        if self.place is not None:
            try:
                self.front.predictor.hold(self.place, 0, len(self.cycle.body))
            except Problem as problem:
                self.cycle.body.clear()
                self.fail(problem)

    def arrived(self) -> None:
        """The body is there."""
        predictor, place = self.front.predictor, self.place
        if place is None:
            return
        try:
            content = bytes(self.cycle.body)
            self.cycle.body.clear()
            images, top_k, flags = predictor.parse(self.request, content)
            predictor.hold(place, len(images), len(content))
            self.ask = predictor.ask(images, top_k, flags, self.answered)
        except Problem as problem:
            self.fail(problem)
        except Exception:
            self.broken()

    def answered(self, ask: Ask) -> None:
        predictor = self.front.predictor
        try:
            response = predictor.compose(self.request.id, predictor.result(ask))
        except Problem as problem:
            return self.fail(problem)
        except Exception:
            return self.broken()
        self.respond(response)

    def fail(self, problem: Problem) -> None:
        problem.close |= withheld(self.cycle)
        self.respond(self.front.refused(problem, self.request.id))

    def broken(self) -> None:
        logs.logger.exception("a request failed", extra={"fields": {"request_id": self.request.id}})
        self.fail(Problem(500, "the service failed on this request", close=True))

    def respond(self, response: Response) -> None:
        self.leave()
        close = response.close or not self.cycle.keep_alive or self.front.state.draining
        self.connection.respond(
            self.cycle, self.front.head(response, self.request.id, close) + response.body, close
        )
        self.front.finish(self.request, response, time.perf_counter() - self.started)

    def lost(self) -> None:
        """The client went away: its place is free again, and its work is dropped."""
        if self.ask is not None:
            self.ask.cancel()
        begun = self.place is not None
        self.leave()
        if begun:
            self.front.finish(self.request, None, time.perf_counter() - self.started)

    def leave(self) -> None:
        self.connection.exchange = self.ask = (
            None  # no ring of references is left for the garbage collector to find
        )
        if self.place is not None:
            self.front.predictor.leave(self.place)
            self.place = None


def withheld(cycle) -> bool:
    """Whether the client still waits for 100 Continue. It need not send the body now, so we can't tell what comes."""
    return cycle.waiting_for_100_continue and cycle.more_body
