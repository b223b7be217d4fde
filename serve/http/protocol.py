"""The HTTP protocol of the service: uvicorn's, with limits, timeouts and a short path for /predict.

Limits: the size of heads, the number of connections, and the time that a client takes to send a
request, to read a response, or to begin its next request. Requests that a client pipelines are
answered in order, one at a time.

Written for uvicorn 0.54 and httptools 0.9, and the only module that uses their internals. uvicorn
has no public interface for any of it:

- `HttpToolsProtocol` is subclassed, and its parser callbacks (`on_message_begin`,
  `on_headers_complete`, `on_body`, `on_message_complete`) are extended: limits must apply while the
  parser runs.
- `_start_asgi_task` is overridden. There uvicorn starts to answer a request. The override sends
  POST /predict to the short path, and lets a request wait while the client takes no responses.
- `on_response_complete` is replaced: uvicorn starts and cancels a keep-alive timer for each
  request, which costs as much as to parse it. `HttpProtocol.enforce_timeouts` replaces the timers.
- `pipeline`, a deque of (cycle, app), holds the pipelined requests, the oldest at the right end.
- `url` and `headers` are of the head that is parsed. They are replaced where uvicorn would fail, or
  would take trailers for headers.
- `flow`, a `FlowControl`, stops and resumes reading and knows when writing is paused.
- `cycle`, a `RequestResponseCycle`, is the request that the parser is in, or was in last. The short
  path reads and sets its fields instead of calling its ASGI methods.
- `server_state.default_headers` holds the Date header of the current second.
- `app_state` is the state of the lifespan, where `serve.http.app` puts the `Service`.
"""

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serve.http import http2_upgrade
from serve.http.app import PREDICT_PATHS, STATE_KEY, Service
from serve.http.predict_request import PredictRequest
from serve.http.responses import Problem, Response, encode_response

MAX_HEAD_BYTES = 32 << 10
MAX_HEADERS = 100

# Requests of one connection that wait for the answer before theirs. More are not parsed, since each
# takes 4 KB, and a read holds thousands of them.
MAX_PIPELINED = 16
PIECE_BYTES = 256  # parsed at once where many requests may follow; holds about 16 of them
HEAD_END = b"\r\n\r\n"
MIN_REQUEST_BYTES = len(b"GET / HTTP/1.1\r\n\r\n")

# The first head of a larger read is parsed first: it tells whether the rest is one body, which need
# not be searched for heads.
LARGE_READ_BYTES = 4096

# Of a body that arrives after the response. If it is longer, the connection is aborted.
MAX_DISCARDED_BYTES = 16 << 20

# A connection above the limit may ask for the health of the service, once, so that an overloaded
# service is not restarted. This many such connections are accepted. Those that ask for nothing make
# room for others, see `Service.close_idle_connection` and `Service.close_extra_connection`.
EXTRA_CONNECTIONS = 16
HEALTH_PATHS = ("/health/", "/v2/health/")

# Idle connections stay open for this time after the shutdown begins, for requests on their way.
SHUTDOWN_GRACE_SECONDS = 0.1


class Phase(Enum):
    """Where the parser of a connection is.

    IDLE -> HEAD    when a request begins
    HEAD -> BODY    when its head is complete
    BODY -> IDLE    when its body is complete, also if it has none
    any -> CLOSED   when the client is refused, a response closes the connection, or it is lost

    The phase says nothing about responses. The parser may be in one request while an earlier one is
    answered; that one is `HttpProtocol.current`.
    """

    IDLE = auto()  # between two requests
    HEAD = auto()
    BODY = auto()
    CLOSED = auto()  # input is ignored; the connection closes after the responses that are due


# In Python 3.11 an attribute of an Enum takes six times as long to read as a global name.
IDLE = Phase.IDLE
HEAD = Phase.HEAD
BODY = Phase.BODY
CLOSED = Phase.CLOSED


class HeadBudget:
    """Counts the bytes of a head that is not complete, over all reads that it takes.

    Chunk extensions and trailers count as well. They come between the pieces of a body and after
    it, and the parser calls no method while it reads them.
    """

    __slots__ = ("body_bytes", "has_new_head", "has_progress", "pending_bytes", "read_bytes")

    def __init__(self) -> None:
        self.pending_bytes = 0  # counted so far

        # Of the current read.
        self.read_bytes = 0
        self.body_bytes = 0
        self.has_new_head = False  # a request began
        self.has_progress = False  # a request began or ended, or a piece of a body arrived

    def start_read(self, size: int) -> None:
        """Begin a read of `size` bytes. The parser callbacks then set the attributes."""
        self.read_bytes = size
        self.body_bytes = 0
        self.has_new_head = False
        self.has_progress = False

    def end_read(self, data: bytes | memoryview, is_in_head: bool) -> None:
        """Count the read, after which the parser is in a head or not."""
        if is_in_head and self.has_new_head:
            # Only the end of the read is this head.
            after_last_head = bytes(data).rpartition(b"\r\n\r\n")[2]
            self.pending_bytes = min(self.read_bytes - self.body_bytes, len(after_last_head))
        elif is_in_head or not self.has_progress:
            self.pending_bytes += self.read_bytes
        else:
            self.pending_bytes = 0

    def is_exceeded(self) -> bool:
        """Whether the incomplete head is too large."""
        return self.pending_bytes > MAX_HEAD_BYTES

    def can_exceed(self) -> bool:
        """Whether a head that is complete now may be too large and must be measured."""
        return self.pending_bytes > 0 or self.read_bytes > MAX_HEAD_BYTES


class HttpProtocol(HttpToolsProtocol):
    """The connection of one client.

    Implements `ClientConnection`, `PredictConnection` and `UpgradedConnection`.

    `current` is the request that is answered now. Requests that the client pipelines wait in
    `pipeline`, and the connection is not read meanwhile. What was read and would make too many of
    them waits in `held_data`. No request starts until the client has taken the responses before it.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Create the protocol of one connection. uvicorn calls this."""
        super().__init__(config, server_state, app_state, _loop)
        self.service: Service = app_state[STATE_KEY]

        self.phase = IDLE
        self.head_budget = HeadBudget()
        self.discarded_bytes = 0  # of the body of a request that has its response
        self.held_data = b""  # received, and not parsed from `held_start` on
        self.held_start = 0

        self.current: RequestResponseCycle | None = None
        self.predict_request: PredictRequest | None = None  # the current one, on the short path
        self.disconnect_callback: Callable[[], object] | None = None
        self.final_problem: Problem | None = None  # to be sent after the responses that are due

        # Times of the event loop [s]: when the service began to wait for the client, and since when
        # the client has not taken a response, or 0 if it has taken all.
        self.waiting_since = 0.0
        self.unsent_since = 0.0

        self.counted_bytes = 0  # of responses, as `Service` counts them

    # Implementation of asyncio.Protocol.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and refuse it if there are too many."""
        super().connection_made(transport)
        self.waiting_since = self.loop.time()
        self.service.connections.add(self)

        excess = len(self.service.connections) - self.service.settings.max_connections
        if excess > 0 and self.service.close_idle_connection():
            excess -= 1
        self.is_above_limit = excess > 0
        if excess > EXTRA_CONNECTIONS and not self.service.close_extra_connection():
            self._refuse_connection()
        elif self.is_above_limit:
            self.service.extra_connections[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the request that is answered now."""
        self.service.remove_connection(self)
        self.phase = CLOSED
        self.held_data = b""
        self._count_unsent_bytes(0)
        super().connection_lost(exc)
        if self.current is not None and not self.current.response_complete:
            # uvicorn marks the last request that was parsed, which may be a later one.
            self.current.disconnected = True
            self.current.message_event.set()
        if self.predict_request is not None:
            self.predict_request.on_disconnect()
        if self.disconnect_callback is not None:
            self.disconnect_callback()

    def pause_writing(self) -> None:
        """Count the bytes of a response that the client does not take at once.

        The event loop calls this above 64 KiB; fewer bytes are not counted.
        """
        super().pause_writing()
        self._count_unsent_bytes(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Continue after the client has taken the responses that were sent."""
        super().resume_writing()
        self._count_unsent_bytes(0)
        self._continue()

    def _count_unsent_bytes(self, size: int) -> None:
        if size != self.counted_bytes:
            self.service.predict_endpoint.count_unsent_bytes(size - self.counted_bytes)
            self.counted_bytes = size

    def data_received(self, data: bytes) -> None:
        """Parse the received bytes, but not more than MAX_PIPELINED requests in advance."""
        if self.phase is CLOSED:
            return
        if self.held_data:  # reading was resumed for the body of the current request
            self.held_data = self.held_data[self.held_start :] + data
            self.held_start = 0
            self.flow.pause_reading()
            return

        rest: bytes | memoryview = data
        if len(data) > LARGE_READ_BYTES and self.phase is IDLE:
            head_size = data.find(HEAD_END) + len(HEAD_END)
            self._parse(data[:head_size])
            rest = memoryview(data)[head_size:]
        if self._may_hold_many_requests(rest):
            self.held_data = bytes(rest)
            self.held_start = 0
            self._parse_held_data()
        else:
            self._parse(rest)

    def _may_hold_many_requests(self, data: bytes | memoryview) -> bool:
        """Whether received bytes may complete more heads than can wait."""
        if len(data) <= MAX_PIPELINED * MIN_REQUEST_BYTES:
            return False
        request = self.predict_request
        if request is not None and self._is_in_current_body():
            body_size = len(self.cycle.body) + len(data)
            if body_size <= request.content_length:
                return False  # all of it belongs to one body
        return bytes(data).count(HEAD_END) > MAX_PIPELINED

    def _parse_held_data(self) -> None:
        """Parse the bytes that wait, in small pieces, until too many requests wait."""
        data = self.held_data
        start = self.held_start
        self.held_data = b""
        while start < len(data) and self.phase is not CLOSED:
            if len(self.pipeline) >= MAX_PIPELINED:
                self.held_data = data
                self.held_start = start
                return

            self._parse(data[start : start + PIECE_BYTES])
            start += PIECE_BYTES

        if not self.pipeline and not self.transport.is_closing():
            self.flow.resume_reading()

    def _parse(self, data: bytes | memoryview) -> None:
        """Parse bytes within the limits of heads."""
        if self.phase is CLOSED:
            return
        budget = self.head_budget
        budget.start_read(len(data))
        self._feed_parser(data)
        if self.phase is CLOSED:
            return

        budget.end_read(data, self.phase is HEAD)
        if budget.is_exceeded():
            self._refuse_head()
            return

        request = self.predict_request
        if request is not None and budget.has_progress and self._is_in_current_body():
            request.on_body_grown(len(self.cycle.body))

    def shutdown(self) -> None:
        """End the connection after a moment.

        To close at once would reset the connection of a client that is sending a request.
        """
        self.loop.call_later(SHUTDOWN_GRACE_SECONDS, super().shutdown)

    # Parsing. The parser calls the methods `on_…`, in this order.

    def _feed_parser(self, data: bytes | memoryview) -> None:
        """Parse the received bytes, and refuse the client if they are not valid HTTP."""
        try:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                rest = memoryview(data)[upgrade.args[0] :]
                http2_upgrade.replay_without_upgrade(self, rest)
        except http2_upgrade.TunnelRequested:
            self.refuse(Problem(400, "CONNECT is not supported", "malformed"))
        except httptools.HttpParserError:
            self.refuse(Problem(400, "the request is not valid HTTP", "malformed"))

    def restart_parser(self) -> None:
        """Replace the parser, with the leniency that uvicorn gives it."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def is_closed(self) -> bool:
        """Implement `UpgradedConnection`: whether input is ignored."""
        return self.phase is CLOSED

    def on_message_begin(self) -> None:
        """Start the head of a request."""
        if self.phase is CLOSED:
            return
        super().on_message_begin()
        self.scope["state"]["connection"] = self
        if self.current is None:
            self.waiting_since = self.loop.time()
        self.phase = HEAD
        self.head_budget.has_new_head = True
        self.head_budget.has_progress = True

    def on_headers_complete(self) -> None:
        """Start the body of a request, and answer the request or let it wait."""
        if self.phase is CLOSED or self.parser.should_upgrade():
            return
        if self._is_head_too_large():
            self._refuse_head()
            return
        if not self.url.startswith(b"/"):
            self._use_origin_form()
        self.phase = BODY
        try:
            super().on_headers_complete()
        except Exception:
            self.phase = HEAD  # the path is not valid; the caller refuses the client
            raise
        self.headers = []  # those that follow are trailers, which are ignored

    def _use_origin_form(self) -> None:
        """Reduce a target in absolute form, `http://host/path`, to its path and query.

        Raises httptools.HttpParserInvalidURLError.
        """
        url = httptools.parse_url(self.url)
        if url.host is None:
            return
        self.url = url.path or b"/"
        if url.query is not None:
            self.url += b"?" + url.query

    def _is_head_too_large(self) -> bool:
        """Whether the head that is complete now exceeds a limit."""
        if len(self.headers) > MAX_HEADERS:
            return True
        if not self.head_budget.can_exceed():
            return False
        size = len(self.url)
        for name, value in self.headers:
            size += len(name) + len(value)
        return size > MAX_HEAD_BYTES

    def on_body(self, body: bytes) -> None:
        """Add a piece of a body to its request, or discard it if there is a response already."""
        if self.phase is CLOSED:
            return
        self.head_budget.has_progress = True
        self.head_budget.body_bytes += len(body)

        if self.predict_request is not None and self._is_in_current_body():
            self.cycle.body += body
        elif self.cycle.response_complete:
            self.discarded_bytes += len(body)
            if self.discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body of a request."""
        if self.phase is CLOSED or self.parser.should_upgrade():
            return
        super().on_message_complete()
        is_current = self._is_in_current_body()
        self.phase = IDLE
        self.head_budget.has_progress = True
        self.discarded_bytes = 0
        if self.predict_request is not None and is_current:
            self.predict_request.on_body_complete()

    def _is_in_current_body(self) -> bool:
        """Whether the parser is in the body of the request that is answered now."""
        return self.phase is BODY and self.current is self.cycle

    # Requests and responses.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Start to answer a request, or let it wait in the pipeline."""
        path = cycle.scope["path"]
        if self.is_above_limit:
            if not path.startswith(HEALTH_PATHS):
                self._refuse_connection()
                return
            cycle.keep_alive = False
        if self.current is not None or self.flow.write_paused:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, app))
            return

        self.current = cycle
        if path not in PREDICT_PATHS or cycle.scope["method"] != "POST":
            super()._start_asgi_task(cycle, app)
            return
        request = PredictRequest(self.service, self, cycle.scope)
        self.predict_request = request
        if cycle.more_body:
            request.start()
        else:
            # Not at once, because a long pipeline would become a deep recursion.
            self.loop.call_soon(self._start_predict_request, request)

    def _start_predict_request(self, request: PredictRequest) -> None:
        if self.predict_request is request:  # else the client has left
            request.start()

    def end_predict_request(self) -> None:
        """Implement `PredictConnection`: forget the current request."""
        self.predict_request = None

    def is_body_complete(self) -> bool:
        """Implement `PredictConnection`: whether the current body has arrived."""
        return self.current is not None and not self.current.more_body

    def is_body_withheld(self) -> bool:
        """Implement both interfaces: whether the client waits for 100 Continue with its body.

        After an error such a client may send the body or not, so what follows can't be parsed.
        """
        cycle = self.current
        return cycle is not None and cycle.waiting_for_100_continue and cycle.more_body

    def send_continue(self) -> None:
        """Implement `PredictConnection`: send 100 Continue."""
        if self.current is not None:
            self.current.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def take_body(self) -> bytes:
        """Implement `PredictConnection`: return the bytes that have arrived, and free them."""
        if self.current is None:
            return b""
        body = bytes(self.current.body)
        self.current.body.clear()
        return body

    def send_response(self, response: Response, request_id: str, close: bool) -> None:
        """Implement `PredictConnection`: write the response, and close the connection if needed."""
        cycle = self.current
        if cycle is None:
            return
        cycle.response_started = True
        cycle.response_complete = True
        if cycle.disconnected or self.transport.is_closing():
            return

        close = close or not cycle.keep_alive
        server_headers = self.server_state.default_headers
        self.transport.write(encode_response(response, request_id, server_headers, close))
        if close:
            self.phase = CLOSED
            self.transport.close()
        cycle.on_response()

    def set_disconnect_callback(self, callback: Callable[[], object] | None) -> None:
        """Implement `ClientConnection`: call this if the client disconnects."""
        self.disconnect_callback = callback

    def on_response_complete(self) -> None:
        """Continue after a response as uvicorn does, but without a timer for an idle client."""
        self.server_state.total_requests += 1
        self.current = None
        self.waiting_since = self.loop.time()
        self._continue()

    def _continue(self) -> None:
        """Start the next request of the pipeline, or read more, or send the final problem."""
        if self.current is not None or self.flow.write_paused or self.transport.is_closing():
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self.final_problem is not None:
            self._send_final_problem(self.final_problem)
        if self.pipeline:
            return
        if self.held_data:
            # Not at once, because a callback of the parser may be running.
            self.loop.call_soon(self._parse_held_data)
        else:
            self.flow.resume_reading()

    # Refusals.

    def _refuse_connection(self) -> None:
        self.refuse(Problem(503, "too many connections; try again in a second", "connections"))

    def _refuse_head(self) -> None:
        detail = f"a request may have {MAX_HEADERS} headers of {MAX_HEAD_BYTES} bytes in all"
        self.refuse(Problem(431, detail, "head"))

    def refuse(self, problem: Problem) -> None:
        """Ignore further input, send the responses that are due, then the problem, and close."""
        if self.phase is CLOSED or self.transport.is_closing():
            return
        is_in_current_body = self._is_in_current_body()
        is_in_answered_body = self.phase is BODY and self.cycle.response_started
        if self.phase is BODY and self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()  # its body can't be parsed, so the problem is its answer
        self.phase = CLOSED
        problem.close = True

        if is_in_current_body and self.predict_request is not None:
            self.predict_request.fail(problem)
        elif is_in_answered_body:
            self.transport.abort()
        elif is_in_current_body or (self.current is None and not self.pipeline):
            self._send_final_problem(problem)
        else:
            self.final_problem = problem
            self._continue()

    def _send_final_problem(self, problem: Problem) -> None:
        """Send a problem that answers no request, and close the connection."""
        request_id = self.service.new_request_id()
        response = self.service.reject(problem, request_id)
        server_headers = self.server_state.default_headers
        self.transport.write(encode_response(response, request_id, server_headers, close=True))
        self.transport.close()
        self.service.count_request(response.status, 0.0)

    # Timeouts, and room for other connections.

    def idle_since(self) -> float | None:
        """Implement `ClientConnection`: since when the connection may make room for another.

        A connection above the limit may make room also if it is in a request.
        """
        if self.current is not None or self.pipeline or self.held_data:
            return None
        if self.phase is CLOSED or self.transport.get_write_buffer_size():
            return None
        is_idle = self.phase is IDLE or self.is_above_limit
        return self.waiting_since if is_idle else None

    def close_idle(self) -> None:
        """Implement `ClientConnection`: close the connection to make room for another."""
        if self.is_above_limit:
            self._refuse_connection()
            return
        self.phase = CLOSED
        self.transport.close()

    def enforce_timeouts(self, now: float) -> None:
        """Implement `ClientConnection`: close a connection whose client is too slow.

        A client has `deadline_ms` plus `read_timeout_seconds` to take a response,
        `read_timeout_seconds` to send a request, and `keep_alive_seconds` to begin the next one.
        """
        settings = self.service.settings
        if self.transport.get_write_buffer_size():
            self.unsent_since = self.unsent_since or now
            timeout_seconds = settings.deadline_ms / 1000 + settings.read_timeout_seconds
            if now - self.unsent_since > timeout_seconds:
                self.transport.abort()
            return
        self.unsent_since = 0.0

        if self.current is not None and not self._is_in_current_body():
            return  # the client waits for the service
        is_in_request = self.phase is HEAD or self.phase is BODY
        is_first_request = self.cycle is None
        if is_in_request or is_first_request:
            timeout_seconds = settings.read_timeout_seconds
        else:
            timeout_seconds = settings.keep_alive_seconds
        if now - self.waiting_since > timeout_seconds:
            if is_in_request:
                self.refuse(Problem(408, "the request did not arrive in time", "slow"))
            self.transport.close()
