"""Shadow: a share of traffic goes to a second version too, in a process of its own that only gets idle time.

A worker hands over an image after its answer has left, without waiting, and only while nothing waits for it; what finds
no room is dropped, and what no datagram holds is left out. So the second version can be slow, hang or crash, and no
answer is later for it.
"""

import os
import random
import signal
import socket
import struct
import sys
import threading
import time

import numpy as np

from models.bundle import BundleError
from models.image import decode
from models.store import Store
from serve import logs
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model
from serve.settings import Settings
from serve.wire import TENSOR
from serve.worker.batcher import Backlog

SOCKET = "shadow.sock"
_HEAD = struct.Struct("<fH")  # confidence, bytes of the label
MAX_BYTES = (
    192 << 10
)  # of an image: what a datagram is sure to hold with Linux's default of wmem_max
PARENT_SECONDS = 5.0
UNUSABLE = 2  # exit status of a process that can't load its version; another would not either


class Shadow:
    """The worker's side: an observer of batches."""

    def __init__(self, run: str, share: float, backlog: Backlog, counters: SharedCounters):
        self.path, self.share, self.backlog, self.counters = (
            os.path.join(run, SOCKET),
            share,
            backlog,
            counters,
        )
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.random, self.lock = random.Random(0), threading.Lock()

    def __call__(self, batch) -> None:
        for waiting, row in zip(batch.waiting, batch.outputs[0], strict=True):
            if self.random.random() >= self.share or waiting.job.flags & TENSOR:
                continue
            index = int(row.argmax())
            label = batch.model.manifest.classes[index].encode()
            if len(waiting.job.body) > MAX_BYTES:
                self.count("too_large")
                continue
            try:
                if self.busy():
                    raise BlockingIOError
                self.socket.sendto(
                    _HEAD.pack(row[index], len(label)) + label + waiting.job.body, self.path
                )
            except OSError:  # busy, full, starting or dead: all the same to us
                self.count("dropped")

    def count(self, outcome: str) -> None:
        with self.lock:
            self.counters.add("shadow_images", outcome)

    def busy(self) -> bool:
        """Whether an image waits, or another predictor than the one that calls has work."""
        return bool(self.backlog.queue) or self.backlog.free < self.backlog.predictors - 1


def serve(settings: Settings, version: int, run: str) -> None:
    """The second version's process: take, decode, run, compare, count, until the supervisor is gone."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # which may reach the whole group; the supervisor alone ends this
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    logs.configure(settings)
    parent = os.getppid()
    try:
        bundle = Store(settings.store).open(settings.model, version)
        model = Model(bundle, settings.model_copy(update={"max_batch_size": 1}), 1)
    except (BundleError, ValueError) as error:
        logs.logger.error("no shadow: %s", error)
        sys.exit(UNUSABLE)
    counters = SharedCounters(os.path.join(run, "shadow.metrics"))
    counters.set("shadow_info", model.name, str(model.version), model.variant, to=1)
    path = os.path.join(run, SOCKET)
    if os.path.exists(path):
        os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taken:
        taken.bind(path)
        taken.settimeout(PARENT_SECONDS)
        logs.logger.info(
            "shadow ready", extra={"fields": {"version": model.version, "variant": model.variant}}
        )
        while os.getppid() == parent:
            try:
                handle(taken.recv(1 << 20), model, settings, counters)
            except TimeoutError:
                continue


def handle(packet: bytes, model: Model, settings: Settings, counters: SharedCounters) -> None:
    """Answer one image and compare with what was answered to the client."""
    confidence, length = _HEAD.unpack_from(packet)
    label = packet[_HEAD.size : _HEAD.size + length].decode()
    started = time.perf_counter()
    try:
        pixels = decode(packet[_HEAD.size + length :], model.manifest.input, settings.max_pixels)
        probabilities = model.engine.run(pixels[None], ("probabilities",), False)[0][0]
    except Exception as error:  # an ImageError, or whatever the engine raises
        counters.add("shadow_images", "failed")
        logs.logger.info("the second version failed on an image: %s", error)
        return
    counters.observe("shadow_seconds", time.perf_counter() - started)
    index = int(np.argmax(probabilities))
    counters.add("shadow_images", "agree" if model.manifest.classes[index] == label else "disagree")
    counters.observe("shadow_confidence_difference", abs(float(probabilities[index]) - confidence))
