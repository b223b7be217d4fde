"""When to restart a process that fails."""

import math
import time

MAX_PAUSE_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.1  # doubled for each failure in a row, also for those without a pause
FAILURES_WITHOUT_PAUSE = 5


class RestartPolicy:
    """Decides when a process may be checked and restarted again.

    The pauses grow while it keeps failing within MAX_PAUSE_SECONDS of its start.
    """

    def __init__(self) -> None:
        self.failures = 0  # in a row
        self.last_start = 0.0  # seconds of time.monotonic()
        self.next_check = 0.0

    def is_check_due(self) -> bool:
        """Whether the process may be checked now."""
        return time.monotonic() >= self.next_check

    def record_restart(self) -> None:
        """Record that the process failed, and that a restart was tried."""
        now = time.monotonic()
        if now - self.last_start < MAX_PAUSE_SECONDS:
            self.failures += 1
        else:
            self.failures = 0
        self.last_start = now

        self.next_check = now
        if self.failures > FAILURES_WITHOUT_PAUSE:
            self.next_check += min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**self.failures)

    def give_up(self) -> None:
        """Never check the process again."""
        self.next_check = math.inf
