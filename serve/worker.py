"""The worker process: one I/O thread, one predictor thread a core, and the model they share.

LitServe starts it (`Worker.setup`, then `PredictLoop`) and its supervisor replaces it. Jobs come as frames over a unix
socket; see serve.frames. Where to hook in:

- `Worker.model` is read once a batch; assign another checked and warm `serve.model.Model` to swap between two batches,
  then call `PredictLoop.announce` so that the HTTP processes learn of it.
- `PredictLoop.run_batch` is where a batch has run: `self.observers` are called with a `Batch` after its answers left.
- `serve.answer.Answers.compose` is where an answer is composed.
"""
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import litserve
import numpy as np
from litserve.loops.base import LitLoop

from models.bundle import BundleError
from models.image import ImageError, decode
from serve import logs
from serve.backlog import Backlog, Waiting
from serve.frames import CANCEL, HELLO, Answer, pack_answer, take_jobs
from serve.metrics import WorkerMetrics
from serve.model import Model, load
from serve.settings import Settings
from serve.state import State

STEP = 0.5  # seconds between two heartbeats
SEND_SECONDS = 5  # an HTTP process that reads nothing for so long has lost its answers


@dataclass
class Batch:
    """What observers see of a batch that has run."""

    model: Model
    pixels: np.ndarray  # uint8 [N,H,W,C]
    outputs: list[np.ndarray]  # probabilities [N,K], energy [N]
    waiting: list[Waiting]


class Worker(litserve.LitAPI):
    """Holds what a worker process needs; LitServe pickles it into the process that it starts."""

    def __init__(self, settings: Settings, run: str, threads: int):
        super().__init__(loop=PredictLoop())
        self.settings, self.run, self.threads = settings, run, threads

    def setup(self, device: str) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches the whole group; the supervisor decides
        logs.configure(self.settings)
        try:
            self.model = load(self.settings, self.threads)
        except (BundleError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            logs.silence()  # LitServe would print the traceback
            raise

    def decode_request(self, request: Any) -> Any:
        return request

    def predict(self, x: Any) -> Any:
        raise AssertionError("requests reach the worker through PredictLoop")


class Peer:
    """One HTTP process, seen from the worker."""

    def __init__(self, sock: socket.socket):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.settimeout(SEND_SECONDS)
        self.sock, self.buffer, self.lock = sock, bytearray(), threading.Lock()

    def send(self, frames: bytes) -> None:
        with self.lock:
            try:
                self.sock.sendall(frames)
            except OSError:
                self.sock.close()  # it is gone or stuck; what it waited for is lost with it


class PredictLoop(LitLoop):
    """Runs in the worker process instead of LitServe's own loops."""

    def __call__(self, lit_api: Worker, device: str, worker_id: int, *args: Any, **kwargs: Any) -> None:
        self.api, self.peers = lit_api, set()
        self.state = State(lit_api.run)
        self.number, self.parent = worker_id, os.getppid()
        self.backlog = Backlog(lit_api.threads, lit_api.settings.max_batch_size, lit_api.settings.batch_wait_ms / 1000)
        self.observers: list[Callable[[Batch], None]] = []
        for i in range(lit_api.threads):
            metrics = WorkerMetrics(f"{lit_api.run}/worker-{worker_id}-{i}.metrics")
            metrics.serve(lit_api.model)
            threading.Thread(target=self.predictor, args=(i, metrics), name=f"predictor-{i}", daemon=True).start()
        self.serve(f"{lit_api.run}/worker-{worker_id}.sock")

    # --- the I/O thread ---

    def serve(self, path: str) -> None:
        """Read jobs from all HTTP processes until the supervisor ends the process or is gone itself."""
        with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
            if os.path.exists(path):
                os.unlink(path)  # a worker that crashed left it
            listener.bind(path)
            listener.listen(64)
            selector.register(listener, selectors.EVENT_READ)
            while os.getppid() == self.parent:
                self.state.beat(self.number)
                for key, _ in selector.select(STEP):
                    if key.data is None:
                        peer = Peer(listener.accept()[0])
                        selector.register(peer.sock, selectors.EVENT_READ, peer)
                        self.peers.add(peer)
                        peer.send(self.hello())
                    elif not self.receive(key.data):
                        selector.unregister(key.fileobj)
                        key.data.sock.close()
                        self.peers.discard(key.data)
                        self.backlog.remove(key.data)
            os._exit(1)

    def receive(self, peer: Peer) -> bool:
        """Take what a connection has for us; False when it is closed."""
        try:
            data = peer.sock.recv(1 << 20)
        except OSError:
            return False
        peer.buffer += data
        arrived, items = time.monotonic(), []
        for job in take_jobs(peer.buffer):
            if job.flags & CANCEL:
                self.backlog.remove(peer, job.id)
            else:
                items.append(Waiting(peer, job, arrived))
        if items:
            self.backlog.put(items)
        return bool(data)

    def hello(self) -> bytes:
        model = self.api.model
        return pack_answer(Answer(HELLO, 200, model.version, 0, 0, 0, model.hello()))

    def announce(self) -> None:
        """Tell all HTTP processes which model is served now."""
        for peer in list(self.peers):
            peer.send(self.hello())

    # --- the predictor threads ---

    def predictor(self, index: int, metrics: WorkerMetrics) -> None:
        while True:
            batch, alone = self.backlog.take()
            self.state.begin(self.number, index)
            try:
                self.run_batch(batch, alone, metrics)
            except Exception:
                logs.logger.exception("a batch of %d failed", len(batch))
                reply([(w, self.failed(w, 500, b"the model failed on this batch")) for w in batch])
            finally:
                self.state.end(self.number, index)

    def run_batch(self, batch: list[Waiting], alone: bool, metrics: WorkerMetrics) -> None:
        """Decode, run, answer. What is past its deadline or can't be decoded is answered before the graph runs."""
        model, started = self.api.model, time.monotonic()
        taken, pixels, decode_us, refused = [], [], [], []
        for w in batch:
            if w.job.deadline < started:
                refused.append((w, self.failed(w, 504, b"the deadline passed before its turn")))
                metrics.outcome("expired")
                continue
            before = time.perf_counter()
            try:
                pixels.append(decode(w.job.body, model.manifest.input, self.api.settings.max_pixels))
            except ImageError as error:
                refused.append((w, self.failed(w, error.status, str(error).encode())))
                metrics.outcome("refused")
                continue
            taken.append(w)
            decode_us.append(int((time.perf_counter() - before) * 1e6))
        if refused:
            reply(refused)
        if not taken:
            return
        images, before = np.stack(pixels), time.perf_counter()
        outputs = model.engine.run(images, model.wanted, alone)
        infer = time.perf_counter() - before
        predictions = model.answers.compose(*outputs[:2], [w.job.top_k for w in taken])
        infer_us = int(infer * 1e6)
        queue_us = [int((started - w.arrived) * 1e6) for w in taken]
        reply([(w, Answer(w.job.id, 200, model.version, q, d, infer_us, text.encode() + b"}"))
               for w, q, d, text in zip(taken, queue_us, decode_us, predictions, strict=True)])
        metrics.batch(model, outputs, queue_us, decode_us, infer)
        if self.observers:
            seen = Batch(model, images, outputs, taken)
            for observer in self.observers:
                observer(seen)

    def failed(self, waiting: Waiting, status: int, detail: bytes) -> Answer:
        return Answer(waiting.job.id, status, self.api.model.version, 0, 0, 0, detail)


def reply(answers: list[tuple[Waiting, Answer]]) -> None:
    """Send answers, in one write to each HTTP process."""
    frames: dict[Peer, list[bytes]] = {}
    for waiting, answer in answers:
        frames.setdefault(waiting.peer, []).append(pack_answer(answer))
    for peer, parts in frames.items():
        peer.send(b"".join(parts))
