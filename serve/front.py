"""The door: a pure ASGI middleware that answers every request before LitServe's own routes could.

LitServe's app behind it only sees the lifespan events, so none of its endpoints is reachable. Where to hook in:
`Front.routes` maps (method, path) to an async handler from Request to Response; a path that ends in `/` in
`Front.prefixes` takes everything below it. Paths in `PROTECTED` ask for the API key when one is set.
"""
import hmac
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from serve import docs, logs
from serve.feedback import Feedback
from serve.metrics import Slab
from serve.page import Page
from serve.pool import Pool
from serve.predict import Predictor
from serve.responses import Header, Problem, Request, Response, as_json
from serve.settings import Settings
from serve.state import State
from serve.tracing import Tracing
from serve.v2 import OpenInference

Handler = Callable[[Request], Awaitable[Response]]
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
PROTECTED, PROBES = ("/predict", "/v2", "/feedback"), "/v2/health/"
SECURITY: list[Header] = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]
CODES = (200, 400, 401, 404, 405, 408, 413, 415, 422, 429, 500, 503, 504)
INFER = "/v2/models/"


class Front:
    """One for each HTTP process; what needs the event loop is made when the lifespan starts."""

    def __init__(self, app: Any, settings: Settings, run: str):
        self.app, self.settings, self.run = app, settings, run
        self.key = settings.key()
        self.ids, self.id_start = count(), os.urandom(6).hex()
        self.routes: dict[tuple[str, str], Handler] = {}
        self.prefixes: dict[str, Handler] = {}

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self.answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            self.start(scope["app"].response_queue_id)
            await self.app(scope, receive, send)
            self.pool.close()
            if self.tracing:
                self.tracing.close()

    def start(self, number: int) -> None:
        """Make what this HTTP process needs. The supervisor decides when it ends, so Ctrl+C is not for us."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        logs.configure(self.settings)
        self.number, self.state = number, State(self.run)
        self.slab = Slab(f"{self.run}/api-{number}.metrics")
        self.pool = Pool(self.run, self.settings.workers)
        feedback = Feedback(self.run, self.slab, self.pool)
        self.predict = Predictor(self.settings, self.pool, self.state, self.slab, number, feedback)
        page, v2 = Page(self.settings, self.pool), OpenInference(self.predict, self.pool)
        self.tracing = Tracing() if self.settings.tracing else None
        self.codes = {code: self.slab.slot("requests", str(code)) for code in CODES}
        self.routes = {
            ("POST", "/predict"): self.predict,
            ("GET", "/model"): self.model,
            ("GET", "/health/live"): self.live,
            ("GET", "/health/ready"): self.ready,
            ("GET", "/docs"): docs.page,
            ("GET", "/openapi.json"): docs.openapi,
            ("POST", "/feedback"): feedback,
            ("GET", "/"): page.index,
            ("GET", "/report"): page.report,
            ("GET", "/v2"): v2,
        }
        self.prefixes = {"/page/": page.own, "/samples/": page.sample, "/v2/": v2}

    async def answer(self, scope: dict, receive: Any, send: Any) -> None:
        started, headers = time.perf_counter(), dict(scope["headers"])
        given = headers.get(b"x-request-id")
        request_id = (given.decode() if given is not None and REQUEST_ID.fullmatch(given)
                      else f"{self.id_start}{next(self.ids):08x}")
        request = Request(scope, receive, headers, request_id)
        path = scope["path"]
        try:
            response = await self.handler(scope["method"], path, headers)(request)
        except Problem as problem:
            response = problem.response(request_id)
            if problem.reason:
                self.slab.add("rejected", problem.reason)
        except ConnectionError:
            response = None  # nobody is there to be answered
        except Exception:
            logs.logger.exception("a request failed", extra={"fields": {"request_id": request_id, "path": path}})
            response = Problem(500, "the service failed on this request", close=True).response(request_id)
        seconds = time.perf_counter() - started
        if (path == "/predict" or path.startswith(INFER)) and response is not None:
            self.count(response.status, seconds)
        if response is not None:
            await self.send(response, request_id, send)
        if self.tracing:
            self.tracing.record(request, response, seconds)
        self.log(request, response, seconds)

    def handler(self, method: str, path: str, headers: dict[bytes, bytes]) -> Handler:
        """Raises Problem 401, 404 or 405."""
        if self.key is not None and path.startswith(PROTECTED) and not path.startswith(PROBES):
            self.authorize(headers)
        found = self.routes.get(("GET" if method == "HEAD" else method, path))
        if found is None:
            found = next((h for prefix, h in self.prefixes.items() if path.startswith(prefix)), None)
        if found is None:
            if any(known == path for _, known in self.routes):
                raise Problem(405, f"{path} does not take {method}")
            raise Problem(404, "there is nothing here; see /docs")
        return found

    def authorize(self, headers: dict[bytes, bytes]) -> None:
        """Compare the key in constant time. Raises Problem 401."""
        given = headers.get(b"x-api-key") or headers.get(b"authorization", b"").removeprefix(b"Bearer ")
        if not hmac.compare_digest(given, self.key):
            raise Problem(401, "send the API key as X-API-Key, or as Authorization: Bearer", "key", close=True)

    async def send(self, response: Response, request_id: str, send: Any) -> None:
        headers = [(b"content-type", response.content_type), (b"content-length", b"%d" % len(response.body)),
                   (b"x-request-id", request_id.encode()), *SECURITY, *response.headers]
        if self.state.draining:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": headers})
        await send({"type": "http.response.body", "body": response.body})

    def count(self, status: int, seconds: float) -> None:
        slot = self.codes.get(status)
        self.slab.values[slot if slot is not None else self.slab.slot("requests", str(status))] += 1
        self.slab.observe("request_duration_seconds", seconds)

    def log(self, request: Request, response: Response | None, seconds: float) -> None:
        status = response.status if response else 499
        if self.settings.access_log or status >= 500:
            scope = request.scope
            logs.logger.info("request", extra={"fields": {
                "request_id": request.id, "method": scope["method"], "path": scope["path"], "status": status,
                "ms": round(1000 * seconds, 3)}})

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
