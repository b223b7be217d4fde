"""A predictor: a thread of a worker that decodes batches, runs the graph and sends the answers.

A batch passes these steps: collect, decode, drop expired jobs, group by outputs, run, answer.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.image import ImageError, decode
from serve import logs
from serve.active_jobs import ActiveJobs
from serve.model import Model
from serve.prediction import (
    are_finite,
    encode_activation_map,
    encode_embedding_base64,
    encode_embedding_numbers,
    find_finite_rows,
)
from serve.settings import Settings
from serve.stall_timer import StallTimer
from serve.wire import (
    ALONE,
    ARRAYS,
    BASE64,
    CAM,
    EMBEDDING,
    NO_ACTIVATION_MAP,
    NO_EMBEDDING,
    OUTPUT_FLAGS,
    TENSOR,
    Answer,
    Arrays,
    Job,
    pack_answer,
    pack_arrays,
)
from serve.worker.batch import CompletedBatch, DecodedBatch
from serve.worker.batcher import Batcher, HttpProcessConnection, QueuedJob
from serve.worker.decoding_memory import DecodingMemory
from serve.worker.worker_metrics import WorkerMetrics

INACTIVE_CHECK_SECONDS = 0.5

# Parts of the timeout after which a run counts as a hang. The images of a run of several are run
# once more, each alone, and all of it should take less than the deadline.
TIMEOUT_SHARE_OF_SEVERAL = 1 / 2
TIMEOUT_SHARE_ALONE = 1 / 4

NO_ACTIVATION_MAPS = "this model has no heat maps; leave explain out"
NO_EMBEDDINGS = "this model has no embeddings; leave embedding out"
NOT_FINITE = b"the outputs of the model for this image are NaN or infinite"
OTHER_TENSOR_SHAPE = "the model was replaced by one with another input shape; try again"

Observer = Callable[[CompletedBatch], None]


class MissingOutputError(ImageError):
    """A job wants an output that only the model had which has just been replaced."""

    status = 400


class ModelReplacedError(ImageError):
    """A tensor has the input shape of the model that has just been replaced."""

    status = 503


@dataclass
class PredictorContext:
    """The objects that all predictors of a worker share."""

    settings: Settings
    batcher: Batcher
    active_jobs: ActiveJobs
    decoding_memory: DecodingMemory
    current_model: Callable[[], Model]  # called for each batch, as the model may be replaced
    observers: list[Observer]
    # Whether observers use the embedding, which is then an output of each run, if the model has it.
    observes_embedding: bool = False


class Predictor:
    """One predictor thread."""

    def __init__(self, number: int, context: PredictorContext, metrics: WorkerMetrics):
        self.number = number
        self.metrics = metrics
        self.settings = context.settings
        self.batcher = context.batcher
        self.active_jobs = context.active_jobs
        self.decoding_memory = context.decoding_memory
        self.current_model = context.current_model
        self.observers = context.observers
        self.observes_embedding = context.observes_embedding

        # Since when it decodes one image or runs the graph, in seconds of time.monotonic(); 0 while
        # it waits for jobs or for permission to decode.
        self.busy_since = 0.0
        self.stall_timer: StallTimer | None = None  # until the thread has started
        self.timeout_share = 1.0  # of the usual timeout, for what it does now

    def stalled_seconds(self) -> float:
        """Return for how long it makes no progress with one image or one run, 0 if it is idle.

        Called at regular intervals.
        """
        if self.stall_timer is None:
            return 0.0
        return self.stall_timer.update(self.busy_since or None)

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name=f"predictor-{self.number}", daemon=True).start()

    def _run(self) -> None:
        """Process batches until the process ends."""
        self.active_jobs.set_thread(self.number)
        self.stall_timer = StallTimer(os.getpid(), threading.get_native_id())
        try:
            while True:
                if self.number < self.batcher.active_predictors:
                    self._process_next_batch()
                else:  # a light model needs one predictor; another model may need all
                    time.sleep(INACTIVE_CHECK_SECONDS)
        except BaseException:
            # Without this thread the worker would lose a core until the next restart.
            logs.logger.exception("predictor thread failed; the worker ends")
            os._exit(1)

    def _process_next_batch(self) -> None:
        jobs, is_alone = self.batcher.take()
        try:
            self._process_batch(jobs, is_alone)
        except Exception:
            logs.logger.exception("batch of %d images failed", len(jobs))
            version = self.current_model().version
            send_answers(
                [
                    (queued, Answer(queued.job.id, 500, version, b"the model failed on this batch"))
                    for queued in jobs
                ]
            )
        finally:
            self._set_idle()

    def _start_job(self, queued: QueuedJob) -> float:
        """Record that work on one image starts. Return now."""
        self.active_jobs.set_job(self.number, queued.key)
        self.timeout_share = 1.0
        now = time.monotonic()
        self.busy_since = now
        return now

    def _start_run(self, jobs: list[QueuedJob]) -> None:
        """Record that a run of the graph starts."""
        self.active_jobs.set_jobs(self.number, [queued.key for queued in jobs])
        if len(jobs) > 1:
            self.timeout_share = TIMEOUT_SHARE_OF_SEVERAL
        elif jobs[0].job.flags & ALONE:
            self.timeout_share = TIMEOUT_SHARE_ALONE
        self.busy_since = time.monotonic()

    def _set_idle(self) -> None:
        self.busy_since = 0.0
        self.active_jobs.set_jobs(self.number, ())

    def _process_batch(self, jobs: list[QueuedJob], is_alone: bool) -> None:
        """Answer the jobs. `jobs` grows by those that arrive while they are decoded."""
        decoded = self._decode_jobs(jobs, is_alone)
        decoded = self._drop_expired(decoded)
        for group in _group_by_outputs(decoded):
            self._run_graph(group)

    def _decode_jobs(self, jobs: list[QueuedJob], is_alone: bool) -> DecodedBatch:
        """Decode the images. Jobs that can't be decoded are answered at once.

        Expired jobs are left out, since the HTTP process answers them itself.
        """
        model = self.current_model()
        batch = DecodedBatch(model, time.monotonic(), is_alone, [], [], [])
        refusals: list[tuple[QueuedJob, Answer]] = []

        for queued in jobs:
            job = queued.job
            expired = job.deadline < self._start_job(queued)
            if not expired:
                start = time.perf_counter()
                try:
                    pixels = self._decode(job, model)
                except ImageError as error:
                    detail = str(error).encode()
                    refusals.append((queued, Answer(job.id, error.status, model.version, detail)))
                else:
                    batch.jobs.append(queued)
                    batch.pixels.append(pixels)
                    batch.decode_us.append(int((time.perf_counter() - start) * 1e6))

            if queued is jobs[-1]:  # extend the list while it is iterated
                jobs += self.batcher.take_more(self.batcher.max_batch_size - len(jobs))

        if refusals:
            send_answers(refusals)
        return batch

    def _decode(self, job: Job, model: Model) -> np.ndarray:
        """Return uint8 [height, width, channels]. Raises ImageError."""
        if job.flags & CAM and not model.has_activation_maps:
            raise MissingOutputError(NO_ACTIVATION_MAPS)
        if job.flags & EMBEDDING and not model.has_embeddings:
            raise MissingOutputError(NO_EMBEDDINGS)
        spec = model.manifest.input

        if job.flags & TENSOR:
            if len(job.body) != spec.height * spec.width * spec.channels:
                raise ModelReplacedError(OTHER_TENSOR_SHAPE)
            pixels = np.frombuffer(job.body, np.uint8)
            return pixels.reshape(spec.height, spec.width, spec.channels)

        # A large image waits until others have freed their memory. A predictor that waits does not
        # hang, so it counts as idle until `decode` calls back.
        self.busy_since = 0.0
        return decode(
            job.body,
            spec,
            self.settings.max_pixels,
            self._restart_clock,
            self.decoding_memory.reserve,
        )

    def _restart_clock(self) -> None:
        self.busy_since = time.monotonic()

    def _drop_expired(self, batch: DecodedBatch) -> DecodedBatch:
        """Leave out jobs whose deadline passed while others were decoded."""
        now = time.monotonic()
        remaining = [i for i, queued in enumerate(batch.jobs) if queued.job.deadline >= now]
        if len(remaining) == len(batch.jobs):
            return batch
        return batch.select(remaining)

    def _run_graph(self, batch: DecodedBatch) -> None:
        """Run the graph on jobs that want the same outputs, answer them and count them."""
        model = batch.model
        output_names = model.output_names
        flags = batch.jobs[0].job.flags
        if flags & CAM:
            output_names = (*output_names, "cam")
        if flags & EMBEDDING or (self.observes_embedding and model.has_embeddings):
            output_names = (*output_names, "embedding")

        images = np.stack(batch.pixels)
        self._start_run(batch.jobs)
        start = time.perf_counter()
        try:
            outputs = model.engine.run(images, output_names, batch.is_alone)
        except Exception:
            self._recover_from_failed_run(batch)
            return
        infer_seconds = time.perf_counter() - start

        if not are_finite(outputs):
            rows = find_finite_rows(outputs)
            self._refuse_other_rows(batch, rows)
            if not rows:
                return
            batch = batch.select(rows)
            images = images[rows]
            outputs = [output[rows] for output in outputs]

        queue_us = [max(0, int((batch.started - queued.arrived) * 1e6)) for queued in batch.jobs]
        send_answers(_compose_answers(batch, outputs, queue_us, int(infer_seconds * 1e6)))
        self.metrics.count_batch(model, outputs, queue_us, batch.decode_us, infer_seconds)
        if self.observers:
            completed = CompletedBatch(model, batch.jobs, images, outputs)
            for observe in self.observers:
                observe(completed)

    def _recover_from_failed_run(self, batch: DecodedBatch) -> None:
        """Run each image alone, so that an image the graph fails on does not affect the others."""
        if len(batch.jobs) > 1:
            for i in range(len(batch.jobs)):
                self._run_graph(batch.select([i]))
            return

        logs.logger.exception("the model failed on an image")
        queued = batch.jobs[0]
        detail = b"the model failed on this image"
        send_answers([(queued, Answer(queued.job.id, 500, batch.model.version, detail))])

    def _refuse_other_rows(self, batch: DecodedBatch, finite_rows: list[int]) -> None:
        """Answer the images whose outputs are NaN or infinite with status 500."""
        version = batch.model.version
        answers: list[tuple[QueuedJob, Answer]] = []
        for row, queued in enumerate(batch.jobs):
            if row not in finite_rows:
                answers.append((queued, Answer(queued.job.id, 500, version, NOT_FINITE)))
        if answers:
            logs.logger.error("the outputs for %d images are NaN or infinite", len(answers))
            send_answers(answers)


def _group_by_outputs(batch: DecodedBatch) -> list[DecodedBatch]:
    """Split off jobs that want further outputs, so that the others do not pay for them.

    Jobs that must run alone are groups of their own.
    """
    if not batch.jobs:
        return []
    positions: dict[int, list[int]] = {}
    alone: list[list[int]] = []
    for i, queued in enumerate(batch.jobs):
        flags = queued.job.flags
        if flags & ALONE:
            alone.append([i])
        else:
            positions.setdefault(flags & OUTPUT_FLAGS, []).append(i)
    if len(positions) == 1 and not alone:
        return [batch]
    groups = [group for _, group in sorted(positions.items())]
    return [batch.select(group) for group in groups + alone]


def _compose_answers(
    batch: DecodedBatch, outputs: list[np.ndarray], queue_us: list[int], infer_us: int
) -> list[tuple[QueuedJob, Answer]]:
    """Compose the answer to each job: JSON, or numbers as bytes for jobs with ARRAYS."""
    model = batch.model
    probabilities = outputs[0]
    energy = outputs[1]
    indices = probabilities.argmax(1).tolist()
    confidences = probabilities.max(1).tolist()
    top_k = [queued.job.top_k for queued in batch.jobs]
    predictions = model.composer.compose(probabilities, energy, top_k)

    flags = batch.jobs[0].job.flags  # all jobs want the same outputs
    activation_maps = outputs[2] if flags & CAM else None
    embeddings = outputs[-1] if flags & EMBEDDING else None

    answers: list[tuple[QueuedJob, Answer]] = []
    for i, queued in enumerate(batch.jobs):
        job = queued.job
        index = indices[i]
        activation_map = None if activation_maps is None else activation_maps[i, index]
        embedding = None if embeddings is None else embeddings[i]
        if job.flags & ARRAYS:
            arrays = Arrays(
                model.manifest.classes[index].encode(),
                probabilities[i],
                energy[i],
                NO_EMBEDDING if embedding is None else embedding,
                NO_ACTIVATION_MAP if activation_map is None else activation_map,
            )
            body = pack_arrays(arrays)
        else:
            extras = _compose_extras(job, model, activation_map, embedding)
            body = f"{predictions[i]}{extras}}}".encode()

        answer = Answer(
            job.id,
            200,
            model.version,
            body,
            index,
            confidences[i],
            queue_us[i],
            batch.decode_us[i],
            infer_us,
        )
        answers.append((queued, answer))
    return answers


def _compose_extras(
    job: Job, model: Model, activation_map: np.ndarray | None, embedding: np.ndarray | None
) -> str:
    """Return the JSON members that follow those of every prediction, with a leading comma."""
    extras = ""
    if activation_map is not None:
        encoded_map = encode_activation_map(activation_map, model.manifest.input)
        extras += f',"cam":"{encoded_map}"'
    if embedding is not None:
        encode = encode_embedding_base64 if job.flags & BASE64 else encode_embedding_numbers
        extras += f',"embedding":{encode(embedding)}'
    return extras


def send_answers(answers: list[tuple[QueuedJob, Answer]]) -> None:
    """Send answers, with one write for each HTTP process."""
    frames: dict[HttpProcessConnection, list[bytes]] = {}
    for queued, answer in answers:
        frames.setdefault(queued.connection, []).append(pack_answer(answer))
    for connection, parts in frames.items():
        connection.send(b"".join(parts))
