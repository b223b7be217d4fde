"""Uvicorn's HTTP protocol with a guard at the door: limits for heads, connections and slow clients; a short way for
/predict; an ear for clients that go away.

All connections of a process share one `Front`, which sets `Connection.front` when it starts and calls `sweep` every
second.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serve.http.predict_request import Exchange
from serve.http.responses import Problem
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.http.app import Front

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
LAST_CALL = (
    0.1  # seconds, when the process ends, for a request on a connection that has only just come
)
SPARE = 16  # connections beyond the bound, for one question about our health each: a crowd is no reason to be killed
HEALTH = ("/health/", "/v2/health/")
MAX_DISCARDED_BYTES = (
    16 << 20
)  # of a body whose request was answered already; then the connection is cut


class Connection(HttpToolsProtocol):
    """Handlers find it in the state of the scope; whoever sets `on_lost` is called when the client is gone.

    Requests have their turn one after the other (`current`). Those that a client sends ahead wait in `pipeline`, and no
    more is read from it meanwhile; nor does one begin while the client does not take the answers before it.
    """

    front: ClassVar["Front"]
    open: ClassVar[set["Connection"]] = set()
    uvicorn: ClassVar[ServerState]  # keeps the Date header of this second

    on_lost: Callable[[], None] | None = None
    exchange: Exchange | None = None
    current: RequestResponseCycle | None = None  # the request that has its turn
    farewell: Problem | None = (
        None  # what the client is told at the end, after the answers that are due
    )
    over = False  # nothing that comes is looked at any more
    in_message = in_head = False  # where the parser is
    moved = begun = False  # whether this read brought it on, and to another request
    unfinished = read_bytes = body_bytes = discarded = 0
    unsent = 0.0  # since when an answer has not been taken

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # asyncio's base is wider
        super().connection_made(transport)
        self.since = self.loop.time()  # when we last began to wait for the client
        self.open.add(self)
        Connection.uvicorn = self.server_state
        crowd = len(self.open) - self.front.settings.max_connections
        self.spare = crowd > 0
        if crowd > SPARE:
            self.crowded()

    def crowded(self) -> None:
        self.refuse(Problem(503, "too many connections; try again in a second", "connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open.discard(self)
        self.over = True
        super().connection_lost(exc)
        if self.exchange is not None:
            self.exchange.lost()
        if self.on_lost is not None:
            self.on_lost()

    def shutdown(self) -> None:
        """The process ends. Hanging up at once would reset a client whose request is on its way."""
        self.loop.call_later(LAST_CALL, super().shutdown)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.proceed()

    def data_received(self, data: bytes) -> None:
        if self.over:
            return
        self.moved, self.begun, self.read_bytes, self.body_bytes = False, False, len(data), 0
        self.feed(data)
        if self.over:
            return
        if self.begun and self.in_head:  # only the end of it is this head
            self.unfinished = min(len(data) - self.body_bytes, len(data.rpartition(b"\r\n\r\n")[2]))
        elif (
            self.in_head or not self.moved
        ):  # a head, or what HTTP has between the pieces of a body, and trailers
            self.unfinished += len(data)
        else:
            self.unfinished = 0
            if self.exchange is not None and self.own:
                self.exchange.grew()
        if self.unfinished > MAX_HEAD_BYTES:
            self.too_much()

    def feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.decline(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.refuse(Problem(400, "this is not HTTP", "malformed"))

    def decline(self, rest: memoryview) -> None:
        """An upgrade to HTTP/2, as Java's client and `curl --http2` ask for in every request. The parser looks at no
        body then, so it gets the head once more, as if nothing had been asked, then the rest up to the next such one.
        """
        try:
            while not self.over:
                method = self.parser.get_method()
                if method == b"CONNECT":
                    return self.refuse(Problem(400, "this is no proxy", "malformed"))
                kept = [
                    header
                    for header in self.headers
                    if header[0] not in (b"upgrade", b"connection")
                ]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(
                    lenient_data_after_close=True
                )  # as uvicorn has it
                head = b"".join(b"%b: %b\r\n" % header for header in kept)
                self.parser.feed_data(b"%b %b HTTP/1.1\r\n%b\r\n" % (method, self.url, head))
                try:
                    return self.parser.feed_data(rest)
                except httptools.HttpParserUpgrade as upgrade:
                    rest = rest[upgrade.args[0] :]
        except httptools.HttpParserError:
            self.refuse(Problem(400, "this is not HTTP", "malformed"))

    def too_much(self) -> None:
        self.refuse(
            Problem(
                431,
                f"a request may have {MAX_HEADERS} headers of {MAX_HEAD_BYTES} bytes in all",
                "head",
            )
        )

    # What the parser calls, in this order.

    def on_message_begin(self) -> None:
        if self.over:
            return
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        if self.current is None:
            self.since = self.loop.time()
        self.in_message = self.in_head = self.moved = self.begun = True

    def on_headers_complete(self) -> None:
        if self.over or self.parser.should_upgrade():
            return
        large = self.unfinished or self.read_bytes > MAX_HEAD_BYTES  # else it can't be too long
        if len(self.headers) > MAX_HEADERS or (large and self.head_bytes() > MAX_HEAD_BYTES):
            return self.too_much()
        self.in_head = False
        super().on_headers_complete()

    def head_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) for name, value in self.headers)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """A request would have its turn, says uvicorn, which does not look at whether answers are taken."""
        if self.spare:
            if not cycle.scope["path"].startswith(HEALTH):
                return self.crowded()
            cycle.keep_alive = False
        if self.current is not None or self.flow.write_paused:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, app))
            return
        self.current = cycle
        if cycle.scope["path"] != "/predict" or cycle.scope["method"] != "POST":
            return super()._start_asgi_task(cycle, app)
        self.exchange = Exchange(self.front, self, cycle)
        if cycle.more_body:
            self.exchange.begin()
        else:
            self.loop.call_soon(
                self.exchange.begin
            )  # a long pipeline must not become a deep recursion

    def on_body(self, body: bytes) -> None:
        if self.over:
            return
        self.moved = True
        self.body_bytes += len(body)
        if self.exchange is not None and self.own:
            self.cycle.body += body
        elif self.cycle.response_complete:
            self.discarded += len(body)
            if self.discarded > MAX_DISCARDED_BYTES:
                self.transport.abort()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.over or self.parser.should_upgrade():
            return
        super().on_message_complete()
        own = self.own
        self.in_message, self.moved, self.discarded = False, True, 0
        if self.exchange is not None and own:
            self.exchange.arrived()

    @property
    def own(self) -> bool:
        """Whether what the parser is in belongs to the request that has its turn."""
        return self.in_message and not self.in_head and self.current is self.cycle

    # Answers.

    def respond(self, cycle: RequestResponseCycle, payload: bytes, close: bool) -> None:
        """Send a whole response, head and body, as the answer of `cycle`."""
        cycle.response_started = cycle.response_complete = True
        if cycle.disconnected or self.transport.is_closing():
            return
        self.transport.write(payload)
        if close or not cycle.keep_alive:
            self.over = True
            self.transport.close()
        cycle.on_response()

    def on_response_complete(self) -> None:
        """As uvicorn has it, but idle connections are found by `sweep` instead of by a timer each."""
        self.server_state.total_requests += 1
        self.current = None
        self.since = self.loop.time()
        self.proceed()

    def proceed(self) -> None:
        """Go on with the request that waits, with reading, or with the farewell."""
        if self.current is not None or self.flow.write_paused or self.transport.is_closing():
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self.farewell is not None:
            self.part(self.farewell)
        if not self.pipeline:
            self.flow.resume_reading()

    def refuse(self, problem: Problem) -> None:
        """Look at nothing more from this client: answer what is due, then say why, and hang up."""
        if self.over or self.transport.is_closing():
            return
        self.over = problem.close = True
        if self.own and self.exchange is not None:
            self.exchange.fail(problem)
        elif self.in_message and not self.in_head and self.cycle.response_started:
            self.transport.abort()  # it has its answer
        elif self.own or (self.current is None and not self.pipeline):
            self.part(problem)
        else:
            self.farewell = problem
            self.proceed()

    def part(self, problem: Problem) -> None:
        number = self.front.new_id()
        response = self.front.refused(problem, number)
        self.transport.write(self.front.head(response, number, True) + response.body)
        self.transport.close()
        self.front.count(response.status, 0.0)

    # Time.

    @classmethod
    def sweep(cls) -> None:
        """Hang up on clients that are too slow to send, to take, or to come with another request."""
        now = asyncio.get_running_loop().time()
        for connection in list(cls.open):
            connection.look(cls.front.settings, now)

    def look(self, settings: Settings, now: float) -> None:
        if self.transport.get_write_buffer_size():
            self.unsent = self.unsent or now
            if now - self.unsent > settings.deadline_ms / 1000 + settings.read_timeout_seconds:
                self.transport.abort()
            return
        self.unsent = 0.0
        if self.current is not None and not self.own:
            return  # it waits for us
        begun = self.in_message or self.cycle is None
        if now - self.since > (
            settings.read_timeout_seconds if begun else settings.keep_alive_seconds
        ):
            if self.in_message:
                self.refuse(Problem(408, "the request did not arrive in time", "slow"))
            self.transport.close()
