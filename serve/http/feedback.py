"""POST /feedback: the true label of an image answered before becomes live accuracy and calibration error.

What was answered is remembered in a table in shared memory, one for all HTTP processes, of a fixed size: each answer
has one place, given by a hash of its request id, and a later answer with the same place takes it over.
"""

import hashlib
import json
import mmap
import os
import struct
from collections import deque

import numpy as np

from serve.http import request_body
from serve.http.dispatcher import Pool
from serve.http.responses import Problem, Request, Response, as_json
from serve.metrics.derived_metrics import BINS
from serve.wire import Answer

PLACES = 1 << 16
WINDOW = 2000  # labels in the window of one HTTP process
MAX_BYTES = 8192
_PLACE = struct.Struct(
    "<8sI40s"
)  # hash of request id and image, version, the answer from its class index on
_EMPTY = bytes(_PLACE.size)


class Memory:
    """The table. Two processes may write one place at once; an entry torn by that is as good as forgotten."""

    def __init__(self, run: str):
        with open(os.path.join(run, "answers"), "a+b") as file:
            file.truncate(PLACES * _PLACE.size)
            self.map = mmap.mmap(file.fileno(), PLACES * _PLACE.size)

    def put(self, request_id: str, image: int, version: int, text: bytes) -> None:
        """Every answer pays for this, so what is kept of its `text` is parsed when a label comes, as few do.

        A quote inside a label is escaped, so the first `","index":` ends the label.
        """
        at, key = _place(request_id, image)
        start = text.index(b'","index":') + 10
        _PLACE.pack_into(self.map, at, key, version, text[start : start + 40])

    def take(self, request_id: str, image: int) -> tuple[int, int, float] | None:
        """Version, class index and confidence, once: a label counts one time."""
        found = self.look(request_id, image)
        if found is not None:
            at, _ = _place(request_id, image)
            self.map[at : at + _PLACE.size] = _EMPTY
        return found

    def look(self, request_id: str, image: int) -> tuple[int, int, float] | None:
        at, key = _place(request_id, image)
        found, version, text = _PLACE.unpack_from(self.map, at)
        if found != key:
            return None
        try:
            index, confidence = text.split(b",", 2)[:2]  # `7,"confidence":0.987654,"top":…`
            return version, int(index), float(confidence.partition(b":")[2])
        except ValueError:
            return None


def _place(request_id: str, image: int) -> tuple[int, bytes]:
    name = request_id.encode()
    key = hashlib.blake2b(b"%b %d" % (name, image) if image else name, digest_size=8).digest()
    return (key[0] | key[1] << 8) % PLACES * _PLACE.size, key


class Feedback:
    """Answers /feedback in one HTTP process; `remember` is called with every answer that left."""

    def __init__(self, run: str, counters, pool: Pool):
        self.memory, self.counters, self.pool = Memory(run), counters, pool
        self.window: deque[tuple[int, bool, float]] = deque()
        self.empty()  # also after a restart
        pool.on_version = self.empty

    def empty(self) -> None:
        """Begin a window: it says something of one version only."""
        self.window.clear()
        for part in ("count", "correct", "confidence"):
            for i in range(BINS):
                self.counters.set("feedback_window", part, str(i), to=0)

    def remember(self, request_id: str, answers: list[Answer]) -> None:
        for image, answer in enumerate(answers):
            if answer.status == 200:
                self.memory.put(request_id, image, answer.version, answer.body)

    def remember_numbers(
        self, request_id: str, answers: list[Answer], probabilities: np.ndarray
    ) -> None:
        """The same for answers without text: probabilities [N, K]."""
        best = zip(probabilities.argmax(1).tolist(), probabilities.max(1).tolist(), strict=True)
        self.remember(
            request_id,
            [
                answer._replace(body=b'","index":%d,"confidence":%.6f,' % pair)
                for answer, pair in zip(answers, best, strict=True)
            ],
        )

    async def __call__(self, request: Request) -> Response:
        said = _parse(await request_body.read(request.receive, MAX_BYTES))
        found = self.memory.look(said["id"], said["image"])
        if found is None:
            self.counters.add("feedback", "unknown")
            raise Problem(404, "no answer with this id is remembered, or it has its label already")
        version, index, confidence = found
        model = self.pool.model
        if str(version) != model.get("version"):
            raise Problem(404, f"version {version} which gave this answer is served no more")
        if said["label"] not in model["classes"]:
            raise Problem(400, f"the model has no class {said['label']!r}")
        correct = model["classes"].index(said["label"]) == index
        if self.memory.take(said["id"], said["image"]) is not None:
            self._count(correct, confidence)
        return as_json({"id": said["id"], "image": said["image"], "correct": correct})

    def _count(self, correct: bool, confidence: float) -> None:
        self.counters.add("feedback", "correct" if correct else "wrong")
        entry = (min(int(confidence * BINS), BINS - 1), correct, confidence)
        self.window.append(entry)
        self._add(entry, 1)
        if len(self.window) > WINDOW:
            self._add(self.window.popleft(), -1)

    def _add(self, entry: tuple[int, bool, float], sign: int) -> None:
        name = str(entry[0])
        self.counters.add("feedback_window", "count", name, by=sign)
        self.counters.add("feedback_window", "correct", name, by=sign * entry[1])
        self.counters.add("feedback_window", "confidence", name, by=sign * entry[2])


def _parse(content: bytes) -> dict:
    """`{"id": …, "label": …, "image": 0}`. Raises Problem 400."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is not JSON") from error
    if (
        not isinstance(said, dict)
        or not isinstance(said.get("id"), str)
        or not isinstance(said.get("label"), str)
    ):
        raise Problem(400, 'send {"id": "<id of the answer>", "label": "<true class>"}')
    image = said.setdefault("image", 0)
    if type(image) is not int or not 0 <= image < 1 << 16:
        raise Problem(400, "image must be its place in the request, from 0")
    try:
        said["id"].encode()
    except UnicodeEncodeError as error:
        raise Problem(400, "the id is not valid text") from error
    return said
