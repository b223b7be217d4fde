"""Measure for how long a thread makes no progress, apart from the time it waits for a core.

On a busy machine a thread may take many times as long as alone. It is not stuck then: the kernel
counts how long each thread has waited for a core (`/proc/<process>/task/<thread>/schedstat`). A
thread that is stuck either uses CPU time without end, or waits for something that does not happen.
"""

import os
import time
from typing import NamedTuple

MAX_STEP_SECONDS = 2.0
"""Time between two updates that counts at most: more means that the caller was suspended."""

_NANOSECOND = 1e-9


class ThreadTimes(NamedTuple):
    """What the kernel counts of a thread, in seconds."""

    cpu: float
    waiting: float
    """For a core, while it could run."""


class StallTimer:
    """The timer of one thread. It is updated at regular intervals."""

    def __init__(self, process: int, thread: int):
        self.process = process
        self.thread = thread
        self.progress: float | None = None
        self.last_update = time.monotonic()
        self.elapsed = 0.0
        self.start: dict[int, ThreadTimes] | None = None

    def update(self, progress: float | None) -> float:
        """Return the seconds since progress was made.

        `progress` is any number that changes with it, or None while the thread has nothing to do.
        """
        now = time.monotonic()
        step = min(now - self.last_update, MAX_STEP_SECONDS)
        self.last_update = now
        if progress is None or progress != self.progress:
            self.progress = progress
            self.start = None
            return 0.0

        if self.start is None:
            self.start = read_thread_times(self.process)
            self.elapsed = 0.0
            return 0.0
        self.elapsed += step
        return self._stalled_seconds(self.start)

    def _stalled_seconds(self, start: dict[int, ThreadTimes]) -> float:
        """Return its CPU time, or the time in which neither it nor a thread it waits for waited.

        It may wait for any thread of the process: for the interpreter's lock, or a part of a run.
        """
        times = read_thread_times(self.process)
        if self.thread not in times:
            return self.elapsed  # this kernel does not count

        unknown = ThreadTimes(0.0, 0.0)
        own = times.pop(self.thread)
        own_start = start.get(self.thread, own)
        cpu_seconds = own.cpu - own_start.cpu
        if _is_runnable(self.process, self.thread):
            return cpu_seconds

        others_waiting = [
            thread_times.waiting - start.get(thread, unknown).waiting
            for thread, thread_times in times.items()
        ]
        waiting = own.waiting - own_start.waiting + max(others_waiting, default=0.0)
        return max(cpu_seconds, self.elapsed - waiting)


def read_thread_times(process: int) -> dict[int, ThreadTimes]:
    """Return the times of the threads of a process; empty where the kernel does not count them."""
    times: dict[int, ThreadTimes] = {}
    directory = f"/proc/{process}/task"
    try:
        threads = os.listdir(directory)
    except OSError:
        return times
    for thread in threads:
        try:
            with open(f"{directory}/{thread}/schedstat") as file:
                cpu, waiting, _ = file.read().split()
        except (OSError, ValueError):  # it has ended, or the kernel does not count
            continue
        times[int(thread)] = ThreadTimes(int(cpu) * _NANOSECOND, int(waiting) * _NANOSECOND)
    return times


def _is_runnable(process: int, thread: int) -> bool:
    """Whether a thread runs or waits for a core. The kernel counts a wait when it is over."""
    try:
        with open(f"/proc/{process}/task/{thread}/stat") as file:
            _, _, fields = file.read().rpartition(") ")
    except OSError:
        return False
    return fields.startswith("R")
