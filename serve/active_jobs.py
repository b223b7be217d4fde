"""The jobs that each predictor of a worker processes now, to find the cause of a failure.

A worker writes `<run_directory>/worker-<number>.jobs` in shared memory. When it has ended, HTTP
processes read which jobs were processed by the thread that hung or received a fatal signal. A job
is named by the process that sent it and by its number among the jobs of that process.

The file begins with one record of numbers (uint64) for each predictor: the thread, whether it
hangs, the number of its jobs, and those jobs. What follows is the report of `faulthandler` on a
fatal signal, such as SIGSEGV or SIGABRT. It names the thread.
"""

import faulthandler
import mmap
import os
import re
import threading
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

# The layout of a record.
_THREAD = 0
_HANGS = 1
_COUNT = 2
_JOBS = 3

_HEAD_SIZE = 2  # numbers before the records: how many there are, and the numbers of each
_NUMBER_BYTES = 8
_CRASHED_THREAD = re.compile(rb"^Current thread 0x([0-9a-f]+) ", re.MULTILINE)


JobName = tuple[int, int]
"""The process that sent a job, and the number of the job."""


class Failure(NamedTuple):
    """The jobs of one predictor that hung or crashed."""

    is_hang: bool
    jobs: list[JobName]


class Failures(NamedTuple):
    """What is known of the end of a worker."""

    failed: list[Failure]

    suspects: list[JobName]
    """The jobs that may be the cause: those that failed or, where that is unknown, all of those
    that the worker processed when it ended."""

    @staticmethod
    def select_jobs(jobs: list[JobName], process: int) -> list[int]:
        """Return the numbers of the jobs that a process has sent."""
        return [job for sender, job in jobs if sender == process]


def _file_path(run_directory: str, worker: int) -> str:
    return os.path.join(run_directory, f"worker-{worker}.jobs")


class ActiveJobs:
    """The records of a worker, which writes them. Each predictor writes its own record."""

    def __init__(self, run_directory: str, worker: int, predictors: int, max_batch_size: int):
        """Replace the file of an earlier worker, which HTTP processes may still read."""
        path = _file_path(run_directory, worker)
        new_path = f"{path}.new"
        self.record_size = _JOBS + max_batch_size
        size_bytes = _NUMBER_BYTES * (_HEAD_SIZE + predictors * self.record_size)

        # It stays open: faulthandler writes its report after the records.
        self.file = open(new_path, "w+b", buffering=0)  # noqa: SIM115
        self.file.truncate(size_bytes)
        self.numbers = memoryview(mmap.mmap(self.file.fileno(), size_bytes)).cast("Q")
        self.numbers[0] = predictors
        self.numbers[1] = self.record_size
        self.file.seek(size_bytes)
        faulthandler.enable(self.file)
        os.replace(new_path, path)

    def set_thread(self, predictor: int) -> None:
        """Publish that the calling thread is this predictor."""
        self.numbers[self._position(predictor) + _THREAD] = threading.get_ident()

    def set_job(self, predictor: int, job: int) -> None:
        """Publish that a predictor processes one job, whose key `build_key` returns."""
        position = self._position(predictor)
        self.numbers[position + _JOBS] = job
        self.numbers[position + _COUNT] = 1

    def set_jobs(self, predictor: int, jobs: Sequence[int]) -> None:
        """Publish the jobs that a predictor processes at once."""
        position = self._position(predictor)
        for i, job in enumerate(jobs):
            self.numbers[position + _JOBS + i] = job
        self.numbers[position + _COUNT] = len(jobs)

    def set_hanging(self, predictor: int) -> None:
        """Publish that a predictor hangs; the worker ends."""
        self.numbers[self._position(predictor) + _HANGS] = 1

    def _position(self, predictor: int) -> int:
        return _HEAD_SIZE + predictor * self.record_size


def build_key(process_id: int, job_id: int) -> int:
    """Return the number of 64 bits that names a job of an HTTP process."""
    return process_id << 32 | job_id


def open_active_jobs(run_directory: str, worker: int) -> BinaryIO:
    """Open the file of a worker that runs. A later worker replaces the file."""
    return open(_file_path(run_directory, worker), "rb")


def read_failures(file: BinaryIO) -> Failures:
    """Return the jobs at which a worker that has ended failed; none where that is unknown.

    SIGKILL leaves no report: the kernel sends it for lack of memory, which no single job need have
    taken.
    """
    content = file.read()
    numbers = memoryview(content[: len(content) // _NUMBER_BYTES * _NUMBER_BYTES]).cast("Q")
    predictors = numbers[0]
    record_size = numbers[1]
    records_end = _HEAD_SIZE + predictors * record_size

    busy: list[memoryview] = []
    for start in range(_HEAD_SIZE, records_end, record_size):
        record = numbers[start : start + record_size]
        if record[_COUNT]:
            busy.append(record)

    failed = [record for record in busy if record[_HANGS]]
    if not failed:
        failed = _find_crashed(busy, content[_NUMBER_BYTES * records_end :])
    suspects: list[JobName] = []
    for record in failed or busy:
        suspects += _read_failure(record).jobs
    return Failures([_read_failure(record) for record in failed], suspects)


def _find_crashed(busy: list[memoryview], report: bytes) -> list[memoryview]:
    """Return the record of the thread that received a fatal signal.

    A thread of the engine is no predictor. It works for the only predictor that is busy.
    """
    if not report:
        return []
    match = _CRASHED_THREAD.search(report)
    thread = int(match[1], 16) if match is not None else 0
    crashed = [record for record in busy if record[_THREAD] == thread]
    if not crashed and len(busy) == 1:
        return busy
    return crashed


def _read_failure(record: memoryview) -> Failure:
    keys = record[_JOBS : _JOBS + record[_COUNT]].tolist()
    jobs = [(key >> 32, key & 0xFFFFFFFF) for key in keys]
    return Failure(bool(record[_HANGS]), jobs)
