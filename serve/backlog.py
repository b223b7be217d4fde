"""The jobs that wait in a worker, and how batches form from them: from the backlog, never from a timer unless asked."""
import threading
import time
from collections import deque
from typing import Any

from serve.frames import Job


class Waiting:
    """One job in the backlog, with the connection that its answer goes to."""

    __slots__ = ("arrived", "job", "peer")

    def __init__(self, peer: Any, job: Job, arrived: float):
        self.peer, self.job, self.arrived = peer, job, arrived


class Backlog:
    """Work-conserving: a free predictor takes what is there. Free predictors share it, so that every core has work."""

    def __init__(self, predictors: int, max_batch: int, wait_seconds: float = 0.0):
        self.free, self.predictors, self.max_batch, self.wait = 0, predictors, max_batch, wait_seconds
        self.queue: deque[Waiting] = deque()
        self.changed = threading.Condition()

    def put(self, items: list[Waiting]) -> None:
        with self.changed:
            self.queue.extend(items)
            self.changed.notify(len(items))

    def take(self) -> tuple[list[Waiting], bool]:
        """Block until there is work. Returns a batch, and whether it is alone: nothing else waits or runs."""
        with self.changed:
            self.free += 1
            while not self.queue:
                self.changed.wait()
            if self.wait:
                self._wait_for_company()
            share = -(-len(self.queue) // self.free)
            batch = [self.queue.popleft() for _ in range(min(self.max_batch, share))]
            alone = self.free == self.predictors and not self.queue
            self.free -= 1
            return batch, alone

    def _wait_for_company(self) -> None:
        end = time.monotonic() + self.wait
        while 0 < len(self.queue) < self.max_batch and (left := end - time.monotonic()) > 0:
            self.changed.wait(left)
        while not self.queue:
            self.changed.wait()

    def more(self, room: int) -> list[Waiting]:
        """What came meanwhile, for a batch that has room and has not run yet."""
        with self.changed:
            return [self.queue.popleft() for _ in range(min(room, len(self.queue)))]

    def remove(self, peer: Any, number: int | None = None) -> None:
        """Drop the job of this number, or every job of a connection that is gone."""
        with self.changed:
            self.queue = deque(w for w in self.queue
                               if w.peer is not peer or (number is not None and w.job.id != number))
