"""Writes selected images to the directory or bucket of `--keep`, in a thread of a worker.

The thread bounds what it writes (files a day for each reason, bytes, free space of the disk) and
its pace. Where the disk is full or the bucket can't be reached, it tries again after growing
pauses; in the meantime the queue fills, and further images are dropped and counted.
"""

import base64
import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from models.image import ImageError, read_header
from models.image.metadata import strip_metadata
from models.kept import KeptImage, Label, Reason, TopClass, Verdict, open_kept
from models.kept.folder import build_file_path
from models.kept.records import ModelVersion, now
from models.kept.similarity import NearDuplicates, compute_hash
from serve import logs
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model
from serve.settings import Settings
from serve.wire import parse_image_name

QUEUED_IMAGES = 64
LISTED_CLASSES = 5
MAX_LINES = 16  # of one image that many requests send, unless one adds a reason or is drawn
MAX_FLOAT16 = 65504.0
# After each image the thread rests for this many times as long as it took: it uses little of a core
# and of the disk.
REST_FACTOR = 4
MAX_REST_SECONDS = 1.0
RECOUNT_SECONDS = 600.0  # other processes may write to the directory as well
FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 60.0
FEEDBACK = "feedback"  # who gave a label, for labels of clients

# Only these reasons stand for a kind of image, of which one is enough. The others count each image.
REASONS_WITHOUT_NEAR_DUPLICATES = frozenset((Reason.ABSTAIN, Reason.OUT_OF_DISTRIBUTION))


@dataclass(slots=True, eq=False)
class Candidate:
    """An answered image that may be kept."""

    name: bytes  # of serve.wire.build_image_name
    body: bytes  # the image file
    time: datetime  # of the answer
    model: Model
    probabilities: np.ndarray  # [K]
    energy: float
    embedding: np.ndarray | None  # [D]
    memory_bytes: int  # about
    digest: str = ""  # once it is kept
    is_forgotten: bool = False  # its deletion was asked for

    def predicted_label(self) -> str:
        """Return the class that was answered."""
        return self.model.manifest.classes[int(self.probabilities.argmax())]


class Selection(NamedTuple):
    """A candidate, and why it is to be kept."""

    candidate: Candidate
    reasons: list[Reason]  # empty: add the label if the image is kept
    pixels: np.ndarray | None = None  # uint8 [H, W, C], as the network took them
    label: str | None = None  # that a client sent


Appearance: TypeAlias = tuple[int, np.ndarray]  # hash of the pixels, and embedding [D] or empty


@dataclass
class KnownImage:
    """An image whose file is there."""

    path: str
    reasons: set[Reason] = field(default_factory=set)  # for which this process has kept it
    lines: int = 0  # that this process has added


@dataclass
class Usage:
    """What is kept, as far as this process knows."""

    images: dict[str, KnownImage] = field(default_factory=dict)  # by digest
    bytes: int = 0
    day: date = date.min
    files_today: Counter[Reason] = field(default_factory=Counter)  # of this process


class KeptWriter:
    """The thread and its queue."""

    def __init__(self, settings: Settings, counters: SharedCounters):
        """Raises KeptError for a location that can't be used."""
        self.settings = settings
        self.folder = open_kept(settings.keep)
        self.counters = counters
        self.count_lock = threading.Lock()  # threads share the counters
        self.queue: queue.Queue[Selection] = queue.Queue(QUEUED_IMAGES)
        self.usage = Usage()
        self.near_duplicates = NearDuplicates()
        self.next_recount = 0.0
        # Workers write independently of one another, so each gets a part of what is allowed.
        self.files_a_day = -(-settings.keep_files // settings.workers)
        self.is_finishing = threading.Event()
        for reason in Reason:
            counters.slot("kept", reason.value)
        counters.slot("kept_bytes")

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="kept-writer", daemon=True).start()

    def submit(self, selection: Selection) -> None:
        """Queue a selection, or drop it. Returns at once."""
        try:
            self.queue.put_nowait(selection)
        except queue.Full:
            self._count("kept_dropped", "queue")

    def finish(self, timeout_seconds: float) -> None:
        """Write what is queued without rests, for at most this time."""
        self.is_finishing.set()
        end = time.monotonic() + timeout_seconds
        while self.queue.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.01)

    def _count(self, name: str, *labels: str) -> None:
        with self.count_lock:
            self.counters.add(name, *labels)

    def _run(self) -> None:
        """Write selections until the process ends."""
        while True:
            try:
                selection = self.queue.get(timeout=RECOUNT_SECONDS)
            except queue.Empty:
                selection = None
            started = time.monotonic()
            self._retry(self._recount_if_due)
            if selection is None:
                continue

            try:
                self._keep(selection)
            except Exception:
                logs.logger.exception("an image was not kept")
                self._count("kept_dropped", "error")
            self.queue.task_done()
            rest = REST_FACTOR * (time.monotonic() - started)
            self.is_finishing.wait(min(rest, MAX_REST_SECONDS))

    def _retry(self, write: Callable[[], None]) -> None:
        """Call a function until it raises no OSError, with growing pauses; once at the end."""
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                write()
                return
            except OSError as error:
                self._count("kept_dropped", "error")
                reason = error.strerror or str(error)
                logs.logger.warning(
                    "%s: images are not kept: %s; trying again", self.folder.location, reason
                )
            if self.is_finishing.is_set():
                return
            self.is_finishing.wait(pause)
            pause = min(2 * pause, LAST_RETRY_SECONDS)

    # What is kept

    def _recount_if_due(self) -> None:
        """Read what is kept, also by other processes, and delete what is too old."""
        if time.monotonic() < self.next_recount:
            return
        self.folder.delete_leftovers()
        if self.settings.keep_days:
            self.folder.delete_older(self.settings.keep_days)
        known = self.usage.images
        self.usage.images = {
            digest: known.get(digest, KnownImage(path))
            for digest, path in self.folder.list_image_files().items()
        }
        self._set_bytes(self.folder.count_bytes())
        self.next_recount = time.monotonic() + RECOUNT_SECONDS

    def _set_bytes(self, size: int) -> None:
        self.usage.bytes = size
        with self.count_lock:
            self.counters.set("kept_bytes", to=size)

    # One image

    def _keep(self, selection: Selection) -> None:
        """Keep an image, or count why it is not kept."""
        candidate = selection.candidate
        if candidate.is_forgotten:
            return
        reasons = self._choose_allowed(selection.reasons)
        if not reasons and selection.reasons:
            self._count("kept_dropped", "limit")
            return
        if reasons:
            self._retry(partial(self._keep_image, selection, reasons))
        if selection.label is not None and candidate.digest:
            label = self._build_label(candidate.digest, selection.label)
            self._retry(partial(self.folder.add_labels, [label]))

    def _choose_allowed(self, reasons: list[Reason]) -> list[Reason]:
        """Return the reasons for which more images may be kept today."""
        today = now().date()
        if today != self.usage.day:
            self.usage.day = today
            self.usage.files_today.clear()
        counts = self.usage.files_today
        return [reason for reason in reasons if counts[reason] < self.files_a_day]

    def _keep_image(self, selection: Selection, reasons: list[Reason]) -> None:
        """Write the file and the line, or count why not. Raises OSError."""
        candidate = selection.candidate
        try:
            content = self._read_content(candidate)
        except ImageError:
            self._count("kept_dropped", "metadata")
            return

        digest = hashlib.sha256(content).hexdigest()
        known = self.usage.images.get(digest)
        if known is not None and self.folder.has_file(known.path):
            self._keep_again(candidate, digest, known, content, reasons)
            return
        appearance = describe_appearance(selection)
        if appearance is not None and self._is_near_duplicate(appearance, reasons):
            self._count("kept_dropped", "duplicate")
            return
        problem = self._find_full(len(content))
        if problem:
            self._count("kept_dropped", problem)
            return
        path = build_file_path(digest, read_header(content).format, candidate.time.date())
        image = self._describe(candidate, digest, path, content, reasons)
        self.folder.add_image(image, content)
        candidate.digest = digest
        if appearance is not None:
            self.near_duplicates.add(*appearance)
        self.usage.images[digest] = KnownImage(path, set(reasons), lines=1)
        self._set_bytes(self.usage.bytes + len(content))
        self._count_kept(reasons)

    def _keep_again(
        self,
        candidate: Candidate,
        digest: str,
        known: KnownImage,
        content: bytes,
        reasons: list[Reason],
    ) -> None:
        """Add a line to an image whose file is there: another request, reason or random draw."""
        candidate.digest = digest
        counted = [reason for reason in reasons if reason not in known.reasons]
        if Reason.RANDOM in reasons and Reason.RANDOM not in counted:
            counted.append(Reason.RANDOM)
        if not counted and known.lines >= MAX_LINES:
            self._count("kept_dropped", "duplicate")
            return

        image = self._describe(candidate, digest, known.path, content, reasons)
        self.folder.add_image(image, None)
        known.reasons.update(reasons)
        known.lines += 1
        if counted:
            self._count_kept(counted)
        else:
            self._count("kept_dropped", "duplicate")

    def _count_kept(self, reasons: list[Reason]) -> None:
        for reason in reasons:
            self.usage.files_today[reason] += 1
            self._count("kept", reason.value)

    def _read_content(self, candidate: Candidate) -> bytes:
        """Return the bytes that are stored. Raises ImageError if metadata can't be taken out."""
        if not self.settings.keep_strip_exif:
            return candidate.body
        spec = candidate.model.manifest.input
        return strip_metadata(candidate.body, spec, self.settings.max_pixels)

    def _find_full(self, size: int) -> str | None:
        """Return which bound does not allow `size` more bytes, None if all do."""
        if self.usage.bytes + size > self.settings.keep_bytes:
            return "limit"
        free_bytes = self.folder.files.count_free_bytes()
        if free_bytes is not None and free_bytes - size < self.settings.keep_free_bytes:
            return "disk"
        return None

    def _is_near_duplicate(self, appearance: Appearance, reasons: list[Reason]) -> bool:
        """Whether an image is nearly the same as one that is kept, and has no other reason."""
        if not REASONS_WITHOUT_NEAR_DUPLICATES.issuperset(reasons):
            return False
        return self.near_duplicates.has_near(*appearance)

    def _describe(
        self, candidate: Candidate, digest: str, path: str, content: bytes, reasons: list[Reason]
    ) -> KeptImage:
        """Return the line of an image."""
        request_id, index = parse_image_name(candidate.name)
        header = read_header(content)
        model = candidate.model
        is_drawn = Reason.RANDOM in reasons
        return KeptImage(
            digest=digest,
            file=path,
            request_id=request_id,
            image=index,
            time=candidate.time,
            model=ModelVersion(name=model.name, version=model.version),
            top=list_top_classes(candidate.probabilities, model.manifest.classes),
            energy=candidate.energy,
            reasons=reasons,
            probability=self.settings.keep_share if is_drawn else None,
            width=header.width,
            height=header.height,
            embedding=encode_embedding(candidate.embedding),
        )

    def _build_label(self, digest: str, label: str) -> Label:
        return Label(digest=digest, verdict=Verdict.CLASS, label=label, who=FEEDBACK, time=now())


def describe_appearance(selection: Selection) -> Appearance | None:
    """Return what near duplicates are found by, None for an image whose pixels are gone."""
    if selection.pixels is None:
        return None
    embedding = selection.candidate.embedding
    if embedding is None:
        embedding = np.zeros(0, np.float32)
    return compute_hash(selection.pixels), embedding


def list_top_classes(probabilities: np.ndarray, classes: list[str]) -> list[TopClass]:
    """Return the most likely classes of probabilities [K], in descending order."""
    order = (-probabilities).argsort(kind="stable")[:LISTED_CLASSES].tolist()
    return [
        TopClass(label=classes[i], index=i, confidence=min(probabilities.item(i), 1.0))
        for i in order
    ]


def encode_embedding(embedding: np.ndarray | None) -> str:
    """Encode an embedding, float32 [D], as little-endian float16 in base64."""
    if embedding is None:
        return ""
    halves = np.clip(embedding, -MAX_FLOAT16, MAX_FLOAT16).astype("<f2")
    return base64.b64encode(halves.tobytes()).decode()
