"""The worker process: one predictor thread a core, and the model they share.

LitServe starts it (`Worker.setup`, then `PredictLoop`) and its supervisor replaces it. Jobs come as frames over a unix
socket; see serve.wire and serve.worker.batcher. Where to hook in:

- `Worker.model` is read once a batch; `PredictLoop.swap` puts another checked and warm `Model` in its place.
- `PredictLoop.run_batch` is where a batch has run: `self.observers` are called with a `Batch` after its answers left.
- `serve.prediction.Answers.compose` is where an answer is composed.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import litserve
import numpy as np
from litserve.loops.base import LitLoop

from models.image import ImageError, decode
from models.store import LATEST
from serve import logs
from serve.metrics.shared_counters import SharedCounters
from serve.model import Model
from serve.prediction import encode_activation_map
from serve.settings import Settings
from serve.shared_state import SharedState
from serve.wire import (
    ARRAYS,
    CAM,
    LABEL_LENGTH,
    MODEL_INFO,
    TENSOR,
    Answer,
    Job,
    pack_answer,
)
from serve.worker import reload
from serve.worker.batcher import Backlog, Peer, Waiting
from serve.worker.drift_window import Drift
from serve.worker.shadow import Shadow
from serve.worker.worker_metrics import WorkerMetrics, set_served_model

STEP = 0.5  # seconds between two heartbeats
UNUSABLE = 2  # exit status of a worker that can't serve what it is told to


class Changed(ImageError):
    """A tensor was right for the model before this one."""

    status = 503


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
        state = SharedState(
            self.run
        )  # signals may reach the whole group; the supervisor alone decides when a worker ends
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if state.stopping else None)
        logs.configure(self.settings)
        try:
            self.model = reload.load(self.settings, self.run, self.threads)
        except (
            ValueError,
            OSError,
        ) as error:  # BundleError is the first, a store that can't be read the second
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(UNUSABLE)

    def decode_request(self, request: Any) -> Any:
        return request

    def predict(self, x: Any) -> Any:
        raise AssertionError("requests reach the worker through PredictLoop")


class PredictLoop(LitLoop):
    """Runs in the worker process instead of LitServe's own loops."""

    def __call__(
        self, lit_api: Worker, device: str, worker_id: int, *args: Any, **kwargs: Any
    ) -> None:
        self.api = lit_api
        self.state = SharedState(lit_api.run)
        self.number, self.parent = worker_id, os.getppid()
        self.backlog = Backlog(
            f"{lit_api.run}/worker-{worker_id}.sock",
            self.predictors(lit_api.model),
            lit_api.settings.max_batch_size,
            lit_api.settings.batch_wait_ms / 1000,
            self.hello,
        )
        self.served = SharedCounters(f"{lit_api.run}/worker-{worker_id}-model.metrics")
        set_served_model(self.served, lit_api.model)
        self.state.set_run_seconds(worker_id, lit_api.model.run_seconds)
        self.drift: Drift | None = None
        self.observers = self.watchers(lit_api.settings, f"{lit_api.run}/worker-{worker_id}")
        for i in range(lit_api.threads):
            metrics = WorkerMetrics(f"{lit_api.run}/worker-{worker_id}-{i}.metrics", lit_api.model)
            threading.Thread(
                target=self.predictor, args=(i, metrics), name=f"predictor-{i}", daemon=True
            ).start()
        while os.getppid() == self.parent:  # the supervisor ends this process, or is gone itself
            self.state.set_heartbeat(worker_id)
            time.sleep(STEP)
        os._exit(1)

    def watchers(self, settings: Settings, path: str) -> list[Callable[[Batch], None]]:
        """What looks at batches after their answers left, each with a counting file of its own."""
        found: list[Callable[[Batch], None]] = []
        if settings.drift_window:
            self.drift = Drift(
                SharedCounters(f"{path}-drift.metrics"), settings.drift_window, self.api.model
            )
            found.append(self.drift)
        if settings.shadow_version:
            found.append(
                Shadow(
                    self.api.run,
                    settings.shadow_share,
                    self.backlog,
                    SharedCounters(f"{path}-shadow.metrics"),
                )
            )
        if settings.version == LATEST and settings.reload_seconds:
            reload.Reload(self, SharedCounters(f"{path}-reload.metrics")).start()
        return found

    def predictors(self, model: Model) -> int:
        """How many threads take batches: one for a light model, the others look again after a swap."""
        return 1 if model.is_light else self.api.threads

    def hello(self) -> bytes:
        model = self.api.model
        return pack_answer(Answer(MODEL_INFO, 200, model.version, model.description))

    def swap(self, model: Model) -> None:
        """Serve another model from the next batch on, and tell all HTTP processes."""
        self.state.set_run_seconds(
            self.number, max(self.api.model.run_seconds, model.run_seconds)
        )  # both run now
        self.api.model, self.backlog.predictors = model, self.predictors(model)
        for peer in list(self.backlog.peers):
            peer.send(self.hello())
        set_served_model(self.served, model)
        if self.drift:
            self.drift.start(model)

    def predictor(self, index: int, metrics: WorkerMetrics) -> None:
        try:
            while True:
                if index >= self.backlog.predictors:
                    time.sleep(STEP)
                    continue
                batch, alone = self.backlog.take()
                try:
                    self.run_batch(batch, alone, index, metrics)
                except Exception:
                    logs.logger.exception("a batch of %d failed", len(batch))
                    reply(
                        [(w, self.failed(w, 500, b"the model failed on this batch")) for w in batch]
                    )
                finally:
                    self.state.set_idle(self.number, index)
        except BaseException:
            logs.logger.exception("a predictor ended")
            os._exit(1)  # better a new worker than one that works with half its cores

    def run_batch(
        self, batch: list[Waiting], alone: bool, index: int, metrics: WorkerMetrics
    ) -> None:
        """Decode, run, answer. What can't be decoded is answered before the graph runs.

        What is past its deadline is left out: the HTTP process has answered it, or does so this moment.
        """
        model, started = self.api.model, time.monotonic()
        taken, pixels, decode_us, refused = [], [], [], []
        for w in batch:  # grows while it is gone through
            if w.job.deadline < self.state.set_busy(self.number, index):
                continue
            if (
                w.job.flags & CAM and not model.has_activation_maps
            ):  # it was asked of the model before this one
                refused.append(
                    (w, self.failed(w, 400, b"this model has no heat maps; leave explain away"))
                )
                continue
            before = time.perf_counter()
            try:
                pixels.append(self.pixels(w.job, model, index))
            except ImageError as error:
                refused.append((w, self.failed(w, error.status, str(error).encode())))
            else:
                taken.append(w)
                decode_us.append(int((time.perf_counter() - before) * 1e6))
            if w is batch[-1]:
                batch += self.backlog.more(self.api.settings.max_batch_size - len(batch))
        now = self.state.set_busy(self.number, index)
        for i in [i for i, w in enumerate(taken) if w.job.deadline < now][
            ::-1
        ]:  # while others were decoded
            del taken[i], pixels[i], decode_us[i]
        if refused:
            reply(refused)
        if not taken:
            return
        mapped = [w.job.flags & CAM for w in taken]
        if not any(mapped):
            return self.run_graph(model, taken, pixels, decode_us, started, alone, index, metrics)
        for wanted in (0, CAM):  # who asks for no heat map pays for none
            chosen = [i for i, flag in enumerate(mapped) if flag == wanted]
            if chosen:
                self.run_graph(
                    model,
                    [taken[i] for i in chosen],
                    [pixels[i] for i in chosen],
                    [decode_us[i] for i in chosen],
                    started,
                    alone,
                    index,
                    metrics,
                )

    def run_graph(
        self,
        model: Model,
        taken: list[Waiting],
        pixels: list[np.ndarray],
        decode_us: list[int],
        started: float,
        alone: bool,
        index: int,
        metrics: WorkerMetrics,
    ) -> None:
        """Run the graph on decoded images that want the same outputs, answer, count. If it raises: on each alone."""
        wanted = (*model.output_names, "cam") if taken[0].job.flags & CAM else model.output_names
        images, before = np.stack(pixels), time.perf_counter()
        self.state.set_busy(self.number, index)
        try:
            outputs = model.engine.run(images, wanted, alone)
        except Exception:
            if len(taken) > 1:  # what is wrong with one image must not reach the others
                for one, image, us in zip(taken, pixels, decode_us, strict=True):
                    self.run_graph(model, [one], [image], [us], started, alone, index, metrics)
            else:
                logs.logger.exception("the model failed on an image")
                reply([(taken[0], self.failed(taken[0], 500, b"the model failed on this image"))])
            return
        infer = time.perf_counter() - before
        infer_us = int(infer * 1e6)
        queue_us = [max(0, int((started - w.arrived) * 1e6)) for w in taken]
        classes = outputs[0].argmax(1).tolist()
        confidences = outputs[0].max(1).tolist()
        texts = bodies(model, taken, outputs)
        answers: list[tuple[Waiting, Answer]] = []
        for i, w in enumerate(taken):
            answer = Answer(
                w.job.id,
                200,
                model.version,
                texts[i],
                classes[i],
                confidences[i],
                queue_us[i],
                decode_us[i],
                infer_us,
            )
            answers.append((w, answer))
        reply(answers)
        metrics.count_batch(model, outputs, queue_us, decode_us, infer)
        if self.observers:
            seen = Batch(model, images, outputs, taken)
            for observer in self.observers:
                observer(seen)

    def pixels(self, job: Job, model: Model, index: int) -> np.ndarray:
        """uint8 [height, width, channels] of one job. Raises ImageError."""
        spec = model.manifest.input
        if not job.flags & TENSOR:
            self.state.set_idle(
                self.number, index
            )  # to wait for one's turn is no hang, to decode for ever is
            return decode(
                job.body,
                spec,
                self.api.settings.max_pixels,
                lambda: self.state.set_busy(self.number, index),
            )
        if len(job.body) != spec.height * spec.width * spec.channels:
            raise Changed(
                "the model was changed meanwhile for one that takes another shape; try again"
            )
        return np.frombuffer(job.body, np.uint8).reshape(spec.height, spec.width, spec.channels)

    def failed(self, waiting: Waiting, status: int, detail: bytes) -> Answer:
        return Answer(waiting.job.id, status, self.api.model.version, detail)


def bodies(model: Model, taken: list[Waiting], outputs: list[np.ndarray]) -> list[bytes]:
    """The content of each answer: a prediction as JSON, with its heat map where there is one, or bare numbers."""
    probabilities, energy = outputs[:2]
    texts = model.composer.compose(probabilities, energy, [w.job.top_k for w in taken])
    found = []
    for i, (w, text) in enumerate(zip(taken, texts, strict=True)):
        if w.job.flags & ARRAYS:
            label = model.manifest.classes[probabilities[i].argmax()].encode()
            values = np.append(probabilities[i], energy[i]).astype("<f4")
            found.append(LABEL_LENGTH.pack(len(label)) + label + values.tobytes())
        elif w.job.flags & CAM:
            image = encode_activation_map(
                outputs[2][i, probabilities[i].argmax()], model.manifest.input
            )
            found.append(f'{text},"cam":"{image}"}}'.encode())
        else:
            found.append(text.encode() + b"}")
    return found


def reply(answers: list[tuple[Waiting, Answer]]) -> None:
    """Send answers, in one write to each HTTP process."""
    frames: dict[Peer, list[bytes]] = {}
    for waiting, answer in answers:
        frames.setdefault(waiting.peer, []).append(pack_answer(answer))
    for peer, parts in frames.items():
        peer.send(b"".join(parts))
