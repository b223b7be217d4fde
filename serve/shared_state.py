"""A page of memory that all processes of the service share: who is busy, who is alive, are we draining.

Each number has one writer, so no lock is needed; what a reader sums may be a few microseconds old.
"""

import mmap
import os
import time

FILE = "state"
SLOTS = 64  # of each kind
PREDICTORS = 1024
START_SECONDS = 120  # for a worker to load its model
_DRAINING, _STOPPING, _REFUSING, _PENDING, _REQUESTS, _BYTES, _BEAT, _RUN = (
    0,
    1,
    2,
    64,
    128,
    192,
    256,
    320,
)
_BUSY = 384
_SIZE = 8 * (_BUSY + SLOTS * PREDICTORS)


class SharedState:
    """Maps `<run>/state`, which `SharedState.create` made."""

    def __init__(self, run: str):
        with open(os.path.join(run, FILE), "r+b") as file:
            self.page = memoryview(mmap.mmap(file.fileno(), _SIZE)).cast("d")

    @classmethod
    def create(cls, run: str) -> "SharedState":
        with open(os.path.join(run, FILE), "wb") as file:
            file.truncate(_SIZE)
        return cls(run)

    # Set by the supervisor alone. Draining: not ready, and each answer closes its connection. Refusing: what was
    # accepted is answered, no more. Stopping: processes may end.

    @property
    def draining(self) -> bool:
        return self.page[_DRAINING] != 0

    def drain(self) -> None:
        self.page[_DRAINING] = 1

    @property
    def refusing(self) -> bool:
        return self.page[_REFUSING] != 0

    def refuse(self) -> None:
        self.page[_REFUSING] = 1

    @property
    def stopping(self) -> bool:
        return self.page[_STOPPING] != 0

    def stop(self) -> None:
        self.page[_STOPPING] = 1

    # Counts of HTTP processes: each writes its own slot, all read the sum.

    def set_pending(self, api: int, images: int, requests: int, body_bytes: int) -> None:
        page = self.page
        page[_PENDING + api], page[_REQUESTS + api], page[_BYTES + api] = (
            images,
            requests,
            body_bytes,
        )

    def pending(self, apis: int) -> int:
        return int(sum(self.page[_PENDING : _PENDING + apis]))

    def requests(self, apis: int) -> int:
        return int(sum(self.page[_REQUESTS : _REQUESTS + apis]))

    def body_bytes(self, apis: int) -> int:
        return int(sum(self.page[_BYTES : _BYTES + apis]))

    # Signs of life of workers.

    def beat(self, worker: int) -> None:
        self.page[_BEAT + worker] = time.monotonic()

    def has_started(self, worker: int) -> bool:
        return self.page[_BEAT + worker] <= time.monotonic()

    def begin(self, worker: int, predictor: int) -> float:
        """An image, or a run of the graph. Returns the time."""
        self.page[_BUSY + worker * PREDICTORS + predictor] = now = time.monotonic()
        return now

    def end(self, worker: int, predictor: int) -> None:
        self.page[_BUSY + worker * PREDICTORS + predictor] = 0

    def set_run_seconds(self, worker: int, seconds: float) -> None:
        """How long its graph takes for a whole batch on one core, when nothing is wrong."""
        self.page[_RUN + worker] = seconds

    def run_seconds(self, worker: int) -> float:
        return self.page[_RUN + worker]

    def reset(self, worker: int) -> None:
        """A new worker takes this place, and has some time until its first beat."""
        self.page[_BEAT + worker] = time.monotonic() + START_SECONDS
        self.set_run_seconds(worker, 0)
        for i in range(PREDICTORS):
            self.end(worker, i)

    def silent_seconds(self, worker: int, predictors: int) -> float:
        """How long a worker has shown no progress: its heartbeat, or a predictor with one image or run."""
        first = _BUSY + worker * PREDICTORS
        signs = [self.page[_BEAT + worker], *self.page[first : first + predictors]]
        since = min((s for s in signs if s), default=0.0)
        return time.monotonic() - since if since else 0.0
