"""Predictions in an HTTP process: admission, parsing, dispatch to the workers, and the response.

`PredictEndpoint` has one method for each step. `serve.http.predict_request` calls them for POST
/predict, and `PredictEndpoint.predict` runs them in order for `serve.http.open_inference`.
"""

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from serve.http import request_body
from serve.http.answer_cache import AnswerCache
from serve.http.dispatcher import UNANSWERED, Dispatcher, PendingRequest
from serve.http.feedback import FeedbackEndpoint
from serve.http.responses import JSON, Problem, Request, Response, retry_after
from serve.metrics.shared_counters import SharedCounters
from serve.settings import Settings
from serve.shared_state import SharedState
from serve.wire import BASE64, CAM, DEFAULT_TOP_K, EMBEDDING, Answer

MAX_TOP_K = 1000
# Values of the parameter `embedding`, and their flags.
EMBEDDING_FLAGS = {"false": 0, "true": EMBEDDING, "base64": EMBEDDING | BASE64}
NUMBER = re.compile("[0-9]{1,9}")  # int() raises for a number of thousands of digits


class PredictInput(NamedTuple):
    """The images of a request, and what the answer must contain."""

    images: Sequence[bytes | Problem]  # a Problem stands for an image that is malformed
    top_k: int
    flags: int  # of serve.wire.Job
    name: bytes = b""  # the request id, if the service keeps images, else empty


class Reservation:
    """The part of the service's capacity that an admitted request holds.

    Bytes are reserved as they arrive, and images when the body is complete. So a slow client does
    not hold capacity for bytes that it has announced and not sent.
    """

    __slots__ = ("bytes", "images")

    def __init__(self) -> None:
        self.images = 0
        self.bytes = 0


class PredictEndpoint:
    """Admits requests, sends their images to the workers and builds the responses."""

    def __init__(
        self,
        settings: Settings,
        dispatcher: Dispatcher,
        state: SharedState,
        counters: SharedCounters,
        process_number: int,
        feedback: FeedbackEndpoint,
    ) -> None:
        """Start with nothing reserved. `process_number` is that of this HTTP process."""
        self.settings = settings
        self.dispatcher = dispatcher
        self.state = state
        self.counters = counters
        self.process_number = process_number
        self.feedback = feedback
        self.keeps_images = bool(settings.keep)
        self.cache: AnswerCache | None = None
        if settings.cache_entries:
            self.cache = AnswerCache(settings.cache_entries, counters)

        # The sums over the requests that this process has admitted. The bytes include those of
        # responses that clients do not take.
        self._reserved_images = 0
        self._admitted_requests = 0
        self._reserved_bytes = 0
        self._pending_slot = counters.slot("pending_images")
        self._change_reserved(0, 0, 0)

    def _change_reserved(self, images: int, requests: int, size: int) -> None:
        """Add to what this process has reserved, and publish the sums to all HTTP processes."""
        self._reserved_images += images
        self._admitted_requests += requests
        self._reserved_bytes += size
        self.state.set_pending(
            self.process_number,
            self._reserved_images,
            self._admitted_requests,
            self._reserved_bytes,
        )
        self.counters.values[self._pending_slot] = self._reserved_images

    def admit(self, headers: dict[bytes, bytes]) -> Reservation:
        """Admit a request by its head, before its body is read.

        The reservation must be released when the request ends. Raises Problem 413, 415, 429 or 503.
        """
        content_length = int(headers.get(b"content-length", b"0"))
        self._check_body_size(content_length)
        encoding = headers.get(b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            raise Problem(415, "compressed bodies are not supported; send the body as it is")
        if self.state.refusing:
            raise Problem(503, "the service is shutting down", "draining", close=True)
        self._check_ready()
        self.check_capacity(1, content_length)

        self._change_reserved(0, 1, 0)
        return Reservation()

    def _check_body_size(self, size: int) -> None:
        """Raise Problem 413 if a body of `size` bytes is larger than allowed."""
        limit = self.settings.max_body_bytes
        if size > limit:
            raise Problem(413, f"the body is larger than the {limit} bytes allowed", "body")

    def _check_ready(self) -> None:
        """Raise Problem 503 if no worker accepts jobs, and none will soon."""
        if not self.dispatcher.accepts_jobs:
            raise Problem(503, "no model is ready; try again in a second", "not_ready")

    def check_capacity(self, images: int, size: int) -> None:
        """Raise Problem 429 if `images` more images, or `size` more bytes, are over a limit."""
        settings = self.settings
        processes = settings.api_processes
        if self.state.pending_images(processes) + images > settings.max_pending:
            raise Problem(429, "too many images are waiting; try again in a second", "pending")
        if not size:
            return
        pending_bytes = max(
            self.state.pending_bytes(processes) + size, self.dispatcher.unsent_bytes()
        )
        if pending_bytes > settings.max_pending_bytes:
            raise Problem(429, "too many bytes are waiting; try again in a second", "bytes")

    def reserve(self, reservation: Reservation, images: int, size: int) -> None:
        """Change a reservation to `images` images and `size` bytes. Raises Problem 413 or 429."""
        self._check_body_size(size)
        more_images = images - reservation.images
        more_bytes = size - reservation.bytes
        self.check_capacity(more_images, more_bytes)

        reservation.images = images
        reservation.bytes = size
        self._change_reserved(more_images, 0, more_bytes)

    def count_unsent_bytes(self, size: int) -> None:
        """Add to the bytes of responses that clients do not take. They count as pending."""
        self._change_reserved(0, 0, size)

    def release(self, reservation: Reservation) -> None:
        """Return the reserved capacity. Called once, when the request ends."""
        self._change_reserved(-reservation.images, -1, -reservation.bytes)

    def parse(self, request: Request, content: bytes) -> PredictInput:
        """Parse the query and the body of a request to /predict. Raises Problem 4xx."""
        top_k, flags = parse_query(request.scope["query_string"])
        if flags & CAM and "cam" not in self.dispatcher.model["explains"]:
            raise Problem(400, "this model has no heat maps; leave explain out")
        if flags & EMBEDDING and "embedding" not in self.dispatcher.model["outputs"]:
            raise Problem(400, "this model has no embeddings; leave embedding out")

        content_type = request.headers.get(b"content-type", b"")
        images = request_body.parse_images(content, content_type, self.settings.max_images)
        return PredictInput(images, top_k, flags, self.build_name(request))

    def build_name(self, request: Request) -> bytes:
        """Return the name of a request for workers, empty if the service keeps no images."""
        return request.id.encode() if self.keeps_images else b""

    def submit(
        self, inputs: PredictInput, on_done: Callable[[PendingRequest], None]
    ) -> PendingRequest:
        """Send the images to the workers.

        `on_done` is called when they are answered, or at the deadline. Raises Problem 503.
        """
        answers: list[Answer] = []
        images: list[bytes] = []
        for image in inputs.images:
            if isinstance(image, Problem):
                answers.append(self._build_refusal(image))
                images.append(b"")
            else:
                answers.append(UNANSWERED)
                images.append(image)

        if self.cache is not None:
            on_done = self._use_cache(self.cache, answers, images, inputs, on_done)
        self._check_ready()
        timeout_seconds = self.settings.deadline_ms / 1000
        return self.dispatcher.submit(
            images, answers, timeout_seconds, inputs.top_k, inputs.flags, on_done, inputs.name
        )

    def _build_refusal(self, problem: Problem) -> Answer:
        """Return the answer to an image that goes to no worker."""
        self.counters.add("images", "refused")
        return Answer(id=0, status=problem.status, version=0, body=problem.detail.encode())

    def _use_cache(
        self,
        cache: AnswerCache,
        answers: list[Answer],
        images: list[bytes],
        inputs: PredictInput,
        on_done: Callable[[PendingRequest], None],
    ) -> Callable[[PendingRequest], None]:
        """Fill in the answers that the cache has.

        Returns a callback that adds the other answers to the cache, then calls `on_done`.
        """
        model = self.dispatcher.model
        missing_keys: dict[int, bytes] = {}
        for i, image in enumerate(images):
            if answers[i] is not UNANSWERED:
                continue
            key = cache.build_key(image, inputs.top_k, inputs.flags)
            answer = cache.get(key, model)
            if answer is None:
                missing_keys[i] = key
            else:
                answers[i] = answer

        def store_answers(pending: PendingRequest) -> None:
            if not pending.expired:
                for i, key in missing_keys.items():
                    cache.put(key, model, pending.answers[i])
            on_done(pending)

        return store_answers

    def collect_answers(self, pending: PendingRequest) -> list[Answer]:
        """Return the answers of a request that is done.

        Raises Problem 504 if its deadline passed, 503 if two versions of the model answered.
        """
        if pending.expired:
            raise Problem(504, f"no answer within {self.settings.deadline_ms} ms")

        answers = pending.answers
        if len(answers) > 1:
            versions = {answer.version for answer in answers if answer.status == 200}
            if len(versions) > 1:
                raise Problem(503, "the model was replaced during the request; try again")
        return answers

    async def predict(
        self, request: Request, parse: Callable[[bytes], PredictInput]
    ) -> list[Answer]:
        """Read, parse and answer a request, for a handler that awaits the answers.

        Raises Problem, and ConnectionError if the client left.
        """
        reservation = self.admit(request.headers)
        done: asyncio.Future[None] = self.dispatcher.loop.create_future()

        def finish(_: PendingRequest) -> None:
            if not done.done():
                done.set_result(None)

        try:
            content = await request_body.read_body(
                request.receive,
                self.settings.max_body_bytes,
                lambda size: self.reserve(reservation, 0, size),
            )
            inputs = parse(content)
            self.reserve(reservation, len(inputs.images), len(content))
            pending = self.submit(inputs, finish)
            request.connection.set_disconnect_callback(done.cancel)
            try:
                await done
            except asyncio.CancelledError:
                pending.cancel()
                raise ConnectionError("the client left") from None
            return self.collect_answers(pending)
        finally:
            request.connection.set_disconnect_callback(None)
            self.release(reservation)

    def build_response(self, request_id: str, answers: list[Answer]) -> Response:
        """Build the response of /predict and remember its predictions for feedback.

        Of many images, one that failed is an error among the predictions, and the status is 200 if
        any succeeded. Raises Problem if the only image failed.
        """
        if len(answers) == 1:
            answer = answers[0]
            if answer.status != 200:
                raise Problem(answer.status, answer.body.decode())
            status = 200
            version = answer.version
            predictions = answer.body
            times_us = (answer.queue_us, answer.decode_us, answer.infer_us)
        else:
            counted = [answer for answer in answers if answer.status == 200] or answers
            status = max(answer.status for answer in counted)
            version = max(answer.version for answer in counted)
            predictions = b",".join([encode_prediction(answer) for answer in answers])
            times_us = (
                max(answer.queue_us for answer in answers),
                max(answer.decode_us for answer in answers),
                max(answer.infer_us for answer in answers),
            )

        # An answer that no worker gave has no version.
        version = version or self.dispatcher.version
        body = b'{"id":"%b","model":{"name":%b,"version":"%d"},"predictions":[%b]}' % (
            request_id.encode(),
            self.dispatcher.model_name_json,
            version,
            predictions,
        )
        server_timing = b"queue;dur=%.3f, decode;dur=%.3f, infer;dur=%.3f" % (
            times_us[0] / 1000,
            times_us[1] / 1000,
            times_us[2] / 1000,
        )
        self.feedback.remember(request_id, answers)
        headers = [
            (b"x-model-version", b"%d" % version),
            (b"server-timing", server_timing),
            *retry_after(status),
        ]
        return Response(status, body, JSON, headers)


# Most requests have an empty query, so it is not parsed.
_KNOWN_QUERIES = {b"": (DEFAULT_TOP_K, 0)}


def parse_query(query: bytes) -> tuple[int, int]:
    """Return `top_k` and the flags of a query string. Raises Problem 400."""
    if query in _KNOWN_QUERIES:
        return _KNOWN_QUERIES[query]

    top_k = DEFAULT_TOP_K
    flags = 0
    parameters = parse_qs(query.decode("latin-1"), keep_blank_values=True)
    for name, values in parameters.items():
        value = values[-1]
        if name == "top_k":
            top_k = parse_top_k(value)
        elif name == "explain":
            if value != "cam":
                raise Problem(400, "explain can be: cam")
            flags |= CAM
        elif name == "embedding":
            if value not in EMBEDDING_FLAGS:
                raise Problem(400, "embedding can be: true, base64 or false")
            flags |= EMBEDDING_FLAGS[value]
    return top_k, flags


def parse_top_k(value: str) -> int:
    """Return how many classes to list. Raises Problem 400."""
    if NUMBER.fullmatch(value):
        top_k = int(value)
        if 1 <= top_k <= MAX_TOP_K:
            return top_k
    raise Problem(400, f"top_k must be a number from 1 to {MAX_TOP_K}")


def encode_prediction(answer: Answer) -> bytes:
    """Return the JSON of one image among many: its prediction, or its error."""
    if answer.status == 200:
        return answer.body
    error: dict[str, Any] = Problem(answer.status, answer.body.decode()).members()
    return json.dumps({"error": error}).encode()
