"""A bound on the memory that all workers hold together for images that are being decoded."""

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from models.image import SHARED_BYTES
from serve.shared_state import SharedState

LOCK_NAME = "decoding.lock"
POLL_SECONDS = 0.002  # while others hold too much


class DecodingMemory:
    """The part of one worker. An image that takes more than the bound is decoded alone.

    Each worker publishes what it holds. Only the worker whose turn it is may take more, first come,
    first served. The turn is a lock on a file, which the kernel frees if the worker ends.
    """

    def __init__(self, run_directory: str, state: SharedState, worker: int, workers: int):
        self.state = state
        self.worker = worker
        self.workers = workers
        self.held_bytes = 0  # by this worker
        self.count_lock = threading.Lock()  # guards held_bytes
        self.turn = threading.Lock()  # among the threads of this worker
        self.lock_path = os.path.join(run_directory, LOCK_NAME)

    @contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Wait until `amount` bytes are free, or all if that is more; hold them in the block."""
        amount = min(amount, SHARED_BYTES)
        with self.turn, self._locked_file():
            while self.state.decoding_bytes(self.workers) + amount > SHARED_BYTES:
                time.sleep(POLL_SECONDS)
            self._add(amount)
        try:
            yield
        finally:
            self._add(-amount)

    @contextmanager
    def _locked_file(self) -> Iterator[None]:
        with open(self.lock_path, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _add(self, amount: int) -> None:
        with self.count_lock:
            self.held_bytes += amount
            self.state.set_decoding_bytes(self.worker, self.held_bytes)
