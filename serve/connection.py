"""Uvicorn's HTTP protocol with a guard at the door: limits for heads, connections and slow clients; a short way for
/predict; an ear for clients that go away.

All connections of a process share one `Front`, which sets `Connection.front` when it starts and calls `sweep` every
second.
"""
import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serve.exchange import Exchange
from serve.responses import Problem

if TYPE_CHECKING:
    from serve.front import Front

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100
LAST_CALL = 0.1  # seconds, when the process ends, for a request on a connection that has only just come
MAX_DISCARDED_BYTES = 16 << 20  # of a body whose request was answered already; then the connection is cut


class Connection(HttpToolsProtocol):
    """Handlers find it in the state of the scope; whoever sets `on_lost` is called when the client is gone."""

    front: ClassVar["Front"]
    open: ClassVar[set["Connection"]] = set()
    uvicorn: ClassVar[ServerState]  # keeps the Date header of this second

    on_lost: Callable[[], None] | None = None
    exchange: Exchange | None = None
    arriving = False  # some of a request is there, but not all
    in_head = False
    head_bytes = discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # asyncio's base is wider
        super().connection_made(transport)
        self.since = self.loop.time()  # when it last began to wait: for a request, or for the rest of one
        self.open.add(self)
        Connection.uvicorn = self.server_state
        if len(self.open) > self.front.settings.max_connections:
            self.refuse(Problem(503, "too many connections; try again in a second", "connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open.discard(self)
        super().connection_lost(exc)
        if self.exchange is not None:
            self.exchange.lost()
        if self.on_lost is not None:
            self.on_lost()

    def shutdown(self) -> None:
        """The process ends. Hanging up at once would reset a client whose request is on its way."""
        self.loop.call_later(LAST_CALL, super().shutdown)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.in_head:
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEAD_BYTES:
                self.refuse(Problem(431, f"the head of a request may have {MAX_HEAD_BYTES} bytes", "head"))
        elif self.arriving and self.exchange is not None and self.exchange.cycle is self.cycle:
            self.exchange.grew()

    # What the parser calls, in this order.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        self.since = self.loop.time()
        self.arriving = self.in_head = True

    def on_headers_complete(self) -> None:
        self.in_head, self.head_bytes = False, 0
        if len(self.headers) > MAX_HEADERS:
            return self.refuse(Problem(431, f"a request may have {MAX_HEADERS} headers", "head"))
        super().on_headers_complete()

    def _start_asgi_task(self, cycle, app) -> None:
        """A request has its turn; uvicorn holds pipelined ones back until then."""
        if cycle.scope["path"] != "/predict" or cycle.scope["method"] != "POST":
            return super()._start_asgi_task(cycle, app)
        self.exchange = Exchange(self.front, self, cycle)
        if cycle.more_body:
            self.exchange.begin()
        else:
            self.loop.call_soon(self.exchange.begin)  # a long pipeline must not become a deep recursion

    def on_body(self, body: bytes) -> None:
        if self.cycle is None:
            return
        if self.exchange is not None and self.exchange.cycle is self.cycle:
            self.cycle.body += body
            return
        if self.cycle.response_complete:
            self.discarded += len(body)
            if self.discarded > MAX_DISCARDED_BYTES:
                self.transport.abort()
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.arriving, self.discarded = False, 0
        if self.cycle is None:
            return
        super().on_message_complete()
        if self.exchange is not None and self.exchange.cycle is self.cycle:
            self.exchange.arrived()

    # Answers.

    def respond(self, cycle, payload: bytes, close: bool) -> None:
        """Send a whole response, head and body, as the answer of `cycle`."""
        if cycle.disconnected:
            return
        cycle.response_started = cycle.response_complete = True
        self.transport.write(payload)
        if close or not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()

    def on_response_complete(self) -> None:
        """As uvicorn has it, but idle connections are found by `sweep` instead of by a timer each."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if not self.arriving:
            self.since = self.loop.time()
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())

    def refuse(self, problem: Problem) -> None:
        """Answer something that is no request we take, unless another answer is due first, and hang up."""
        if self.transport.is_closing():
            return
        if not self.pipeline and (self.exchange is None or self.exchange.cycle is self.cycle):
            number = self.front.new_id()
            response = self.front.refused(problem, number)
            self.transport.write(self.front.head(response, number, True) + response.body)
            self.front.count(response.status, 0.0)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.refuse(Problem(400, "this is not HTTP", "malformed"))

    # Time.

    @property
    def busy(self) -> bool:
        """A request is here whole, and not yet answered."""
        return self.cycle is not None and not self.cycle.response_complete and not self.arriving

    @classmethod
    def sweep(cls) -> None:
        """Hang up on clients that are too slow to send, to take, or to come with another request."""
        settings, now = cls.front.settings, asyncio.get_running_loop().time()
        for connection in list(cls.open):
            waited = now - connection.since
            if connection.transport.get_write_buffer_size():
                if waited > settings.deadline_ms / 1000 + settings.read_timeout_seconds:
                    connection.transport.abort()
            elif connection.busy:
                continue
            elif connection.arriving or connection.cycle is None:
                if waited > settings.read_timeout_seconds:
                    if connection.arriving and not connection.answering:
                        connection.refuse(Problem(408, "the request did not arrive in time", "slow"))
                    connection.transport.abort() if connection.answering else connection.transport.close()
            elif waited > settings.keep_alive_seconds:
                connection.transport.close()

    @property
    def answering(self) -> bool:
        """The rest of a request comes in whose answer has begun already."""
        return self.cycle is not None and self.cycle.response_started
