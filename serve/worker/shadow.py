"""Shadow: a second version gets a share of the traffic, and its answers are compared and counted.

It runs in a separate process, which only gets idle CPU time. A worker sends it an image after the
answer has left, without waiting, and only while no other job waits or runs. If the socket
is full, the image is dropped. An image that is too large for a datagram is not sent. So the second
version may be slow, hang or crash without delaying an answer.

`ShadowSender` runs in worker processes, `run_shadow` is the main function of the shadow process.
"""

import contextlib
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

from models.image import decode
from serve import logs
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model, open_bundle
from serve.prediction import are_finite
from serve.settings import Settings
from serve.wire import TENSOR
from serve.worker.batch import CompletedBatch
from serve.worker.batcher import Batcher
from serve.worker.exit_status import MODEL_UNUSABLE
from serve.worker.keeper import build_socket_path

SOCKET_NAME = "shadow.sock"
# A datagram: the confidence and the label that the client got, the name of the image, its file.
# The name is empty if the service keeps no images.
DATAGRAM_HEAD = struct.Struct("<fHHH")  # confidence, bytes of label and of name, worker
MAX_IMAGE_BYTES = 192 << 10  # fits in a datagram with Linux's default of net.core.wmem_max
SEND_BUFFER_BYTES = 1 << 20
RECEIVE_BYTES = 1 << 20
PARENT_CHECK_SECONDS = 5.0


class ShadowSender:
    """Sends a share of the images to the shadow process. An observer of completed batches."""

    def __init__(
        self,
        run_directory: str,
        worker: int,
        share: float,
        batcher: Batcher,
        counters: SharedCounters,
    ):
        """`worker` is the number of this process."""
        self.worker = worker
        self.path = os.path.join(run_directory, SOCKET_NAME)
        self.share = share
        self.batcher = batcher
        self.counters = counters
        self.count_lock = threading.Lock()  # predictors share the counters
        self.random = random.Random(0)

        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def __call__(self, batch: CompletedBatch) -> None:
        """Send a share of the images of a batch, each with the answer that its client got."""
        for queued, probabilities in zip(batch.jobs, batch.outputs[0], strict=True):
            job = queued.job
            if self.random.random() >= self.share or job.flags & TENSOR:
                continue
            if len(job.body) > MAX_IMAGE_BYTES:
                self._count("too_large")
                continue
            if self.batcher.has_other_work():
                self._count("dropped")
                continue

            index = int(probabilities.argmax())
            label = batch.model.manifest.classes[index].encode()
            head = DATAGRAM_HEAD.pack(probabilities[index], len(label), len(job.name), self.worker)
            try:
                self.socket.sendto(head + label + job.name + job.body, self.path)
            except OSError:  # the shadow process is busy, starts or is dead
                self._count("dropped")

    def _count(self, outcome: str) -> None:
        with self.count_lock:
            self.counters.add("shadow_images", outcome)


def run_shadow(settings: Settings, version: int, run_directory: str) -> None:
    """Load the second version and compare images until the process that started this one ends."""
    parent_pid = os.getppid()
    # Ctrl+C reaches the whole process group; only the supervisor ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    logs.configure(settings)

    try:
        single = settings.model_copy(update={"max_batch_size": 1})
        model = Model(open_bundle(settings, version), single, threads=1)
    except ValueError as error:  # includes BundleError
        logs.logger.error("shadow version not loaded: %s", error)
        sys.exit(MODEL_UNUSABLE)
    counters = SharedCounters(os.path.join(run_directory, "shadow.metrics"))
    counters.set("shadow_info", model.name, str(model.version), model.variant, to=1)

    path = os.path.join(run_directory, SOCKET_NAME)
    if os.path.exists(path):
        os.unlink(path)  # left by a shadow process that crashed
    request_keep = KeepRequester(run_directory)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        receiver.settimeout(PARENT_CHECK_SECONDS)
        fields = {"version": model.version, "variant": model.variant}
        logs.logger.info("shadow ready", extra={"fields": fields})
        while os.getppid() == parent_pid:
            try:
                datagram = receiver.recv(RECEIVE_BYTES)
            except TimeoutError:
                continue
            compare(datagram, model, settings.max_pixels, counters, request_keep)


class KeepRequester:
    """Asks workers to keep images on which the two versions disagree."""

    def __init__(self, run_directory: str):
        self.run_directory = run_directory
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)

    def __call__(self, worker: int, name: bytes) -> None:
        """Ask the worker that answered the image `name`. A busy worker does not keep it."""
        with contextlib.suppress(OSError):
            self.socket.sendto(name, build_socket_path(self.run_directory, worker))


def compare(
    datagram: bytes,
    model: Model,
    max_pixels: int,
    counters: SharedCounters,
    request_keep: Callable[[int, bytes], None],
) -> None:
    """Predict one image, compare with the answer that the client got, and count the outcome.

    `request_keep` is called with the worker and the name of an image with another label.
    """
    confidence, label_length, name_length, worker = DATAGRAM_HEAD.unpack_from(datagram)
    name_start = DATAGRAM_HEAD.size + label_length
    image_start = name_start + name_length
    label = datagram[DATAGRAM_HEAD.size : name_start].decode()
    name = datagram[name_start:image_start]

    start = time.perf_counter()
    try:
        pixels = decode(datagram[image_start:], model.manifest.input, max_pixels)
        outputs = model.engine.run(pixels[None], ("probabilities",), use_all_threads=False)
        if not are_finite(outputs):
            raise ValueError("its outputs are NaN or infinite")
    except Exception as error:  # an ImageError, or an exception of any kind from the engine
        counters.add("shadow_images", "failed")
        logs.logger.info("the shadow version failed on an image: %s", error)
        return
    counters.observe("shadow_seconds", time.perf_counter() - start)

    probabilities = outputs[0][0]
    index = int(np.argmax(probabilities))
    agrees = model.manifest.classes[index] == label
    counters.add("shadow_images", "agree" if agrees else "disagree")
    if name and not agrees:
        request_keep(worker, name)
    difference = abs(float(probabilities[index]) - confidence)
    counters.observe("shadow_confidence_difference", difference)
