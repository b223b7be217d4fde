"""Writes selected images to the directory or bucket of `--keep`, in a thread of a worker.

The thread bounds what it writes (files a day for each reason, bytes, free space of the disk) and
its CPU time, since it shares the cores and the interpreter with the predictors. What is beyond
the limit of the day, or does not fit in the queue, is dropped before it is copied. Where the disk
is full or the bucket can't be reached, it tries again after growing
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
from models.kept.folder import build_file_path, select_image_files
from models.kept.records import ModelVersion, now
from models.kept.similarity import NearDuplicates, compute_hash
from serve import logs
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model
from serve.settings import Settings
from serve.wire import Job, parse_image_name

QUEUED_IMAGES = 64
# Of them doubtful ones, of which there may be many: the rest is for images drawn at random, which
# stand for all traffic, and for labels.
QUEUED_DOUBTFUL_IMAGES = 32
LISTED_CLASSES = 5
MAX_LINES = 16  # of one image that many requests send, unless one adds a reason or is drawn
MAX_FLOAT16 = 65504.0
# After each image the thread rests for this many times as long as it took, which spares the disk.
REST_FACTOR = 4
MAX_REST_SECONDS = 1.0
# What the thread uses of a core, on average and at once after a quiet time.
CPU_SHARE = 0.01
BURST_CPU_SECONDS = 0.2
RECOUNT_SECONDS = 600.0  # other processes may write to the directory as well
FIRST_RETRY_SECONDS = 0.5
LAST_RETRY_SECONDS = 60.0
FEEDBACK = "feedback"  # who gave a label, for labels of clients

# Only these reasons stand for a kind of image, of which one is enough. The others count each image.
REASONS_WITHOUT_NEAR_DUPLICATES = frozenset((Reason.ABSTAIN, Reason.OUT_OF_DISTRIBUTION))


class AnsweredBatch(NamedTuple):
    """What the images of one batch share, so that an image needs no objects of its own for it."""

    model: Model
    time: datetime  # of the answers
    probabilities: np.ndarray  # [N, K]
    energies: np.ndarray  # [N]
    embeddings: np.ndarray | None  # [N, D]


@dataclass(slots=True, eq=False)
class Candidate:
    """An answered image that may be kept."""

    job: Job  # with the name and the image file
    batch: AnsweredBatch
    row: int  # of the batch
    digest: str = ""  # once it is kept
    is_forgotten: bool = False  # its deletion was asked for

    def predicted_label(self) -> str:
        """Return the class that was answered."""
        probabilities = self.batch.probabilities[self.row]
        return self.batch.model.manifest.classes[int(probabilities.argmax())]

    def copy_embedding(self) -> np.ndarray | None:
        """Return the embedding [D], which does not hold those of the whole batch in memory."""
        embeddings = self.batch.embeddings
        return None if embeddings is None else embeddings[self.row].copy()


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


class CpuBudget:
    """Limits the CPU time of a thread to a share of a core, apart from bursts."""

    def __init__(self, share: float, burst_seconds: float, now: float):
        """`now` is in seconds of time.monotonic()."""
        self.share = share
        self.burst_seconds = burst_seconds
        self.credit_seconds = burst_seconds
        self.updated = now

    def spend(self, cpu_seconds: float, now: float) -> float:
        """Return for how many seconds the thread has to rest after it used `cpu_seconds`."""
        earned = self.share * (now - self.updated)
        self.updated = now
        self.credit_seconds = min(self.credit_seconds + earned, self.burst_seconds) - cpu_seconds
        return max(0.0, -self.credit_seconds / self.share)


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
        self.day_of_deletion = date.min  # when images that are too old were deleted last
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
        """Queue a selection, or drop it and count why. Returns at once."""
        if self._is_beyond_limit(selection):
            self._count("kept_dropped", "limit")
            return
        if not self._has_room(selection.reasons):
            self._count("kept_dropped", "queue")
            return
        if selection.pixels is not None:
            # A copy, since a view would hold the whole batch.
            selection = selection._replace(pixels=selection.pixels.copy())
        try:
            self.queue.put_nowait(selection)
        except queue.Full:  # another predictor was faster
            self._count("kept_dropped", "queue")

    def _is_beyond_limit(self, selection: Selection) -> bool:
        """Whether no more images are kept today for any of the reasons.

        Only the thread starts a new day, so an image of another day is left to it.
        """
        if not selection.reasons or selection.candidate.batch.time.date() != self.usage.day:
            return False
        return not self._choose_allowed(selection.reasons)

    def _has_room(self, reasons: list[Reason]) -> bool:
        is_doubtful = bool(reasons) and REASONS_WITHOUT_NEAR_DUPLICATES.issuperset(reasons)
        return self.queue.qsize() < (QUEUED_DOUBTFUL_IMAGES if is_doubtful else QUEUED_IMAGES)

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
        budget = CpuBudget(CPU_SHARE, BURST_CPU_SECONDS, time.monotonic())
        while True:
            try:
                selection = self.queue.get(timeout=RECOUNT_SECONDS)
            except queue.Empty:
                selection = None
            self._retry(self._recount_if_due)
            if selection is None:
                continue

            started = time.monotonic()
            cpu_before = time.thread_time()
            try:
                self._keep(selection)
            except Exception:
                logs.logger.exception("an image was not kept")
                self._count("kept_dropped", "error")
            self.queue.task_done()

            ended = time.monotonic()
            rest = min(REST_FACTOR * (ended - started), MAX_REST_SECONDS)
            budget_rest = budget.spend(time.thread_time() - cpu_before, ended)
            self.is_finishing.wait(max(rest, budget_rest))

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
        today = now().date()
        if self.settings.keep_days and today != self.day_of_deletion:
            self.folder.delete_older(self.settings.keep_days)
            self.day_of_deletion = today

        files = self.folder.files.list_files()
        known = self.usage.images
        self.usage.images = {
            digest: known.get(digest, KnownImage(path))
            for digest, path in select_image_files(files).items()
        }
        self._set_bytes(sum(size for _, size in files))
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
        self._start_day()
        reasons = self._choose_allowed(selection.reasons)
        if not reasons and selection.reasons:
            self._count("kept_dropped", "limit")
            return
        if reasons:
            self._retry(partial(self._keep_image, selection, reasons))
        if selection.label is not None and candidate.digest:
            label = self._build_label(candidate.digest, selection.label)
            self._retry(partial(self.folder.add_labels, [label]))

    def _start_day(self) -> None:
        """Count from 0 if a new day has begun."""
        today = now().date()
        if today != self.usage.day:
            self.usage.files_today.clear()
            self.usage.day = today

    def _choose_allowed(self, reasons: list[Reason]) -> list[Reason]:
        """Return the reasons for which more images may be kept today."""
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
        path = build_file_path(digest, read_header(content).format, candidate.batch.time.date())
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
            return candidate.job.body
        spec = candidate.batch.model.manifest.input
        return strip_metadata(candidate.job.body, spec, self.settings.max_pixels)

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
        request_id, index = parse_image_name(candidate.job.name)
        header = read_header(content)
        batch = candidate.batch
        model = batch.model
        is_drawn = Reason.RANDOM in reasons
        return KeptImage(
            digest=digest,
            file=path,
            request_id=request_id,
            image=index,
            time=batch.time,
            model=ModelVersion(name=model.name, version=model.version),
            top=list_top_classes(batch.probabilities[candidate.row], model.manifest.classes),
            energy=batch.energies.item(candidate.row),
            reasons=reasons,
            probability=self.settings.keep_share if is_drawn else None,
            width=header.width,
            height=header.height,
            embedding=encode_embedding(candidate.copy_embedding()),
        )

    def _build_label(self, digest: str, label: str) -> Label:
        return Label(digest=digest, verdict=Verdict.CLASS, label=label, who=FEEDBACK, time=now())


def describe_appearance(selection: Selection) -> Appearance | None:
    """Return what near duplicates are found by, None for an image whose pixels are gone."""
    if selection.pixels is None:
        return None
    embedding = selection.candidate.copy_embedding()
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
