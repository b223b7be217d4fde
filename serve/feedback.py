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

from serve import body
from serve.derived import BINS
from serve.frames import Answer
from serve.pool import Pool
from serve.responses import Problem, Request, Response, as_json

PLACES = 1 << 16
WINDOW = 2000  # labels in the window of one HTTP process
MAX_BYTES = 8192
_PLACE = struct.Struct("<8sIIf")  # hash of request id and image, version, class index, confidence
_EMPTY = bytes(_PLACE.size)


class Memory:
    """The table. Two processes may write one place at once; a torn entry fits no hash and is as good as forgotten."""

    def __init__(self, run: str):
        with open(os.path.join(run, "answers"), "a+b") as file:
            file.truncate(PLACES * _PLACE.size)
            self.map = mmap.mmap(file.fileno(), PLACES * _PLACE.size)

    def put(self, request_id: str, image: int, version: int, index: int, confidence: float) -> None:
        at, key = _place(request_id, image)
        _PLACE.pack_into(self.map, at, key, version, index, confidence)

    def take(self, request_id: str, image: int) -> tuple[int, int, float] | None:
        """Version, class index and confidence, once: a label counts one time."""
        at, key = _place(request_id, image)
        found, version, index, confidence = _PLACE.unpack_from(self.map, at)
        if found != key:
            return None
        self.map[at:at + _PLACE.size] = _EMPTY
        return version, index, confidence


def _place(request_id: str, image: int) -> tuple[int, bytes]:
    key = hashlib.blake2b(b"%d %b" % (image, request_id.encode()), digest_size=8).digest()
    return int.from_bytes(key[:4], "little") % PLACES * _PLACE.size, key


class Feedback:
    """Answers /feedback in one HTTP process; `remember` is called with every answer that left."""

    def __init__(self, run: str, slab, pool: Pool):
        self.memory, self.slab, self.pool = Memory(run), slab, pool
        self.window: deque[tuple[int, bool, float]] = deque()
        for part in ("count", "correct", "confidence"):
            for i in range(BINS):  # this window begins empty, also after a restart
                slab.set("feedback_window", part, str(i), to=0)

    def remember(self, request_id: str, answers: list[Answer]) -> None:
        for image, answer in enumerate(answers):
            if answer.status == 200:
                self.memory.put(request_id, image, answer.version, *_prediction(answer.body))

    async def __call__(self, request: Request) -> Response:
        said = _parse(await body.read(request.receive, MAX_BYTES))
        found = self.memory.take(said["id"], said["image"])
        if found is None:
            self.slab.add("feedback", "unknown")
            raise Problem(404, "no answer with this id is remembered, or it has its label already")
        version, index, confidence = found
        truth = self._index(said, version, found)
        self._count(index == truth, confidence)
        return as_json({"id": said["id"], "image": said["image"], "correct": index == truth})

    def _index(self, said: dict, version: int, found: tuple[int, int, float]) -> int:
        """The true class as index. Raises Problem 400 (the answer stays remembered) for one that the model lacks."""
        model = self.pool.model
        if str(version) != model.get("version"):
            raise Problem(404, f"version {version} which gave this answer is served no more")
        classes, label = model["classes"], said["label"]
        if label in classes:
            return classes.index(label)
        self.memory.put(said["id"], said["image"], *found)
        raise Problem(400, f"the model has no class {label!r}")

    def _count(self, correct: bool, confidence: float) -> None:
        self.slab.add("feedback", "correct" if correct else "wrong")
        entry = (min(int(confidence * BINS), BINS - 1), correct, confidence)
        self.window.append(entry)
        self._add(entry, 1)
        if len(self.window) > WINDOW:
            self._add(self.window.popleft(), -1)

    def _add(self, entry: tuple[int, bool, float], sign: int) -> None:
        name = str(entry[0])
        self.slab.add("feedback_window", "count", name, by=sign)
        self.slab.add("feedback_window", "correct", name, by=sign * entry[1])
        self.slab.add("feedback_window", "confidence", name, by=sign * entry[2])


def _prediction(text: bytes) -> tuple[int, float]:
    """Class index and confidence from an answer's `{"label":…,"index":7,"confidence":0.9,"top":…`.

    A quote inside a label is escaped, so the first `","index":` ends the label.
    """
    at = text.index(b'","index":') + 10
    index, _, rest = text[at:at + 60].partition(b",")
    return int(index), float(rest[len(b'"confidence":'):].partition(b",")[0])


def _parse(content: bytes) -> dict:
    """`{"id": …, "label": …, "image": 0}`. Raises Problem 400."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is not JSON") from error
    if not isinstance(said, dict) or not isinstance(said.get("id"), str) or not isinstance(said.get("label"), str):
        raise Problem(400, 'send {"id": "<id of the answer>", "label": "<true class>"}')
    image = said.setdefault("image", 0)
    if type(image) is not int or not 0 <= image < 1 << 16:
        raise Problem(400, "image must be its place in the request, from 0")
    try:
        said["id"].encode()
    except UnicodeEncodeError as error:
        raise Problem(400, "the id is not valid text") from error
    return said
