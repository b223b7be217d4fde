"""A page of shared memory with the state that all processes of the service read.

It holds the phase of the shutdown, how much work each HTTP process has accepted, the heartbeat of
each worker, and the memory it decodes images in. No number depends on what it was before, so no
lock is needed. A sum over several numbers may be a few microseconds old. Times are seconds of
`time.monotonic()`, which all processes of a machine share.
"""

import mmap
import os
import time

FILE_NAME = "state"
MAX_PROCESSES = 64  # HTTP processes, and workers
START_SECONDS = 120  # a new worker may take this long to load its model

# The layout: indices into the page, which is an array of float64.
# Flags, written by the supervisor.
_DRAINING = 0
_STOPPING = 1
_REFUSING = 2
# One number for each HTTP process, written by that process.
_PENDING_IMAGES = 64
_PENDING_REQUESTS = 128
_PENDING_BYTES = 192
# One number for each worker, written by that worker; the supervisor resets it before it starts the
# worker.
_HEARTBEAT = 256
_DECODING_BYTES = 320
_SIZE_BYTES = 8 * (_DECODING_BYTES + MAX_PROCESSES)


class SharedState:
    """A view of `<run_directory>/state`, which `SharedState.create` makes."""

    def __init__(self, run_directory: str):
        with open(os.path.join(run_directory, FILE_NAME), "r+b") as file:
            self.page = memoryview(mmap.mmap(file.fileno(), _SIZE_BYTES)).cast("d")

    @classmethod
    def create(cls, run_directory: str) -> "SharedState":
        """Make the file, all zeros, and return a view of it."""
        with open(os.path.join(run_directory, FILE_NAME), "wb") as file:
            file.truncate(_SIZE_BYTES)
        return cls(run_directory)

    # The phases of the shutdown. Only the supervisor sets them.

    @property
    def draining(self) -> bool:
        """Whether the service is no longer ready; each response closes its connection."""
        return self.page[_DRAINING] != 0

    def set_draining(self) -> None:
        """Begin the shutdown."""
        self.page[_DRAINING] = 1

    @property
    def refusing(self) -> bool:
        """Whether new requests get 503; those that were accepted are still answered."""
        return self.page[_REFUSING] != 0

    def set_refusing(self) -> None:
        """Refuse new requests from now on."""
        self.page[_REFUSING] = 1

    @property
    def stopping(self) -> bool:
        """Whether processes may end on SIGTERM."""
        return self.page[_STOPPING] != 0

    def set_stopping(self) -> None:
        """Let processes end from now on."""
        self.page[_STOPPING] = 1

    # The work that HTTP processes have accepted and not yet answered. All processes read the sums.

    def set_pending(self, http_process: int, images: int, requests: int, body_bytes: int) -> None:
        """Publish the counts of one HTTP process."""
        page = self.page
        page[_PENDING_IMAGES + http_process] = images
        page[_PENDING_REQUESTS + http_process] = requests
        page[_PENDING_BYTES + http_process] = body_bytes

    def pending_images(self, http_processes: int) -> int:
        """Return the number of images that are accepted and not yet answered."""
        return int(sum(self.page[_PENDING_IMAGES : _PENDING_IMAGES + http_processes]))

    def pending_requests(self, http_processes: int) -> int:
        """Return the number of requests that are accepted and not yet answered."""
        return int(sum(self.page[_PENDING_REQUESTS : _PENDING_REQUESTS + http_processes]))

    def pending_bytes(self, http_processes: int) -> int:
        """Return the size of the bodies of these requests, in bytes."""
        return int(sum(self.page[_PENDING_BYTES : _PENDING_BYTES + http_processes]))

    # Signs of life of workers.

    def reset_worker(self, worker: int) -> None:
        """Give a worker that starts now START_SECONDS until its first heartbeat."""
        self.page[_DECODING_BYTES + worker] = 0
        self.page[_HEARTBEAT + worker] = time.monotonic() + START_SECONDS

    def set_heartbeat(self, worker: int) -> None:
        """Publish that the worker is alive now."""
        self.page[_HEARTBEAT + worker] = time.monotonic()

    def has_started(self, worker: int) -> bool:
        """Whether the worker has sent a heartbeat."""
        return self.page[_HEARTBEAT + worker] <= time.monotonic()

    def heartbeat(self, worker: int) -> float | None:
        """Return the time of the worker's last heartbeat; None before the first one is due."""
        heartbeat = self.page[_HEARTBEAT + worker]
        return heartbeat if heartbeat <= time.monotonic() else None

    # The memory of images that are being decoded.

    def set_decoding_bytes(self, worker: int, size: int) -> None:
        """Publish how many bytes a worker holds."""
        self.page[_DECODING_BYTES + worker] = size

    def decoding_bytes(self, workers: int) -> int:
        """Return how many bytes all workers hold."""
        return int(sum(self.page[_DECODING_BYTES : _DECODING_BYTES + workers]))
