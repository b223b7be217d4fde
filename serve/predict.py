"""POST /predict: admission, body, workers, answer."""
import asyncio
import json
from collections.abc import Callable
from urllib.parse import parse_qs

from serve import body
from serve.answer import TOP_K
from serve.cache import Cache
from serve.feedback import Feedback
from serve.frames import CAM, Answer
from serve.metrics import Slab
from serve.pool import Pool
from serve.responses import JSON, Problem, Request, Response
from serve.settings import Settings
from serve.state import State

QUERY = {b"": (TOP_K, 0)}  # of most requests
MAX_TOP_K = 1000


class Predictor:
    """What one HTTP process needs to answer /predict, and the count of what it has accepted."""

    def __init__(self, settings: Settings, pool: Pool, state: State, slab: Slab, number: int, feedback: Feedback):
        self.settings, self.pool, self.state, self.slab, self.number = settings, pool, state, slab, number
        self.feedback, self.cache = feedback, Cache(settings.cache_entries, slab) if settings.cache_entries else None
        self.images = self.requests = self.bytes = 0
        self.pending_slot = slab.slot("pending_images")

    def count(self, images: int, requests: int, size: int) -> None:
        """Take or give back places, seen by all HTTP processes."""
        self.images += images
        self.requests += requests
        self.bytes += size
        self.state.set_pending(self.number, self.images, self.requests, self.bytes)
        self.slab.values[self.pending_slot] = self.images

    def admit(self, images: int) -> None:
        """Raises Problem 429 where there is no place for so many more images."""
        if self.state.pending(self.settings.api_processes) + images > self.settings.max_pending:
            raise Problem(429, "too many images are waiting; try again in a second", "pending")

    async def __call__(self, request: Request) -> Response:
        def parse(content: bytes) -> tuple[list[bytes], int, int]:
            top_k, flags = query(request.scope["query_string"])
            if flags & CAM and "cam" not in self.pool.model["explains"]:
                raise Problem(400, "this model has no heat maps; leave explain away")
            kind = request.headers.get(b"content-type", b"")
            return body.images(content, kind, self.settings.max_images), top_k, flags

        answers = await self.run(request, parse)
        response = self.compose(request.id, answers)
        self.feedback.remember(request.id, answers)
        return response

    async def run(self, request: Request, parse: Callable[[bytes], tuple[list[bytes], int, int]]) -> list[Answer]:
        """Admit a request, read it, ask the workers. `parse` makes images, top_k and flags of its body."""
        settings, size = self.settings, declared(request.headers, self.settings.max_body_bytes)
        if self.state.draining:
            raise Problem(503, "the service is shutting down", "draining", close=True)
        if not self.pool.usable:
            raise Problem(503, "no model is ready yet; try again in a second", "not_ready")
        self.admit(1)
        taken = 1
        self.count(1, 1, size)
        try:
            content = await body.read(request.receive, settings.max_body_bytes)
            found, top_k, flags = parse(content)
            if len(found) > 1:
                self.admit(len(found) - 1)
                self.count(len(found) - 1, 0, 0)
                taken = len(found)
            if not self.pool.usable:
                raise Problem(503, "no model is ready; try again in a second", "not_ready")
            return await (self.ask if self.cache is None else self.ask_cached)(request, found, top_k, flags)
        finally:
            self.count(-taken, -1, -size)

    async def ask_cached(self, request: Request, images: list[bytes], top_k: int, flags: int) -> list[Answer]:
        """As `ask`, but only for images that the cache does not know."""
        model, keys = self.pool.model, [self.cache.key(image, top_k, flags) for image in images]
        answers = [self.cache.get(key, model) for key in keys]
        missing = [i for i, answer in enumerate(answers) if answer is None]
        fresh = await self.ask(request, [images[i] for i in missing], top_k, flags) if missing else []
        for i, answer in zip(missing, fresh, strict=True):
            answers[i] = answer
            self.cache.put(keys[i], model, answer)
        return answers

    async def ask(self, request: Request, images: list[bytes], top_k: int, flags: int) -> list[Answer]:
        """The workers' answers. Raises Problem 504 at the deadline, ConnectionError when the client left."""
        ask = self.pool.ask(images, self.settings.deadline_ms / 1000, top_k, flags)
        timer = self.pool.loop.call_later(self.settings.deadline_ms / 1000, expire, ask.done)
        connection = request.scope["connection"]
        connection.on_lost = ask.done.cancel
        try:
            await ask.done
        except asyncio.CancelledError:
            self.pool.abandon(ask)
            raise ConnectionError("the client left") from None
        except TimeoutError:
            self.pool.abandon(ask)
            raise Problem(504, f"no answer within {self.settings.deadline_ms} ms") from None
        finally:
            connection.on_lost = None
            timer.cancel()
        return ask.answers

    def compose(self, request_id: str, answers: list[Answer]) -> Response:
        """One answer for all images; an image that failed is an error in its place."""
        last = answers[-1] if len(answers) == 1 else max(answers, key=lambda a: (a.status == 200, a.version))
        if last.status != 200 and len(answers) == 1:
            raise Problem(last.status, last.body.decode())
        parts = [a.body if a.status == 200 else error(a) for a in answers]
        status = 200 if last.status == 200 else failure(answers)
        content = (b'{"id":"%b","model":{"name":%b,"version":"%d"},"predictions":[%b]}'
                   % (request_id.encode(), self.pool.name, last.version, b",".join(parts)))
        timing = b"queue;dur=%.3f, decode;dur=%.3f, infer;dur=%.3f" % tuple(
            max(times) / 1000 for times in zip(*(a[3:6] for a in answers), strict=True))
        return Response(status, content, JSON,
                        [(b"x-model-version", b"%d" % last.version), (b"server-timing", timing)])


def expire(done: asyncio.Future) -> None:
    if not done.done():
        done.set_exception(TimeoutError())


def declared(headers: dict[bytes, bytes], limit: int) -> int:
    """Content-Length, 0 where the body is chunked. Raises Problem 413 beyond the limit, before the body is read."""
    size = int(headers.get(b"content-length", b"0"))
    if size > limit:
        raise Problem(413, f"the body is larger than the {limit} bytes allowed", "body", close=True)
    return size


def query(text: bytes) -> tuple[int, int]:
    """`top_k` and flags of a query string. Raises Problem 400."""
    if text in QUERY:
        return QUERY[text]
    top_k, flags = TOP_K, 0
    for name, values in parse_qs(text.decode("latin-1"), keep_blank_values=True).items():
        if name == "top_k" and values[-1].isdecimal() and 1 <= int(values[-1]) <= MAX_TOP_K:
            top_k = int(values[-1])
        elif name == "explain" and values[-1] == "cam":
            flags |= CAM
        elif name == "top_k":
            raise Problem(400, f"top_k must be a number from 1 to {MAX_TOP_K}")
        elif name == "explain":
            raise Problem(400, "explain can be: cam")
    return top_k, flags


def error(answer: Answer) -> bytes:
    return json.dumps({"error": Problem(answer.status, answer.body.decode()).members()}).encode()


def failure(answers: list[Answer]) -> int:
    """The status that tells that all images failed: theirs where they agree, else the worst."""
    return max(a.status for a in answers)


