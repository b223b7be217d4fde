"""Shutdown notices: SIGTERM, as a spot node or Kubernetes sends it, and Ctrl-C.

While the network trains, the handler only records the signal; the loop then stops between two
steps and writes a checkpoint (train/runs/resume.py). At any other time there is nothing to save, as
every file appears complete or not at all, and the process ends at once. In both cases it ends
within `SHUTDOWN_SECONDS`, with status 143 (130 after Ctrl-C). The same command resumes; a run that
was interrupted while it wrote its bundle resumes with the bundle. All training processes use this.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

SHUTDOWN_SECONDS = 9.0  # from the signal to the end of the process, at most


class Preempted(SystemExit):
    """Ends the process with the status of a signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class ShutdownNotice:
    """The shutdown notice that this process has received, if any."""

    def __init__(self) -> None:
        self.signum = 0  # of the first signal; 0 without a notice
        self._is_deferred = False
        self._send_signal: Callable[[int], None] | None = None

    def install_handlers(self) -> None:
        """Handle SIGTERM and SIGINT from now on, in this process."""
        self.signum = 0
        self._is_deferred = False
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._handle)

    def forward_with(self, send_signal: Callable[[int], None] | None) -> None:
        """Pass signals on to the processes that this one has started."""
        self._send_signal = send_signal

    def defer(self) -> None:
        """From now on only record a signal: the training loop checks `signum` between steps."""
        self._is_deferred = True

    def stop_deferring(self) -> None:
        """From now on a signal ends the process at once."""
        self._is_deferred = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Record the first signal, forward it, and end the process unless that is deferred."""
        if self.signum == signal.SIGINT and signum == signal.SIGINT:
            os._exit(128 + signum)  # a second Ctrl-C does not wait for the end of the step

        if self.signum:
            return
        self.signum = signum

        timer = threading.Timer(SHUTDOWN_SECONDS, self._exit_late)
        timer.daemon = True
        timer.start()
        if self._send_signal is not None:
            self._send_signal(signum)
        if not self._is_deferred:
            raise Preempted(signum)

    def _exit_late(self) -> None:
        """End the process while a step still runs."""
        print(
            f"train: the step did not end within {SHUTDOWN_SECONDS:.0f} s of the signal; the next "
            "start resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.signum)


NOTICE = ShutdownNotice()  # one a process, as signal handlers are
