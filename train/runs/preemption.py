"""What becomes of a notice to end: SIGTERM, as a node that is taken away sends it, or Ctrl-C.

While the network trains, the notice is noted and the loop stops between two steps with a checkpoint (train/runs/resume.py).
At any other time there is nothing to save, as all that is written appears whole or not at all: the process ends at
once. Either way it does so within `SECONDS`, with the status 143 (130 after Ctrl-C) that says "not finished", and the
same command goes on later. Ended while the bundle is written, it goes on with the bundle.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

SECONDS = 9.0  # from the notice to the end, whatever happens


class Preempted(SystemExit):
    """Ends the process with the status of the signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class Notice:
    """The notice to end that this process got, if any."""

    def __init__(self) -> None:
        self.signum = 0
        self.training = False  # whether someone looks at `signum` between steps
        self.forward: Callable[[int], None] | None = None  # tells processes that this one started

    def listen(self) -> None:
        """From now on, in this process."""
        self.signum, self.training = 0, False
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._heard)

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if self.signum == signal.SIGINT == signum:
            os._exit(128 + signum)  # Ctrl-C again: a person who can't wait
        first, self.signum = not self.signum, self.signum or signum
        if not first:
            return
        watch = threading.Timer(SECONDS, self._late)
        watch.daemon = True
        watch.start()
        if self.forward is not None:
            self.forward(signum)
        if not self.training:
            raise Preempted(signum)

    def _late(self) -> None:
        print(
            f"train: no end of the step within {SECONDS:.0f} s of the notice; the next start goes on from the last "
            "checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.signum)


NOTICE = Notice()  # signals are the process's, and so is this
