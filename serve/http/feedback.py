"""POST /feedback: true labels of earlier answers become live accuracy and calibration error.

Every prediction that leaves the service is kept for a while in a table in shared memory, one for
all HTTP processes, so that any of them can take the label. The metrics cover the most recent labels
of the version that is served now.
"""

import hashlib
import json
import mmap
import os
import struct
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from models.kept import KeptImage, Reason
from serve.http import request_body
from serve.http.dispatcher import Dispatcher
from serve.http.responses import JSON, Problem, Request, Response, json_response
from serve.metrics.definitions import FEEDBACK_BINS
from serve.metrics.shared_counters import SharedCounters
from serve.wire import LABEL, Answer, build_image_name

TABLE_SLOTS = 1 << 16
WINDOW_LABELS = 2000  # of one HTTP process
MAX_BODY_BYTES = 8192
MAX_IMAGE_INDEX = (1 << 16) - 1

# Hash of request id and image, version, class index, confidence.
_SLOT = struct.Struct("<8sIIf")
_EMPTY_SLOT = bytes(_SLOT.size)


class PastPrediction(NamedTuple):
    """The part of a prediction that the table stores."""

    version: int  # of the model
    class_index: int  # of the predicted class
    confidence: float


class AnswerTable:
    """A hash table of predictions in shared memory, of fixed size.

    The hash of the request id and the image selects the one slot of an answer, and a later answer
    with the same slot replaces it. There is no lock. Two processes that write one slot at the same
    moment may mix their entries, which is rare and harmless for statistics.
    """

    def __init__(self, run_directory: str, slots: int = TABLE_SLOTS) -> None:
        """Open the table in `run_directory`, or create it. All processes use as many slots."""
        self.slots = slots
        size = slots * _SLOT.size
        with open(os.path.join(run_directory, "answers"), "a+b") as file:
            file.truncate(size)
            self.map = mmap.mmap(file.fileno(), size)

    def put(self, request_id: str, image: int, answer: Answer) -> None:
        """Store the prediction for one image, given by its position in the request."""
        offset, key = _locate(request_id, image, self.slots)
        _SLOT.pack_into(
            self.map, offset, key, answer.version, answer.class_index, answer.confidence
        )

    def get(self, request_id: str, image: int) -> PastPrediction | None:
        """Return the prediction for one image, or None if it is unknown, replaced or removed."""
        offset, key = _locate(request_id, image, self.slots)
        stored_key, version, class_index, confidence = _SLOT.unpack_from(self.map, offset)
        if stored_key != key:
            return None
        return PastPrediction(version, class_index, confidence)

    def pop(self, request_id: str, image: int) -> PastPrediction | None:
        """Return the prediction for one image and remove it."""
        answer = self.get(request_id, image)
        if answer is not None:
            offset, _ = _locate(request_id, image, self.slots)
            self.map[offset : offset + _SLOT.size] = _EMPTY_SLOT
        return answer


def _locate(request_id: str, image: int, slots: int) -> tuple[int, bytes]:
    """Return the byte offset of an answer's slot and the key that is stored in it."""
    name = request_id.encode()
    if image:
        name = b"%b %d" % (name, image)
    key = hashlib.blake2b(name, digest_size=8).digest()
    slot = int.from_bytes(key[:2], "little") % slots
    return slot * _SLOT.size, key


class WindowEntry(NamedTuple):
    """One label in the window of the live metrics."""

    bin: int  # of the confidence, 0 <= bin < FEEDBACK_BINS
    is_correct: bool
    confidence: float


class FeedbackEndpoint:
    """Handles POST /feedback in one HTTP process and remembers the predictions that leave it."""

    def __init__(
        self,
        run_directory: str,
        counters: SharedCounters,
        dispatcher: Dispatcher,
        keeps_images: bool = False,
    ) -> None:
        """`keeps_images`: whether workers keep images, and so want to know their labels."""
        self.keeps_images = keeps_images
        self.table = AnswerTable(run_directory)
        self.counters = counters
        self.dispatcher = dispatcher
        self.window: deque[WindowEntry] = deque()

        self.clear_window()  # the process before this one may have left numbers in the counters
        dispatcher.add_version_callback(self.clear_window)

    def clear_window(self) -> None:
        """Start a new window: the metrics describe one version only."""
        self.window.clear()
        for part in ("count", "correct", "confidence"):
            for i in range(FEEDBACK_BINS):
                self.counters.set("feedback_window", part, str(i), to=0)

    def remember(self, request_id: str, answers: list[Answer]) -> None:
        """Store the predictions of a request."""
        for image, answer in enumerate(answers):
            if answer.status == 200:
                self.table.put(request_id, image, answer)

    async def __call__(self, request: Request) -> Response:
        """Compare a label with the stored prediction and count the result, once for each image.

        Raises Problem 400, 404, 413 or 415.
        """
        content = await request_body.read_body(request.receive, MAX_BODY_BYTES)
        media_type = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != JSON:
            raise Problem(415, "send JSON, with Content-Type: application/json")
        feedback = parse_feedback(content)

        answer = self.table.get(feedback.request_id, feedback.image)
        if answer is None:
            self.counters.add("feedback", "unknown")
            raise Problem(404, "no answer with this id is stored, or it has a label already")

        model = self.dispatcher.model
        if str(answer.version) != model.get("version"):
            raise Problem(
                404,
                f"the answer came from version {answer.version}, which is no longer served",
            )
        if feedback.label not in model["classes"]:
            raise Problem(400, f"the model has no class {feedback.label!r}")

        is_correct = model["classes"].index(feedback.label) == answer.class_index
        if self.table.pop(feedback.request_id, feedback.image) is not None:
            self._count(is_correct, answer.confidence)
            if self.keeps_images:
                name = build_image_name(feedback.request_id.encode(), feedback.image)
                self.dispatcher.send_notice(name, LABEL, feedback.label.encode())
        return json_response(
            {"id": feedback.request_id, "image": feedback.image, "correct": is_correct}
        )

    def count_label(self, image: KeptImage, label: str) -> None:
        """Count the label of a kept image, once, if the version that answered it is served.

        Only images that were drawn at random change the live accuracy: the others were kept because
        they are doubtful, and would make it too low.
        """
        self.table.pop(image.request_id, image.image)
        model = self.dispatcher.model
        if str(image.model.version) != model.get("version") or label not in model["classes"]:
            return
        predicted = image.top[0]
        is_correct = predicted.label == label
        self.counters.add("feedback", "correct" if is_correct else "wrong")
        if Reason.RANDOM in image.reasons:
            self._move_window(is_correct, predicted.confidence)

    def _count(self, is_correct: bool, confidence: float) -> None:
        """Count a label and move the window by one."""
        self.counters.add("feedback", "correct" if is_correct else "wrong")
        self._move_window(is_correct, confidence)

    def _move_window(self, is_correct: bool, confidence: float) -> None:
        confidence_bin = min(int(confidence * FEEDBACK_BINS), FEEDBACK_BINS - 1)
        entry = WindowEntry(confidence_bin, is_correct, confidence)
        self.window.append(entry)
        self._add_to_window(entry, 1)
        if len(self.window) > WINDOW_LABELS:
            self._add_to_window(self.window.popleft(), -1)

    def _add_to_window(self, entry: WindowEntry, sign: int) -> None:
        """Add an entry to the sums of its bin (sign 1), or subtract it (sign -1)."""
        name = str(entry.bin)
        self.counters.add("feedback_window", "count", name, by=sign)
        self.counters.add("feedback_window", "correct", name, by=sign * entry.is_correct)
        self.counters.add("feedback_window", "confidence", name, by=sign * entry.confidence)


@dataclass
class Feedback:
    """The true label of one image of an earlier request."""

    request_id: str
    label: str
    image: int  # position in the request, from 0


def parse_feedback(content: bytes) -> Feedback:
    """Parse `{"id": "…", "label": "…", "image": 0}`; `image` may be left out.

    Raises Problem 400.
    """
    try:
        members = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Problem(400, "the body is not JSON") from error

    usage = 'send {"id": "<id of the answer>", "label": "<true class>"}'
    if not isinstance(members, dict):
        raise Problem(400, usage)
    request_id = members.get("id")
    label = members.get("label")
    image = members.get("image", 0)

    if not isinstance(request_id, str) or not isinstance(label, str):
        raise Problem(400, usage)
    if type(image) is not int or not 0 <= image <= MAX_IMAGE_INDEX:
        raise Problem(400, "image must be the position in the request, from 0")
    try:
        request_id.encode()
    except UnicodeEncodeError as error:
        raise Problem(400, "the id is not valid text") from error
    return Feedback(request_id, label, image)
