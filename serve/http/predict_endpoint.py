"""Predictions in one HTTP process: admission, images, workers, answers. `serve.http.predict_request` and `serve.http.open_inference` call it."""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from urllib.parse import parse_qs

from serve.http import request_body
from serve.http.answer_cache import Cache
from serve.http.dispatcher import UNANSWERED, Ask, Pool
from serve.http.feedback import FeedbackEndpoint
from serve.http.responses import JSON, Problem, Request, Response, retry_after
from serve.metrics.shared_counters import SharedCounters
from serve.settings import Settings
from serve.shared_state import SharedState
from serve.wire import CAM, DEFAULT_TOP_K, Answer

QUERY = {b"": (DEFAULT_TOP_K, 0)}  # of most requests
MAX_TOP_K = 1000
NUMBER = re.compile("[0-9]{1,9}")  # int() raises for some thousand digits
Parsed = tuple[
    Sequence[bytes | Problem], int, int
]  # images, or what is wrong with one of them; top_k; flags


class Place:
    """What one request holds of the service's capacity: bytes as they come, images once they are all there.

    So a client that is slow to send what it announced takes no room from others.
    """

    __slots__ = ("images", "size")

    def __init__(self):
        self.images = self.size = 0


class Predictor:
    """Admits requests, hands their images to the workers and composes the answers."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        state: SharedState,
        counters: SharedCounters,
        number: int,
        feedback: FeedbackEndpoint,
    ):
        self.settings, self.pool, self.state, self.counters, self.number = (
            settings,
            pool,
            state,
            counters,
            number,
        )
        self.feedback, self.cache = (
            feedback,
            Cache(settings.cache_entries, counters) if settings.cache_entries else None,
        )
        self.images = self.requests = self.bytes = 0
        self.pending_slot = counters.slot("pending_images")
        self.count(0, 0, 0)

    def count(self, images: int, requests: int, size: int) -> None:
        """Take or give back capacity, seen by all HTTP processes."""
        self.images += images
        self.requests += requests
        self.bytes += size
        self.state.set_pending(self.number, self.images, self.requests, self.bytes)
        self.counters.values[self.pending_slot] = self.images

    def enter(self, headers: dict[bytes, bytes]) -> Place:
        """Admit a request by its head alone, or raise Problem 413, 415, 429 or 503 before its body is read."""
        size = int(headers.get(b"content-length", b"0"))
        if size > self.settings.max_body_bytes:
            raise Problem(
                413,
                f"the body is larger than the {self.settings.max_body_bytes} bytes allowed",
                "body",
            )
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Problem(415, "compressed bodies are not taken")
        if self.state.refusing:
            raise Problem(503, "the service is shutting down", "draining", close=True)
        if not self.pool.usable:
            raise Problem(503, "no model is ready; try again in a second", "not_ready")
        self.check_room(1, size)
        self.count(0, 1, 0)
        return Place()

    def check_room(self, images: int, size: int) -> None:
        """Raises Problem 429 where there is no room for so much more."""
        settings = self.settings
        if self.state.pending_images(settings.api_processes) + images > settings.max_pending:
            raise Problem(429, "too many images are waiting; try again in a second", "pending")
        if (
            size
            and max(self.state.pending_bytes(settings.api_processes) + size, self.pool.unsent())
            > settings.max_pending_bytes
        ):
            raise Problem(429, "too many bytes are waiting; try again in a second", "bytes")

    def hold(self, place: Place, images: int, size: int) -> None:
        """Let a request hold so many images and bytes of a body. Raises Problem 413, 429."""
        if size > self.settings.max_body_bytes:
            raise Problem(
                413,
                f"the body is larger than the {self.settings.max_body_bytes} bytes allowed",
                "body",
            )
        more_images, more_bytes = images - place.images, size - place.size
        self.check_room(more_images, more_bytes)
        place.images, place.size = images, size
        self.count(more_images, 0, more_bytes)

    def leave(self, place: Place) -> None:
        self.count(-place.images, -1, -place.size)

    def parse(self, request: Request, content: bytes) -> Parsed:
        """Images, top_k and flags of a request to /predict. Raises Problem 4xx."""
        top_k, flags = query(request.scope["query_string"])
        if flags & CAM and "cam" not in self.pool.model["explains"]:
            raise Problem(400, "this model has no heat maps; leave explain away")
        kind = request.headers.get(b"content-type", b"")
        return request_body.images(content, kind, self.settings.max_images), top_k, flags

    def ask(
        self, given: Sequence[bytes | Problem], top_k: int, flags: int, done: Callable[[Ask], None]
    ) -> Ask:
        """Start to answer these images; `done` is called when they are, or at the deadline. Raises Problem 503."""
        answers = [
            self.refusal(image) if isinstance(image, Problem) else UNANSWERED for image in given
        ]
        images = [b"" if isinstance(image, Problem) else image for image in given]
        if self.cache is not None:
            done = self.look_up(self.cache, answers, images, top_k, flags, done)
        if not self.pool.usable:
            raise Problem(503, "no model is ready; try again in a second", "not_ready")
        return self.pool.ask(images, answers, self.settings.deadline_ms / 1000, top_k, flags, done)

    def refusal(self, problem: Problem) -> Answer:
        """The answer of an image that no worker need see."""
        self.counters.add("images", "refused")
        return Answer(0, problem.status, 0, problem.detail.encode())

    def look_up(
        self,
        cache: Cache,
        answers: list[Answer],
        images: list[bytes],
        top_k: int,
        flags: int,
        done: Callable[[Ask], None],
    ) -> Callable[[Ask], None]:
        """Put in the answers that the cache knows; the others it learns when they are there."""
        model, keys = self.pool.model, [cache.key(image, top_k, flags) for image in images]
        missing = []
        for i, key in enumerate(keys):
            if answers[i] is UNANSWERED:
                answers[i] = cache.get(key, model) or UNANSWERED
            if answers[i] is UNANSWERED:
                missing.append(i)

        def learn(ask: Ask) -> None:
            if not ask.expired:
                for i in missing:
                    cache.put(keys[i], model, ask.answers[i])
            done(ask)

        return learn

    def result(self, ask: Ask) -> list[Answer]:
        """The answers of what is done. Raises Problem 504 after its deadline, 503 where two versions answered."""
        if ask.expired:
            raise Problem(504, f"no answer within {self.settings.deadline_ms} ms")
        if len(ask.answers) > 1 and len({a.version for a in ask.answers if a.status == 200}) > 1:
            raise Problem(503, "the model was changed meanwhile; try again")
        return ask.answers

    async def run(self, request: Request, parse: Callable[[bytes], Parsed]) -> list[Answer]:
        """All of the above for a handler that waits. Raises Problem, or ConnectionError when the client left."""
        place = self.enter(request.headers)
        connection = request.scope["state"]["connection"]
        ended = self.pool.loop.create_future()
        try:
            content = await request_body.read(
                request.receive,
                self.settings.max_body_bytes,
                lambda size: self.hold(place, 0, size),
            )
            images, top_k, flags = parse(content)
            self.hold(place, len(images), len(content))
            ask = self.ask(
                images, top_k, flags, lambda _: None if ended.done() else ended.set_result(None)
            )
            connection.on_lost = ended.cancel
            try:
                await ended
            except asyncio.CancelledError:
                ask.cancel()
                raise ConnectionError("the client left") from None
            return self.result(ask)
        finally:
            connection.on_lost = None
            self.leave(place)

    def compose(self, request_id: str, answers: list[Answer]) -> Response:
        """One answer for all images; an image that failed is an error in its place."""
        times: Sequence[int]
        if len(answers) == 1:
            last = answers[0]
            if last.status != 200:
                raise Problem(last.status, last.body.decode())
            status, content, times = 200, last.body, (last.queue_us, last.decode_us, last.infer_us)
        else:
            last = max(answers, key=lambda a: (a.status == 200, a.version))
            status = 200 if last.status == 200 else max(a.status for a in answers)
            content = b",".join([a.body if a.status == 200 else error(a) for a in answers])
            times = [max(column) for column in list(zip(*answers, strict=True))[6:]]
        version = last.version or self.pool.version  # an answer that no worker gave has none
        whole = b'{"id":"%b","model":{"name":%b,"version":"%d"},"predictions":[%b]}' % (
            request_id.encode(),
            self.pool.name,
            version,
            content,
        )
        timing = b"queue;dur=%.3f, decode;dur=%.3f, infer;dur=%.3f" % tuple(
            [t / 1000 for t in times]
        )
        self.feedback.remember(request_id, answers)
        return Response(
            status,
            whole,
            JSON,
            [
                (b"x-model-version", b"%d" % version),
                (b"server-timing", timing),
                *retry_after(status),
            ],
        )


def query(text: bytes) -> tuple[int, int]:
    """`top_k` and flags of a query string. Raises Problem 400."""
    if text in QUERY:
        return QUERY[text]
    top_k, flags = DEFAULT_TOP_K, 0
    for name, values in parse_qs(text.decode("latin-1"), keep_blank_values=True).items():
        if name == "top_k" and NUMBER.fullmatch(values[-1]) and 1 <= int(values[-1]) <= MAX_TOP_K:
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
