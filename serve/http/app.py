"""The door: a pure ASGI middleware that answers every request before LitServe's own routes could.

LitServe's app behind it only sees the lifespan events, so none of its endpoints is reachable. POST /predict takes a
shorter way, `serve.http.predict_request`, and shares what is here. Where to hook in: `Front.routes` maps (method, path) to an async
handler from Request to Response, `Front.prefixes` a beginning of paths; `Front.finish` sees every request that ended.
Paths in `PROTECTED` ask for the API key when one is set.
"""

import asyncio
import hmac
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from itertools import count
from typing import Any

from serve import logs
from serve.http import openapi
from serve.http.dispatcher import Pool
from serve.http.feedback import FeedbackEndpoint
from serve.http.open_inference import OpenInference
from serve.http.page import Page
from serve.http.predict_endpoint import Predictor
from serve.http.predict_request import withheld
from serve.http.protocol import Connection
from serve.http.responses import Header, Problem, Request, Response, as_json
from serve.http.tracing import Tracing
from serve.metrics.shared_counters import SharedCounters
from serve.settings import Settings
from serve.shared_state import SharedState

Handler = Callable[[Request], Awaitable[Response]]
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
PROTECTED, PROBES = ("/predict", "/v2", "/feedback"), "/v2/health/"
SECURITY: list[Header] = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
CODES = (200, 400, 401, 408, 413, 415, 422, 429, 500, 503, 504)
INFER = "/v2/models/"
SWEEP_SECONDS = 0.5
LOGS_A_SECOND = (
    20  # lines on requests; under a flood of failures a log must not become the next problem
)


def _status_head(status: int) -> bytes:
    security = b"".join(b"%b: %b\r\n" % header for header in SECURITY)
    return b"HTTP/1.1 %d %b\r\n%b" % (status, HTTPStatus(status).phrase.encode(), security)


HEADS = {status.value: _status_head(status.value) for status in HTTPStatus}


class Front:
    """One for each HTTP process; what needs the event loop is made when the lifespan starts."""

    def __init__(self, app: Any, settings: Settings, run: str):
        self.app, self.settings, self.run = app, settings, run
        self.key = settings.key()
        self.ids, self.id_start = count(), os.urandom(6).hex()
        self.log_second, self.logged = 0, 0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self.answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            self.start(scope["app"].response_queue_id)
            await self.app(scope, receive, send)
            self.sweeper.cancel()
            self.pool.close()
            if self.tracing:
                self.tracing.close()

    def start(self, number: int) -> None:
        """Make what this HTTP process needs. The supervisor alone decides when it ends."""
        logs.configure(self.settings)
        self.number, self.state, self.parent = number, SharedState(self.run), os.getppid()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        uvicorn_ends = signal.getsignal(signal.SIGTERM)
        signal.signal(
            signal.SIGTERM,
            lambda *args: (
                uvicorn_ends(*args) if callable(uvicorn_ends) and self.state.stopping else None
            ),
        )
        self.counters = SharedCounters(f"{self.run}/api-{number}.metrics")
        self.codes = {code: self.counters.slot("requests", str(code)) for code in CODES}
        self.pool = Pool(self.run, self.settings.workers, self.counters)
        feedback = FeedbackEndpoint(self.run, self.counters, self.pool)
        self.predictor = Predictor(
            self.settings, self.pool, self.state, self.counters, number, feedback
        )
        page, v2 = Page(self.settings, self.pool), OpenInference(self.predictor, self.pool)
        self.tracing = Tracing() if self.settings.tracing else None
        self.routes: dict[tuple[str, str], Handler] = {
            ("GET", "/model"): self.model,
            ("GET", "/health/live"): self.live,
            ("GET", "/health/ready"): self.ready,
            ("GET", "/docs"): openapi.page,
            ("GET", "/openapi.json"): openapi.openapi,
            ("POST", "/feedback"): feedback,
            ("GET", "/"): page.index,
            ("GET", "/report"): page.report,
            ("GET", "/v2"): v2,
        }
        self.prefixes: dict[str, Handler] = {
            "/page/": page.own,
            "/samples/": page.sample,
            "/v2/": v2,
        }
        self.methods = {"/predict": ["POST"]}
        for method, path in self.routes:
            self.methods.setdefault(path, []).append(method)
        Connection.front = self
        self.sweeper = asyncio.get_running_loop().create_task(self.sweep())

    async def sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            if os.getppid() != self.parent:
                os._exit(1)  # the supervisor was killed
            Connection.sweep()

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        """Every request but POST /predict."""
        started, path = time.perf_counter(), scope["path"]
        request = self.request(scope, receive)
        try:
            response = await self.handler(scope["method"], path, request.headers)(request)
        except Problem as problem:
            response = self.refused(problem, request.id)
        except ConnectionError:
            response = None  # nobody is there to be answered
        except Exception:
            logs.logger.exception(
                "a request failed", extra={"fields": {"request_id": request.id, "path": path}}
            )
            response = Problem(500, "the service failed on this request", close=True).response(
                request.id
            )
        if response is not None:
            await self.send(response, request, send)
        self.finish(request, response, time.perf_counter() - started)

    def request(self, scope: dict, receive: Any) -> Request:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id")
        number = (
            given.decode() if given is not None and REQUEST_ID.fullmatch(given) else self.new_id()
        )
        return Request(scope, receive, headers, number)

    def new_id(self) -> str:
        return f"{self.id_start}{next(self.ids):08x}"

    def handler(self, method: str, path: str, headers: dict[bytes, bytes]) -> Handler:
        """Raises Problem 401, 404 or 405."""
        if path.startswith(PROTECTED) and not path.startswith(PROBES):
            self.authorize(headers)
        found = self.routes.get(("GET" if method == "HEAD" else method, path))
        if found is None:
            found = next(
                (h for prefix, h in self.prefixes.items() if path.startswith(prefix)), None
            )
        if found is None:
            if path in self.methods:
                raise Problem(
                    405,
                    f"{path} takes {' and '.join(self.methods[path])}, not {method}",
                    allow=", ".join(self.methods[path]),
                )
            raise Problem(404, "there is nothing here; see /docs")
        return found

    def authorize(self, headers: dict[bytes, bytes]) -> None:
        """Compare the key in constant time. Raises Problem 401."""
        if self.key is not None:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            given = headers.get(b"x-api-key") or (
                token.strip() if scheme.lower() == b"bearer" else b""
            )
            if not hmac.compare_digest(given, self.key):
                raise Problem(
                    401, "send the API key as X-API-Key, or as Authorization: Bearer", "key"
                )

    def refused(self, problem: Problem, request_id: str) -> Response:
        if problem.reason:
            self.counters.add("rejected", problem.reason)
        return problem.response(request_id)

    def head(self, response: Response, request_id: str, close: bool) -> bytes:
        """The bytes of a response up to its body."""
        parts = [HEADS[response.status]]
        for header in (*Connection.uvicorn.default_headers, *response.headers):
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
        return b"".join(parts)

    async def send(self, response: Response, request: Request, send: Any) -> None:
        headers = [
            (b"content-type", response.content_type),
            (b"content-length", b"%d" % len(response.body)),
            (b"x-request-id", request.id.encode()),
            *SECURITY,
            *response.headers,
        ]
        if (
            response.close
            or self.state.draining
            or withheld(request.scope["state"]["connection"].current)
        ):
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    def finish(self, request: Request, response: Response | None, seconds: float) -> None:
        """Count, trace and log a request that ended; without a response the client left before."""
        path, status = request.scope["path"], response.status if response else 499
        asked = request.scope["method"] == "POST" and (path == "/predict" or path.startswith(INFER))
        if response is not None and asked:
            self.count(status, seconds)
        if self.tracing:
            self.tracing.record(request, response, seconds)
        if self.settings.access_log or (status in (500, 503, 504) and "/health/" not in path):
            self.log(request, status, seconds)

    def count(self, status: int, seconds: float) -> None:
        slot = self.codes.get(status)
        if slot is None:
            slot = self.counters.slot("requests", str(status))
        self.counters.values[slot] += 1
        self.counters.observe("request_duration_seconds", seconds)

    def log(self, request: Request, status: int, seconds: float) -> None:
        second = int(time.monotonic())
        if second != self.log_second:
            if self.logged > LOGS_A_SECOND and not self.settings.access_log:
                logs.logger.warning("%d more requests failed", self.logged - LOGS_A_SECOND)
            self.log_second, self.logged = second, 0
        self.logged += 1
        if self.logged <= LOGS_A_SECOND or self.settings.access_log:
            fields = {
                "request_id": request.id,
                "method": request.scope["method"],
                "path": request.scope["path"],
                "status": status,
                "ms": round(1000 * seconds, 3),
            }
            logs.logger.log(30 if status >= 500 else 20, "request", extra={"fields": fields})

    async def live(self, request: Request) -> Response:
        return as_json({"status": "live"})

    async def ready(self, request: Request) -> Response:
        if self.state.draining:
            raise Problem(503, "the service is shutting down")
        if not self.pool.ready:
            raise Problem(503, f"{len(self.pool.usable)} of {self.pool.size} workers are ready")
        return as_json({"status": "ready"})

    async def model(self, request: Request) -> Response:
        if not self.pool.model:
            raise Problem(503, "no model is ready yet; try again in a second")
        return as_json(self.pool.model)
