"""Sends images to the workers and collects their answers, in an HTTP process.

`Dispatcher` holds a connection to each worker (`WorkerConnection`) and knows which of them are
ready. The images of one request are a `PendingRequest` until each has an answer, or the deadline
passes. Everything runs by callbacks on the event loop; no request has a task.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from serve import logs
from serve.active_jobs import open_active_jobs, read_failures
from serve.metrics.shared_counters import SharedCounters
from serve.shared_state import SharedState
from serve.wire import CANCEL, MAX_U32, MODEL_INFO, Answer, Job, pack_job, take_answers

RECONNECT_SECONDS = 0.02
WORKER_LOST = b"the worker stopped before it answered; try again"
HANGING_IMAGE = b"this image takes too long to process; sending it again does not help"
CRASHING_IMAGE = b"the service crashes on this image; sending it again does not help"

# The placeholder in a list of answers for an image without an answer.
UNANSWERED = Answer(id=0, status=0, version=0, body=b"")


class PendingRequest:
    """The images of one request while workers process them.

    `on_done` is called once: when each image has an answer, or when the deadline has passed. After
    `cancel` it is not called.
    """

    __slots__ = (
        "answers",
        "deadline",
        "dispatcher",
        "expired",
        "jobs",
        "missing",
        "on_done",
        "resend",
        "submitted",
    )

    def __init__(
        self,
        dispatcher: "Dispatcher",
        answers: list[Answer],
        deadline: float,
        on_done: Callable[["PendingRequest"], None],
    ) -> None:
        """Wait for the answers that are UNANSWERED.

        deadline: in seconds of time.monotonic().
        """
        self.dispatcher = dispatcher
        self.answers = answers
        self.deadline = deadline
        self.on_done = on_done
        self.expired = False
        self.jobs: list[tuple[WorkerConnection, int]] = []

        # Positions of the images that go to a worker, and how many of them have no answer.
        self.submitted = [i for i, answer in enumerate(answers) if answer is UNANSWERED]
        self.missing = len(self.submitted)

        # Sends the images at these positions once more. None if that is no longer possible.
        self.resend: Callable[[list[int]], None] | None = None

    def set_answer(self, index: int, answer: Answer) -> None:
        """Store the answer to one image. The last one finishes the request.

        If the model was replaced in between and two versions answered, the answered images are sent
        again, at most once.
        """
        self.answers[index] = answer
        self.missing -= 1
        if self.missing:
            return

        resend = self.resend
        if resend is not None:
            predicted = [i for i, answer in enumerate(self.answers) if answer.status == 200]
            versions = {self.answers[i].version for i in predicted}
            if len(versions) > 1:
                self.resend = None
                resend(predicted)
                return
        self.finish()

    def finish(self) -> None:
        """Count the images and call `on_done`."""
        self.detach()
        for index in self.submitted:
            outcome = image_outcome(self.answers[index].status)
            self.dispatcher.counters.add("images", outcome)
        try:
            self.on_done(self)
        except Exception:  # an error in one request must not affect others of the same worker
            logs.logger.exception("a response could not be sent")

    def expire(self) -> None:
        """Finish at the deadline: `on_done` sees `expired`, and the workers drop the jobs."""
        self.expired = True
        self.cancel()
        self.finish()

    def cancel(self) -> None:
        """Drop the request: workers drop its jobs, and `on_done` is not called."""
        self.detach()
        for connection, job_id in self.jobs:
            connection.cancel(job_id)

    def detach(self) -> None:
        """Remove the request from the dispatcher and break the reference cycle of `resend`."""
        self.resend = None
        self.dispatcher.pending_requests.pop(self, None)


def image_outcome(status: int) -> str:
    """Return the label of imago_images_total for the status of an answer, 0 for no answer."""
    if status == 200:
        return "answered"
    if status == 0:
        return "expired"
    if status < 500:
        return "refused"
    return "failed"


class WorkerConnection(asyncio.Protocol):
    """The connection to one worker.

    Jobs of one iteration of the event loop are sent in one write.
    """

    def __init__(self, dispatcher: "Dispatcher", worker: int) -> None:
        self.dispatcher = dispatcher
        self.worker = worker
        self.buffer = bytearray()
        self.outgoing: list[bytes] = []  # frames for the next write

        # By job id: the request that waits for the answer, and the position of the image in it.
        self.pending: dict[int, tuple[PendingRequest, int]] = {}

        self.model: dict[str, Any] | None = None  # None until the worker has described its model
        self.version = 0  # of that model
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # Implementation of asyncio.Protocol.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Store the transport, and open what the worker records of its jobs."""
        self.transport = transport
        self.active_jobs = open_active_jobs(self.dispatcher.run_directory, self.worker)

    def connection_lost(self, exc: Exception | None) -> None:
        """Answer the image on which the worker has failed with 422, and all others with 503."""
        if not self.closed.done():
            self.closed.set_result(None)
        self.model = None
        self.dispatcher.refresh_ready_workers()

        refusals = self._read_refusals()
        for job_id, (request, index) in list(self.pending.items()):
            answer = refusals.get(job_id) or Answer(job_id, 503, 0, WORKER_LOST)
            request.set_answer(index, answer)
        self.pending.clear()

    def _read_refusals(self) -> dict[int, Answer]:
        """Return the answers to the images on which the worker has failed, by job id.

        Where it failed on several images at once, none of them is refused. From now on images run
        alone, so that the one that is the cause is refused when it is sent again.
        """
        refusals: dict[int, Answer] = {}
        with self.active_jobs:
            failures = read_failures(self.active_jobs)
        for failure in failures:
            if len(failure.jobs) > 1:
                self.dispatcher.state.run_images_alone()
                continue
            process_id, job_id = failure.jobs[0]
            if process_id == os.getpid():
                detail = HANGING_IMAGE if failure.is_hang else CRASHING_IMAGE
                refusals[job_id] = Answer(job_id, 422, 0, detail)
        return refusals

    def data_received(self, data: bytes) -> None:
        """Take the answers that have arrived."""
        self.buffer += data
        for answer in take_answers(self.buffer):
            if answer.id == MODEL_INFO:
                model = json.loads(answer.body)
                self.model = model
                self.version = answer.version
                self.dispatcher.set_model(model, answer.version)
                continue

            job = self.pending.pop(answer.id, None)
            if job is None:
                continue  # cancelled, or past its deadline
            if answer.version:
                self.version = answer.version  # may come before the description of the model
            request, index = job
            request.set_answer(index, answer)

    def submit(
        self, request: PendingRequest, index: int, body: bytes, top_k: int, flags: int
    ) -> None:
        """Send the image at position `index` of a request as a job."""
        job_ids = self.dispatcher.job_ids
        job_id = next(job_ids) & MAX_U32
        if job_id == MODEL_INFO:
            job_id = next(job_ids) & MAX_U32

        self.pending[job_id] = (request, index)
        request.jobs.append((self, job_id))
        self._send(Job(job_id, request.deadline, top_k, flags, body))

    def cancel(self, job_id: int) -> None:
        """Drop a job, if it is still without an answer."""
        if self.pending.pop(job_id, None) is not None:
            self._send(Job(job_id, 0.0, 0, CANCEL, b""))

    def _send(self, job: Job) -> None:
        if not self.outgoing:
            self.dispatcher.loop.call_soon(self._flush)
        self.outgoing.append(pack_job(job))

    def _flush(self) -> None:
        frames = self.outgoing
        self.outgoing = []
        if not self.transport.is_closing():
            self.transport.writelines(frames)


class Dispatcher:
    """The connections of one HTTP process to all workers, and the requests that wait for them."""

    def __init__(
        self,
        run_directory: str,
        worker_count: int,
        state: SharedState,
        counters: SharedCounters,
    ) -> None:
        """Connect to `worker_count` workers, whose sockets are in `run_directory`.

        Must be called in a running event loop.
        """
        self.run_directory = run_directory
        self.worker_count = worker_count
        self.state = state
        self.counters = counters
        self.loop = asyncio.get_running_loop()
        self._set_ready_metric = counters.setter("ready")

        self.connections: list[WorkerConnection | None] = [None] * worker_count
        self.ready_workers: list[WorkerConnection] = []
        self.job_ids = count(1)  # of all workers, so that a new connection repeats none

        # The model that a worker described last. Empty until one has.
        self.model: dict[str, Any] = {}
        self.version = 0
        self.model_name_json = b""
        self._version_callbacks: list[Callable[[], None]] = []

        # In order of their deadlines, as all have the same time. One timer serves them all: to
        # start and cancel a timer for each request costs as much as to parse it.
        self.pending_requests: dict[PendingRequest, None] = {}
        self._deadline_timer: asyncio.TimerHandle | None = None

        self._connect_tasks: list[asyncio.Task[None]] = []
        for number in range(worker_count):
            task = self.loop.create_task(self._stay_connected(number))
            self._connect_tasks.append(task)

    async def _stay_connected(self, number: int) -> None:
        """Connect to a worker, and to the process that replaces it, until cancelled."""
        path = f"{self.run_directory}/worker-{number}.sock"
        while True:
            try:
                _, connection = await self.loop.create_unix_connection(
                    partial(WorkerConnection, self, number), path
                )
            except OSError:
                await asyncio.sleep(RECONNECT_SECONDS)
                continue

            self.connections[number] = connection
            self.refresh_ready_workers()
            await connection.closed
            self.connections[number] = None

    def add_version_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever another version of the model is served."""
        self._version_callbacks.append(callback)

    def set_model(self, model: dict[str, Any], version: int) -> None:
        """Take the description of a model that a worker serves."""
        has_changed = version != self.version
        self.model = model
        self.version = version
        self.model_name_json = json.dumps(model["name"]).encode()

        if has_changed:
            for callback in self._version_callbacks:
                callback()
        self.refresh_ready_workers()

    def refresh_ready_workers(self) -> None:
        """Recompute which workers accept jobs."""
        self.ready_workers = [
            connection
            for connection in self.connections
            if connection is not None and connection.model is not None
        ]
        self._set_ready_metric(self.is_ready)

    @property
    def is_ready(self) -> bool:
        """Whether all workers accept jobs."""
        return len(self.ready_workers) == self.worker_count

    def submit(
        self,
        images: list[bytes],
        answers: list[Answer],
        timeout_seconds: float,
        top_k: int,
        flags: int,
        on_done: Callable[[PendingRequest], None],
    ) -> PendingRequest:
        """Send each image that is UNANSWERED in `answers` to the worker with the fewest jobs.

        At least one worker must be ready. `on_done` is not called before this method returns.
        """
        deadline = time.monotonic() + timeout_seconds
        request = PendingRequest(self, answers, deadline, on_done)
        self.pending_requests[request] = None
        if self._deadline_timer is None:
            self._deadline_timer = self.loop.call_later(timeout_seconds, self._expire_overdue)

        if len(images) > 1:
            request.resend = partial(self._resend, request, images, top_k, flags)
        self._send_jobs(request, images, top_k, flags)
        if not request.missing:
            self.loop.call_soon(self._finish_if_pending, request)
        return request

    def _finish_if_pending(self, request: PendingRequest) -> None:
        """Finish a request that needed no worker, unless its client has left."""
        if request in self.pending_requests:
            request.finish()

    def _send_jobs(
        self, request: PendingRequest, images: list[bytes], top_k: int, flags: int
    ) -> None:
        """Send the images without an answer.

        While workers replace their models one by one, the images of one request go to workers with
        the same version.
        """
        workers = self.ready_workers
        if len(images) > 1 and len(workers) > 1:
            same_version = [worker for worker in workers if worker.version == self.version]
            workers = same_version or workers

        for index, body in enumerate(images):
            if request.answers[index] is not UNANSWERED:
                continue
            worker = workers[0]
            if len(workers) > 1:
                worker = min(workers, key=_count_pending_jobs)
            worker.submit(request, index, body, top_k, flags)

    def _resend(
        self,
        request: PendingRequest,
        images: list[bytes],
        top_k: int,
        flags: int,
        indices: list[int],
    ) -> None:
        """Send the images at these positions once more, to get all answers from the new version."""
        if not self.ready_workers:
            request.finish()
            return
        for index in indices:
            request.answers[index] = UNANSWERED
        request.missing = len(indices)
        self._send_jobs(request, images, top_k, flags)

    def _expire_overdue(self) -> None:
        """Expire the requests whose deadline has passed, and set the timer for the next one."""
        now = time.monotonic()
        while True:
            first = next(iter(self.pending_requests), None)
            if first is None:
                self._deadline_timer = None
                return
            if first.deadline > now:
                break
            first.expire()
        self._deadline_timer = self.loop.call_later(first.deadline - now, self._expire_overdue)

    def unsent_bytes(self) -> int:
        """Return the bytes of jobs that workers have not read.

        A worker that hangs leaves them there, even after their deadlines.
        """
        total = 0
        for worker in self.ready_workers:
            total += worker.transport.get_write_buffer_size()
        return total

    def close(self) -> None:
        """Close all connections and stop connecting."""
        for task in self._connect_tasks:
            task.cancel()
        for connection in self.connections:
            if connection is not None:
                connection.transport.close()


def _count_pending_jobs(worker: WorkerConnection) -> int:
    return len(worker.pending)
