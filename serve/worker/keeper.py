"""Selects images to keep, in a worker process, after their answers have been sent.

`Keeper` observes completed batches. It selects images that abstain, are out of distribution, or are
drawn at random, and holds the last ones in memory for a while: a label that a client sends, or the
shadow version, may select one of them later. What is selected goes to the thread of
`serve.worker.kept_writer` through a bounded queue. If the queue is full, the image is dropped and
counted, so no answer ever waits for a disk or a bucket. What each image costs here delays the next
batch, so images share what they can.
"""

import math
import os
import random
import socket
import threading

from models.kept import Reason
from models.kept.records import now
from serve.metrics.shared_counters import SharedCounters
from serve.settings import Settings
from serve.wire import FORGET, TENSOR, Job
from serve.worker.batch import CompletedBatch
from serve.worker.kept_writer import AnsweredBatch, Candidate, KeptWriter, Selection

# Of each of the two generations of `RecentImages`.
RECENT_BYTES = 32 << 20
RECENT_IMAGES = 5000
NAME_BYTES = 256  # of a datagram of the shadow process


def build_socket_path(run_directory: str, worker: int) -> str:
    """Return the path of the socket on which a worker gets the names of images to keep."""
    return os.path.join(run_directory, f"keep-{worker}.sock")


class RecentImages:
    """The last images of a worker by name, within bounds. Threads may share it.

    They are in two generations: when the newer one is full, it replaces the older one. So no image
    has to be removed by itself.
    """

    def __init__(self) -> None:
        self.newer: dict[bytes, Candidate] = {}
        self.older: dict[bytes, Candidate] = {}
        self.newer_bytes = 0  # about
        self.lock = threading.Lock()

    def get(self, name: bytes) -> Candidate | None:
        """Return an image, None if it is not there."""
        return self.newer.get(name) or self.older.get(name)

    def add(self, candidates: list[Candidate], extra_bytes: int) -> None:
        """Add images. Each takes `extra_bytes` in memory besides its file."""
        with self.lock:
            for candidate in candidates:
                size = len(candidate.job.body) + extra_bytes
                if size > RECENT_BYTES:
                    continue
                if self.newer_bytes + size > RECENT_BYTES or len(self.newer) >= RECENT_IMAGES:
                    self.older = self.newer
                    self.newer = {}
                    self.newer_bytes = 0
                self.newer[candidate.job.name] = candidate
                self.newer_bytes += size

    def forget(self, request_id: bytes) -> None:
        """Drop all images of a request, also those that wait to be written."""
        prefix = request_id + b" "
        with self.lock:
            for images in (self.newer, self.older):
                for name in list(images):
                    if name == request_id or name.startswith(prefix):
                        images.pop(name).is_forgotten = True


class Keeper:
    """Selects images for one worker. An observer of completed batches; threads may share it."""

    def __init__(
        self, settings: Settings, run_directory: str, worker: int, counters: SharedCounters
    ):
        """`counters` belong to this keeper. Raises KeptError for a location that can't be used."""
        self.share = settings.keep_share
        self.random = random.Random()
        self.writer = KeptWriter(settings, counters)
        self.recent = RecentImages()
        self.socket_path = build_socket_path(run_directory, worker)

    def start(self) -> None:
        """Start the threads."""
        self.writer.start()
        if os.path.exists(self.socket_path):
            os.unlink(self.socket_path)  # left by a worker that crashed
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.bind(self.socket_path)
        threading.Thread(
            target=self._receive_names, args=(receiver,), name="keeper", daemon=True
        ).start()

    def finish(self, timeout_seconds: float) -> None:
        """Write what is selected, for at most this time."""
        self.writer.finish(timeout_seconds)

    def __call__(self, batch: CompletedBatch) -> None:
        """Select images of a batch."""
        model = batch.model
        probabilities = batch.outputs[0]
        energies = batch.outputs[1]
        embeddings = batch.outputs[-1] if model.has_embeddings else None
        answered = AnsweredBatch(model, now(), probabilities, energies, embeddings)
        row_bytes = sum(output.nbytes for output in batch.outputs) // len(batch.jobs)
        lowest_confidence = model.composer.lowest_answered_confidence
        highest_energy = model.composer.energy_threshold
        if highest_energy is None:
            highest_energy = math.inf

        candidates: list[Candidate] = []
        numbers = zip(probabilities.max(1).tolist(), energies.tolist(), strict=True)
        for row, (confidence, energy) in enumerate(numbers):
            job = batch.jobs[row].job
            if not job.name or job.flags & TENSOR:
                continue
            candidate = Candidate(job, answered, row)
            candidates.append(candidate)

            reasons: list[Reason] = []
            if confidence < lowest_confidence:
                reasons.append(Reason.ABSTAIN)
            if energy > highest_energy:
                reasons.append(Reason.OUT_OF_DISTRIBUTION)
            if self.random.random() < self.share:
                reasons.append(Reason.RANDOM)
            if reasons:
                self.writer.submit(Selection(candidate, reasons, batch.pixels[row]))
        self.recent.add(candidates, row_bytes)

    def on_notice(self, job: Job) -> None:
        """Handle what an HTTP process tells about an earlier image: its label, or its deletion."""
        if job.flags & FORGET:
            self.recent.forget(job.name)
            return
        candidate = self.recent.get(job.name)
        if candidate is None:
            return
        label = job.body.decode()
        is_correct = candidate.predicted_label() == label
        reasons = [] if is_correct else [Reason.CORRECTED]
        self.writer.submit(Selection(candidate, reasons, label=label))

    def _receive_names(self, receiver: socket.socket) -> None:
        """Select the images on which the shadow version gave another label, until the end."""
        while True:
            candidate = self.recent.get(receiver.recv(NAME_BYTES))
            if candidate is not None:
                self.writer.submit(Selection(candidate, [Reason.SHADOW]))
