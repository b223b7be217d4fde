"""Selects images to keep, in a worker process, after their answers have been sent.

`Keeper` observes completed batches. It selects images that abstain, are out of distribution, or are
drawn at random, and holds the last ones in memory for a while: a label that a client sends, or the
shadow version, may select one of them later. What is selected goes to the thread of
`serve.worker.kept_writer` through a bounded queue. If the queue is full, the image is dropped and
counted, so no answer ever waits for a disk or a bucket.
"""

import os
import random
import socket
import threading
from collections import OrderedDict

from models.kept import Reason
from models.kept.records import now
from serve.metrics.shared_counters import SharedCounters
from serve.settings import Settings
from serve.wire import FORGET, TENSOR, Job
from serve.worker.batch import CompletedBatch
from serve.worker.kept_writer import Candidate, KeptWriter, Selection

RECENT_BYTES = 64 << 20  # of the last images, held in memory
RECENT_IMAGES = 10_000
NAME_BYTES = 256  # of a datagram of the shadow process


def build_socket_path(run_directory: str, worker: int) -> str:
    """Return the path of the socket on which a worker gets the names of images to keep."""
    return os.path.join(run_directory, f"keep-{worker}.sock")


class Keeper:
    """Selects images for one worker. An observer of completed batches; threads may share it."""

    def __init__(
        self, settings: Settings, run_directory: str, worker: int, counters: SharedCounters
    ):
        """`counters` belong to this keeper. Raises KeptError for a location that can't be used."""
        self.share = settings.keep_share
        self.random = random.Random()
        self.writer = KeptWriter(settings, counters)
        self.recent: OrderedDict[bytes, Candidate] = OrderedDict()
        self.recent_bytes = 0
        self.recent_lock = threading.Lock()
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
        confidences = probabilities.max(1).tolist()
        lowest_confidence = model.composer.lowest_answered_confidence
        energy_threshold = model.composer.energy_threshold
        time = now()
        # What an image takes in memory besides its file.
        row_bytes = probabilities[0].nbytes
        if embeddings is not None:
            row_bytes += embeddings[0].nbytes

        candidates: list[Candidate] = []
        for i, queued in enumerate(batch.jobs):
            job = queued.job
            if not job.name or job.flags & TENSOR:
                continue
            energy = energies.item(i)
            candidate = Candidate(
                job.name,
                job.body,
                time,
                model,
                probabilities[i],
                energy,
                None if embeddings is None else embeddings[i],
                row_bytes + len(job.body),
            )
            candidates.append(candidate)

            reasons: list[Reason] = []
            if confidences[i] < lowest_confidence:
                reasons.append(Reason.ABSTAIN)
            if energy_threshold is not None and energy > energy_threshold:
                reasons.append(Reason.OUT_OF_DISTRIBUTION)
            if self.random.random() < self.share:
                reasons.append(Reason.RANDOM)
            if reasons:
                # A copy, since a view would hold the whole batch.
                self.writer.submit(Selection(candidate, reasons, batch.pixels[i].copy()))
        self._remember(candidates)

    def on_notice(self, job: Job) -> None:
        """Handle what an HTTP process tells about an earlier image: its label, or its deletion."""
        if job.flags & FORGET:
            self._forget(job.name)
            return
        candidate = self.recent.get(job.name)
        if candidate is None:
            return
        label = job.body.decode()
        is_correct = candidate.predicted_label() == label
        reasons = [] if is_correct else [Reason.CORRECTED]
        self.writer.submit(Selection(candidate, reasons, label=label))

    def _remember(self, candidates: list[Candidate]) -> None:
        """Hold images in memory, in place of the oldest ones."""
        with self.recent_lock:
            for candidate in candidates:
                previous = self.recent.pop(candidate.name, None)
                if previous is not None:
                    self.recent_bytes -= previous.memory_bytes
                self.recent[candidate.name] = candidate
                self.recent_bytes += candidate.memory_bytes
            while self.recent_bytes > RECENT_BYTES or len(self.recent) > RECENT_IMAGES:
                _, oldest = self.recent.popitem(last=False)
                self.recent_bytes -= oldest.memory_bytes

    def _forget(self, request_id: bytes) -> None:
        """Drop all images of a request, also those that wait to be written."""
        prefix = request_id + b" "
        with self.recent_lock:
            for name in list(self.recent):
                if name == request_id or name.startswith(prefix):
                    candidate = self.recent.pop(name)
                    candidate.is_forgotten = True
                    self.recent_bytes -= candidate.memory_bytes

    def _receive_names(self, receiver: socket.socket) -> None:
        """Select the images on which the shadow version gave another label, until the end."""
        while True:
            candidate = self.recent.get(receiver.recv(NAME_BYTES))
            if candidate is not None:
                self.writer.submit(Selection(candidate, [Reason.SHADOW]))
