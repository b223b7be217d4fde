"""Sends images to the workers and collects their answers, in an HTTP process.

`Dispatcher` holds a connection to each worker (`WorkerConnection`) and knows which of them are
ready. The images of one request are a `PendingRequest` until each has an answer, or the deadline
passes. Each image is a `PendingJob`: where its worker ends before it answers, another worker, or
the one that replaces it, gets the image. Everything runs by callbacks on the event loop; no request
has a task.
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
from serve.active_jobs import Failures, open_active_jobs, read_failures
from serve.metrics.shared_counters import SharedCounters
from serve.shared_state import SharedState
from serve.wire import (
    ALONE,
    CANCEL,
    MAX_U32,
    MODEL_INFO,
    Answer,
    Job,
    build_image_name,
    pack_job,
    take_answers,
)

RECONNECT_SECONDS = 0.02
CONNECT_SECONDS = 10  # that a process waits for workers before it accepts requests
# While no worker is ready, after the last one has ended: jobs wait this long for the one that
# replaces it.
REPLACEMENT_SECONDS = 30
# Images of so many bytes together are kept until they are answered, to send them once more.
KEPT_BYTES = 32 << 20
# A job that workers worked on when they ended, so many times, is not sent once more.
MAX_FAILURES = 2
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
        "name",
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
        name: bytes,
    ) -> None:
        """Wait for the answers that are UNANSWERED.

        deadline: in seconds of time.monotonic().
        name: the request id, if workers need it, else empty.
        """
        self.dispatcher = dispatcher
        self.answers = answers
        self.deadline = deadline
        self.on_done = on_done
        self.name = name
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


class PendingJob:
    """An image that waits for the answer of a worker."""

    __slots__ = ("body", "failures", "flags", "index", "request", "top_k")

    def __init__(
        self, request: PendingRequest, index: int, body: bytes, top_k: int, flags: int
    ) -> None:
        self.request = request
        self.index = index  # position of the image in the request
        self.body: bytes | None = body  # None if it is not kept
        self.top_k = top_k
        self.flags = flags
        self.failures = 0  # how many workers have ended while they worked on it


class WorkerConnection(asyncio.Protocol):
    """The connection to one worker.

    Jobs of one iteration of the event loop are sent in one write.
    """

    def __init__(self, dispatcher: "Dispatcher", worker: int) -> None:
        self.dispatcher = dispatcher
        self.worker = worker
        self.buffer = bytearray()
        self.outgoing: list[bytes] = []  # frames for the next write

        self.pending: dict[int, PendingJob] = {}  # by job id

        self.model: dict[str, Any] | None = None  # None until the worker has described its model
        self.version = 0  # of that model
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # Implementation of asyncio.Protocol.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Store the transport, and open what the worker records of its jobs."""
        self.transport = transport
        self.active_jobs = open_active_jobs(self.dispatcher.run_directory, self.worker)

    def connection_lost(self, exc: Exception | None) -> None:
        """Answer the image on which the worker has failed with 422, and send the others again."""
        if not self.closed.done():
            self.closed.set_result(None)
        was_ready = self.model is not None
        self.model = None
        self.dispatcher.refresh_ready_workers()
        if was_ready:
            self.dispatcher.expect_replacement()

        with self.active_jobs:
            failures = read_failures(self.active_jobs)
        self._mark_suspects(failures)
        refusals = self._build_refusals(failures)

        jobs = list(self.pending.items())
        self.pending.clear()
        for job_id, job in jobs:
            self.dispatcher.release_body(job)
            answer = refusals.get(job_id)
            if answer is None:
                if self.dispatcher.send_again(job):
                    continue
                answer = Answer(job_id, 503, 0, WORKER_LOST)
            job.request.set_answer(job.index, answer)

    def _mark_suspects(self, failures: Failures) -> None:
        """Mark the jobs that may be why the worker has failed.

        Those of a failed run of several images run alone from now on.
        """
        for job_id in failures.select_jobs(failures.suspects, os.getpid()):
            job = self.pending.get(job_id)
            if job is not None:
                job.failures += 1
        for failure in failures.failed:
            if len(failure.jobs) == 1:
                continue
            for job_id in failures.select_jobs(failure.jobs, os.getpid()):
                job = self.pending.get(job_id)
                if job is not None:
                    job.flags |= ALONE

    def _build_refusals(self, failures: Failures) -> dict[int, Answer]:
        """Return the answers to the images on which the worker has failed, by job id.

        Where it failed on several images at once, none of them is refused yet.
        """
        refusals: dict[int, Answer] = {}
        for failure in failures.failed:
            if len(failure.jobs) > 1:
                continue
            detail = HANGING_IMAGE if failure.is_hang else CRASHING_IMAGE
            for job_id in failures.select_jobs(failure.jobs, os.getpid()):
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
            self.dispatcher.release_body(job)
            job.request.set_answer(job.index, answer)

    def submit(self, job: PendingJob, body: bytes) -> None:
        """Send a job whose image is `body`."""
        job_ids = self.dispatcher.job_ids
        job_id = next(job_ids) & MAX_U32
        if job_id == MODEL_INFO:
            job_id = next(job_ids) & MAX_U32

        self.pending[job_id] = job
        request = job.request
        request.jobs.append((self, job_id))
        name = build_image_name(request.name, job.index) if request.name else b""
        self._send(Job(job_id, request.deadline, job.top_k, job.flags, body, name))
        self.dispatcher.keep_body(job, body)

    def cancel(self, job_id: int) -> None:
        """Drop a job, if it is still without an answer."""
        job = self.pending.pop(job_id, None)
        if job is not None:
            self.dispatcher.release_body(job)
            self._send(Job(job_id, 0.0, 0, CANCEL, b""))

    def send_notice(self, name: bytes, flags: int, body: bytes = b"") -> None:
        """Tell the worker about an earlier image: a job with LABEL or FORGET."""
        self._send(Job(0, 0.0, 0, flags, body, name))

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
        self.publishes_ready = False  # not before clients can connect
        self.job_ids = count(1)  # of all workers, so that a new connection repeats none

        # Jobs that wait for the worker that replaces the last one, until when it is expected
        # (seconds of time.monotonic()), and the timer that gives up then.
        self.waiting_jobs: list[PendingJob] = []
        self.replacement_end = 0.0
        self._replacement_timer: asyncio.TimerHandle | None = None
        self.kept_bytes = 0  # of the images of all pending jobs that are kept

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

    async def wait_for_running_workers(self) -> None:
        """Wait for the connection to a worker, if there are any that run.

        A process that replaces another one accepts no requests before it can answer them.
        """
        end = time.monotonic() + CONNECT_SECONDS
        while not self.ready_workers and time.monotonic() < end:
            if not any(self.state.has_started(number) for number in range(self.worker_count)):
                return
            await asyncio.sleep(RECONNECT_SECONDS)

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
        """Recompute which workers accept jobs, and send them those that wait for a worker."""
        self.ready_workers = [
            connection
            for connection in self.connections
            if connection is not None and connection.model is not None
        ]
        self._set_ready_metric(self.is_ready and self.publishes_ready)
        if self.ready_workers and self.waiting_jobs:
            self._send_waiting_jobs()

    def start_publishing(self) -> None:
        """Publish from now on whether all workers accept jobs, as a metric."""
        self.publishes_ready = True
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
        name: bytes = b"",
    ) -> PendingRequest:
        """Send each image that is UNANSWERED in `answers` to the worker with the fewest jobs.

        `accepts_jobs` must hold. `on_done` is not called before this method returns.
        """
        deadline = time.monotonic() + timeout_seconds
        request = PendingRequest(self, answers, deadline, on_done, name)
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
            job = PendingJob(request, index, body, top_k, flags)
            if not workers:
                self._add_waiting_job(job)
                continue
            worker = workers[0]
            if len(workers) > 1:
                worker = min(workers, key=_count_pending_jobs)
            worker.submit(job, body)

    # Jobs whose worker has ended.

    @property
    def accepts_jobs(self) -> bool:
        """Whether a worker is ready, or one that replaces the last is expected soon."""
        return bool(self.ready_workers) or time.monotonic() < self.replacement_end

    def expect_replacement(self) -> None:
        """Let jobs wait from now on for a worker that replaces one which has ended."""
        if not self.state.draining:  # then none is replaced
            self.replacement_end = time.monotonic() + REPLACEMENT_SECONDS

    def keep_body(self, job: PendingJob, body: bytes) -> None:
        """Keep the image of a job that is sent, unless many bytes are kept already."""
        if self.kept_bytes + len(body) > KEPT_BYTES:
            job.body = None
            return
        self.kept_bytes += len(body)

    def release_body(self, job: PendingJob) -> None:
        """Count the image of a job no longer, which has an answer or is sent once more."""
        if job.body is not None:
            self.kept_bytes -= len(job.body)

    def send_again(self, job: PendingJob) -> bool:
        """Send a job whose worker has ended to another one; return False where that can't be."""
        if job.body is None or job.failures >= MAX_FAILURES or self.state.stopping:
            return False
        if self.ready_workers:
            worker = min(self.ready_workers, key=_count_pending_jobs)
            worker.submit(job, job.body)
            return True
        if not self.accepts_jobs:
            return False
        self._add_waiting_job(job)
        return True

    def _add_waiting_job(self, job: PendingJob) -> None:
        self.waiting_jobs.append(job)
        if self._replacement_timer is None:
            self._replacement_timer = self.loop.call_later(
                REPLACEMENT_SECONDS, self._refuse_waiting_jobs
            )

    def _send_waiting_jobs(self) -> None:
        """Send the jobs that wait for a worker, except those of requests that are over."""
        for job in self._take_waiting_jobs():
            if not self.send_again(job):
                job.request.set_answer(job.index, Answer(0, 503, 0, WORKER_LOST))

    def _refuse_waiting_jobs(self) -> None:
        """Answer the jobs for which no worker has come with 503."""
        for job in self._take_waiting_jobs():
            job.request.set_answer(job.index, Answer(0, 503, 0, WORKER_LOST))

    def _take_waiting_jobs(self) -> list[PendingJob]:
        if self._replacement_timer is not None:
            self._replacement_timer.cancel()
            self._replacement_timer = None
        jobs = [job for job in self.waiting_jobs if job.request in self.pending_requests]
        self.waiting_jobs = []
        return jobs

    def _resend(
        self,
        request: PendingRequest,
        images: list[bytes],
        top_k: int,
        flags: int,
        indices: list[int],
    ) -> None:
        """Send the images at these positions once more, to get all answers from the new version."""
        if not self.accepts_jobs:
            request.finish()
            return
        for index in indices:
            request.answers[index] = UNANSWERED
        request.missing = len(indices)
        self._send_jobs(request, images, top_k, flags)

    def send_notice(self, name: bytes, flags: int, body: bytes = b"") -> None:
        """Tell all workers about an earlier image; the one that answered it knows the name."""
        for worker in self.ready_workers:
            worker.send_notice(name, flags, body)

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
