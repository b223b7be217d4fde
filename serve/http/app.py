"""The ASGI app of an HTTP process, and the service behind it.

`ServiceApp` wraps LitServe's app, which sees only the lifespan events, so none of LitServe's
endpoints can be reached. When the lifespan starts, `ServiceApp` creates a `Service` and puts it
into the lifespan's state. From there `serve.http.protocol` gets it for each connection.

To add an endpoint, add its handler to `Service.routes`, which maps (method, path) to an async
function from Request to Response, or to `Service.prefixes` for all paths with a common start.
POST /predict is not a route: see `serve.http.predict_request`. `Service.record` sees every request
that ends. If an API key is set, all paths require it but those in `PUBLIC_PATHS` and
`PUBLIC_PREFIXES`.
"""

import asyncio
import hmac
import logging
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, MutableMapping
from itertools import count
from operator import itemgetter
from types import FrameType
from typing import Any

from starlette.types import ASGIApp

from serve import logs
from serve.http import openapi
from serve.http.cross_site import CrossSitePolicy
from serve.http.dispatcher import Dispatcher
from serve.http.feedback import FeedbackEndpoint
from serve.http.kept_endpoint import KeptEndpoint
from serve.http.label_endpoint import LabelEndpoint
from serve.http.open_inference import OpenInference
from serve.http.page import Page
from serve.http.predict_endpoint import PredictEndpoint
from serve.http.responses import (
    CLIENT_CLOSED_REQUEST,
    SECURITY_HEADERS,
    ClientConnection,
    Header,
    OpenFile,
    Problem,
    Receive,
    Request,
    Response,
    Scope,
    Send,
    json_response,
)
from serve.http.tracing import Tracing
from serve.metrics.shared_counters import SharedCounters
from serve.settings import Settings
from serve.shared_state import SharedState

Handler = Callable[[Request], Awaitable[Response]]

STATE_KEY = "service"  # of the Service in the lifespan's state

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
PREDICT_PATHS = frozenset(("/predict", "/predict/"))
PUBLIC_PATHS = frozenset(("/", "/docs", "/label", "/openapi.json"))
PUBLIC_PREFIXES = ("/page/", "/label/page/", "/health/", "/v2/health/")
INFER_PATHS = "/v2/models/"

# Their counters exist from the start; those of other codes are created when they occur.
EXPECTED_CODES = (200, 400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504)

TIMEOUT_CHECK_SECONDS = 0.5
MIN_IDLE_SECONDS = 1.0  # before a connection makes room; less is a pause between two requests
FILE_CHUNK_BYTES = 64 << 10  # as much as uvicorn buffers before it waits for the client
MAX_LOG_LINES_PER_SECOND = 20  # of failed requests, so that a flood of them can't fill the disk


class ServiceApp:
    """The app of an HTTP process, around LitServe's app."""

    def __init__(
        self, app: ASGIApp, settings: Settings, run_directory: str, process_number: int
    ) -> None:
        """Wrap `app`. The service uses the files in `run_directory`."""
        self.app = app
        self.settings = settings
        self.run_directory = run_directory
        self.process_number = process_number

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Run the lifespan, or answer a request."""
        if scope["type"] == "lifespan":
            await self._run_lifespan(scope, receive, send)
        elif scope["type"] == "http":
            await scope["state"][STATE_KEY].handle(scope, receive, send)

    async def _run_lifespan(
        self, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        """Create the service, and close it when the lifespan ends."""
        service = Service(self.settings, self.run_directory, self.process_number)
        scope["state"][STATE_KEY] = service
        await service.dispatcher.wait_for_running_workers()
        await self.app(scope, receive, send)
        service.close()


class Service:
    """Everything that one HTTP process needs to answer requests. Created on its event loop."""

    def __init__(self, settings: Settings, run_directory: str, process_number: int) -> None:
        """Connect to the workers, whose sockets are in `run_directory`."""
        logs.configure(settings)
        self.settings = settings
        self.api_key = settings.load_api_key()
        self.state = SharedState(run_directory)
        self.cross_site = CrossSitePolicy(settings.allowed_origins())
        self.connections: set[ClientConnection] = set()  # the open ones; each adds itself
        # Of those, the ones above the limit, the oldest first; each adds itself.
        self.extra_connections: dict[ClientConnection, None] = {}
        # Those that may make room for others, the longest idle last, with the time since then.
        self._idle_connections: list[tuple[float, ClientConnection]] = []
        self._request_ids = count()
        self._request_id_prefix = os.urandom(6).hex()

        self.counters = SharedCounters(f"{run_directory}/api-{process_number}.metrics")
        self._code_slots: dict[int, int] = {}
        for code in EXPECTED_CODES:
            self._code_slots[code] = self.counters.slot("requests", str(code))
        self.tracing = Tracing() if settings.tracing else None
        self._request_log = RequestLog(settings.access_log)

        self.dispatcher = Dispatcher(run_directory, settings.workers, self.state, self.counters)
        feedback = FeedbackEndpoint(
            run_directory, self.counters, self.dispatcher, bool(settings.keep)
        )
        self.predict_endpoint = PredictEndpoint(
            settings, self.dispatcher, self.state, self.counters, process_number, feedback
        )
        open_inference = OpenInference(self.predict_endpoint, self.dispatcher)
        page = Page(settings, self.dispatcher)
        label = LabelEndpoint(settings, self.dispatcher, feedback)

        self.routes: dict[tuple[str, str], Handler] = {
            ("GET", "/model"): self.describe_model,
            ("GET", "/health/live"): self.report_live,
            ("GET", "/health/ready"): self.report_ready,
            ("GET", "/docs"): openapi.docs,
            ("GET", "/openapi.json"): openapi.openapi,
            ("POST", "/feedback"): feedback,
            ("GET", "/"): page.index,
            ("GET", "/report"): page.report,
            ("GET", "/label"): label,
            ("GET", "/v2"): open_inference,
        }
        self.prefixes: dict[str, Handler] = {
            "/label/": label,
            "/kept/": KeptEndpoint(settings, self.dispatcher),
            "/page/": page.file,
            "/samples/": page.sample,
            "/v2/": open_inference,
        }
        self.allowed_methods: dict[str, list[str]] = {"/predict": ["POST"]}
        for method, path in self.routes:
            self.allowed_methods.setdefault(path, []).append(method)

        _leave_signals_to_the_supervisor(self.state)
        self._supervisor_pid = os.getppid()
        self._watch_task = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Close connections of clients that are too slow. Exit if the supervisor is gone."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(TIMEOUT_CHECK_SECONDS)
            if os.getppid() != self._supervisor_pid:
                os._exit(1)  # the supervisor was killed
            now = loop.time()
            for connection in list(self.connections):
                connection.enforce_timeouts(now)
            self._idle_connections = self._list_idle_connections(now - MIN_IDLE_SECONDS)

    def _list_idle_connections(self, latest: float) -> list[tuple[float, ClientConnection]]:
        """Return the connections that are idle since `latest` or longer, if there may be too many.

        The list is made here, not for each new connection, since a flood of them may arrive.
        """
        if len(self.connections) < self.settings.max_connections:
            return []
        idle: list[tuple[float, ClientConnection]] = []
        for connection in self.connections:
            since = connection.idle_since()
            if since is not None and since <= latest:
                idle.append((since, connection))
        idle.sort(key=itemgetter(0), reverse=True)
        return idle

    def close_idle_connection(self) -> bool:
        """Close the connection that is idle for longest. Return whether there was one."""
        while self._idle_connections:
            since, connection = self._idle_connections.pop()
            if connection in self.connections and connection.idle_since() == since:
                self.remove_connection(connection)
                connection.close_idle()
                return True
        return False

    def close_extra_connection(self) -> bool:
        """Close the oldest connection above the limit that is in no request, however new it is.

        So clients that open connections all the time do not keep a probe out. Return whether there
        was one.
        """
        for connection in self.extra_connections:
            if connection.idle_since() is not None:
                self.remove_connection(connection)
                connection.close_idle()
                return True
        return False

    def remove_connection(self, connection: ClientConnection) -> None:
        """Forget a connection that is closed or lost."""
        self.connections.discard(connection)
        self.extra_connections.pop(connection, None)

    def close(self) -> None:
        """Stop the timeout checks, disconnect from the workers, and send the buffered traces."""
        self._watch_task.cancel()
        self.dispatcher.close()
        if self.tracing:
            self.tracing.close()

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that came through ASGI: every one except POST /predict."""
        started = time.perf_counter()
        request = self.build_request(scope, receive)
        response: Response | None
        try:
            response = await self._answer(request)
        except Problem as problem:
            response = self.reject(problem, request.id)
        except ConnectionError:
            response = None  # the client left
        except Exception:
            fields = {"request_id": request.id, "path": scope["path"]}
            logs.logger.exception("a request failed", extra={"fields": fields})
            failure = Problem(500, "the service failed on this request", close=True)
            response = failure.response(request.id)

        if response is not None:
            if self.cross_site.has_origins:
                self.cross_site.add_headers(request.headers, response)
            await self._send(response, request, send)
        self.record(request, response, time.perf_counter() - started)

    async def _answer(self, request: Request) -> Response:
        """Check a request and run its handler. Raises Problem, and ConnectionError."""
        method = request.scope["method"]
        path = request.scope["path"].rstrip("/") or "/"
        is_public = path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES)
        preflight = self.cross_site.answer_preflight(method, request.headers)
        self.check_access(request, is_public or preflight is not None)
        if preflight is not None:
            return preflight
        handler = self.find_handler(method, path)
        return await handler(request)

    def build_request(self, scope: Scope, receive: Receive) -> Request:
        """Build the request of an ASGI scope. Its id is that of the client, if it is harmless."""
        headers = dict(scope["headers"])
        client_id = headers.get(b"x-request-id")
        if client_id is not None and REQUEST_ID.fullmatch(client_id):
            request_id = client_id.decode()
        else:
            request_id = self.new_request_id()
        return Request(scope, receive, headers, request_id)

    def new_request_id(self) -> str:
        """Return an id that no other request has."""
        return f"{self._request_id_prefix}{next(self._request_ids):08x}"

    def find_handler(self, method: str, path: str) -> Handler:
        """Return the handler of a path without a slash at its end. Raises Problem 404 or 405."""
        route_method = "GET" if method == "HEAD" else method
        handler = self.routes.get((route_method, path))
        if handler is not None:
            return handler
        for prefix, prefix_handler in self.prefixes.items():
            if path.startswith(prefix):
                return prefix_handler

        if path in self.allowed_methods:
            methods = self.allowed_methods[path]
            detail = f"{path} allows {' and '.join(methods)}, not {method}"
            raise Problem(405, detail, allow=", ".join(methods))
        raise Problem(404, "this path does not exist; see /docs")

    def check_access(self, request: Request, is_public: bool = False) -> None:
        """Check who sends a request. Raises Problem 400, 401 or 403.

        is_public: whether the request needs no API key.
        """
        headers = request.headers
        received_headers = request.scope["headers"]
        if len(headers) != len(received_headers):
            check_single_host(received_headers)
        self.cross_site.check(request.scope["method"], headers)
        if self.api_key is not None and not is_public:
            self._check_api_key(headers, self.api_key)

    def _check_api_key(self, headers: dict[bytes, bytes], api_key: bytes) -> None:
        """Compare the key of a request in constant time. Raises Problem 401."""
        key = headers.get(b"x-api-key")
        if not key:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            key = token.strip() if scheme.lower() == b"bearer" else b""
        if not hmac.compare_digest(key, api_key):
            raise Problem(401, "send the API key as X-API-Key or as Authorization: Bearer", "key")

    def reject(self, problem: Problem, request_id: str) -> Response:
        """Count a problem, if it has a reason to count, and return it as a response."""
        if problem.reason:
            self.counters.add("rejected", problem.reason)
        return problem.response(request_id)

    async def _send(self, response: Response, request: Request, send: Send) -> None:
        """Send a response through ASGI."""
        size = len(response.body) if response.file is None else response.file.size
        headers = [
            (b"content-type", response.content_type),
            (b"content-length", b"%d" % size),
            (b"x-request-id", request.id.encode()),
            *SECURITY_HEADERS,
            *response.headers,
        ]
        if response.close or self.state.draining or request.connection.is_body_withheld():
            headers.append((b"connection", b"close"))
        start = {"type": "http.response.start", "status": response.status, "headers": headers}
        if response.file is None:
            await send(start)
            await send({"type": "http.response.body", "body": response.body})
            return

        with response.file.stream:
            await send(start)
            if request.scope["method"] == "HEAD":
                await send({"type": "http.response.body"})
            else:
                await self._send_file(response.file, send)

    async def _send_file(self, file: OpenFile, send: Send) -> None:
        """Send a file in pieces, each after the client has taken most of those before.

        If the file can't be read to its end, uvicorn closes the connection.
        """
        remaining = file.size
        while True:
            # In a thread: a store on a network disk may block, and the event loop must not.
            read = asyncio.to_thread(file.stream.read, min(remaining, FILE_CHUNK_BYTES))
            try:
                piece = await asyncio.wait_for(read, self.settings.deadline_ms / 1000)
            except (TimeoutError, OSError):
                return
            remaining -= len(piece)
            if remaining and not piece:
                return
            more_body = remaining > 0
            await send({"type": "http.response.body", "body": piece, "more_body": more_body})
            if not more_body:
                return

    def record(self, request: Request, response: Response | None, seconds: float) -> None:
        """Count, trace and log a request that has ended, without a response if the client left."""
        method = request.scope["method"]
        path = request.scope["path"]
        status = response.status if response is not None else CLIENT_CLOSED_REQUEST

        is_infer = path in PREDICT_PATHS or path.startswith(INFER_PATHS)
        is_prediction = method == "POST" and is_infer
        if is_prediction and response is not None:
            self.count_request(status, seconds)
        if self.tracing:
            self.tracing.record(request, response, seconds)
        is_failure = status in (500, 503, 504) and "/health/" not in path
        if is_failure or self.settings.access_log:
            self._request_log.write(request, status, seconds)

    def count_request(self, status: int, seconds: float) -> None:
        """Count a request for predictions by its status, and the seconds that it took."""
        slot = self._code_slots.get(status)
        if slot is None:
            slot = self.counters.slot("requests", str(status))
        self.counters.values[slot] += 1
        self.counters.observe("request_duration_seconds", seconds)

    async def report_live(self, request: Request) -> Response:
        """Handle GET /health/live: 200 while the process runs."""
        return json_response({"status": "live"})

    async def report_ready(self, request: Request) -> Response:
        """Handle GET /health/ready: 200 if all workers are ready. Raises Problem 503."""
        if self.state.draining:
            raise Problem(503, "the service is shutting down")
        if not self.dispatcher.is_ready:
            ready = len(self.dispatcher.ready_workers)
            raise Problem(503, f"{ready} of {self.dispatcher.worker_count} workers are ready")
        return json_response({"status": "ready"})

    async def describe_model(self, request: Request) -> Response:
        """Handle GET /model: the description that a worker sent. Raises Problem 503."""
        if not self.dispatcher.model:
            raise Problem(503, "no model is ready yet; try again in a second")
        return json_response({**self.dispatcher.model, "keeps_images": bool(self.settings.keep)})


def check_single_host(headers: list[Header]) -> None:
    """Raise Problem 400 for several Host headers, of which a proxy may have checked another."""
    names = [name for name, _ in headers]
    if names.count(b"host") > 1:
        raise Problem(
            400, "the request has several Host headers; send one", "malformed", close=True
        )


class RequestLog:
    """Writes a line for a request: for each one with `access_log`, else for a limited number."""

    def __init__(self, access_log: bool) -> None:
        self.access_log = access_log
        self.second = 0  # of time.monotonic(), in which `lines` were counted
        self.lines = 0

    def write(self, request: Request, status: int, seconds: float) -> None:
        """Log a request that took `seconds`, unless too many lines were logged in this second."""
        second = int(time.monotonic())
        if second != self.second:
            omitted = self.lines - MAX_LOG_LINES_PER_SECOND
            if omitted > 0 and not self.access_log:
                logs.logger.warning("%d more requests failed", omitted)
            self.second = second
            self.lines = 0

        self.lines += 1
        if self.lines > MAX_LOG_LINES_PER_SECOND and not self.access_log:
            return
        level = logging.ERROR if status >= 500 else logging.INFO
        fields = {
            "request_id": request.id,
            "method": request.scope["method"],
            "path": request.scope["path"],
            "status": status,
            "ms": round(1000 * seconds, 3),
        }
        logs.logger.log(level, "request", extra={"fields": fields})


def _leave_signals_to_the_supervisor(state: SharedState) -> None:
    """Ignore SIGINT, and SIGTERM until the supervisor stops all processes.

    Signals may reach the whole process group, but only the supervisor decides when a process ends.
    """
    uvicorn_handler = signal.getsignal(signal.SIGTERM)

    def handle_sigterm(number: int, frame: FrameType | None) -> None:
        if state.stopping and callable(uvicorn_handler):
            uvicorn_handler(number, frame)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, handle_sigterm)
