"""Shutdown notices: SIGTERM, as a spot node or Kubernetes sends it, and Ctrl-C.

While the network trains, the handler only records the signal; the loop then stops between two
steps and writes a checkpoint (train/runs/resume.py). Where the step does not end in time, a copy of
the state after the step before is written instead. At any other time there is nothing to save, as
every file appears complete or not at all, and the process ends at once. In all cases it ends within
`seconds`, with status 143 (130 after Ctrl-C). The same command resumes; a run that was interrupted
while it wrote its bundle resumes with the bundle. All training processes use this.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SHUTDOWN_SECONDS = 9.0  # by default, from the signal to the end of the process, at most
STEP_SHARE = 0.5  # of that time: for the step to end by itself; the rest is for writing a copy


class Preempted(SystemExit):
    """Ends the process with the status of a signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class ShutdownNotice:
    """The shutdown notice that this process has received, if any."""

    def __init__(self) -> None:
        self.signum = 0  # of the first signal; 0 without a notice
        self.seconds = SHUTDOWN_SECONDS  # from the signal to the end of the process, at most
        self._is_deferred = False
        self._send_signal: Callable[[int], None] | None = None
        self._save_copy: Callable[[], int | None] | None = None

    def install_handlers(self) -> None:
        """Handle SIGTERM and SIGINT from now on, in this process."""
        self.signum = 0
        self.stop_deferring()
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._handle)

    @contextmanager
    def record_interrupts(self) -> Iterator[None]:
        """Within the block, stop the run on Ctrl-C, but never end the process.

        For a run inside of another program, whose handler is restored after the block: the run
        saves its state and raises Preempted. In other threads than the main one Python handles no
        signals, so Ctrl-C does not reach the run.
        """
        self.signum = 0
        self.stop_deferring()
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        previous_handler = signal.signal(signal.SIGINT, self._record)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous_handler or signal.SIG_DFL)
            self.signum = 0
            self.stop_deferring()

    def forward_with(self, send_signal: Callable[[int], None] | None) -> None:
        """Pass signals on to the processes that this one has started."""
        self._send_signal = send_signal

    def defer(self, seconds: float, save_copy: Callable[[], int | None]) -> None:
        """From now on only record a signal: the training loop checks `signum` between steps.

        The process ends `seconds` after the signal at the latest. Where the step still runs after
        half of that time, `save_copy` is called in another thread: it writes the state after an
        earlier step, and returns the number of that step, or None where there is no copy.
        """
        self.seconds = seconds
        self._save_copy = save_copy
        self._is_deferred = True

    def stop_deferring(self) -> None:
        """From now on a signal ends the process at once."""
        self._save_copy = None
        self._is_deferred = False

    def _record(self, signum: int, frame: FrameType | None) -> None:
        """Record a signal. A second one, or one that is not deferred, stops the run at once."""
        is_repeated = bool(self.signum)
        self.signum = signum
        if is_repeated or not self._is_deferred:
            raise Preempted(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Record the first signal, forward it, and end the process unless that is deferred."""
        if self.signum == signal.SIGINT and signum == signal.SIGINT:
            os._exit(128 + signum)  # a second Ctrl-C does not wait for the end of the step

        if self.signum:
            return
        self.signum = signum

        threading.Thread(target=self._end_in_time, daemon=True).start()
        if self._send_signal is not None:
            self._send_signal(signum)
        if not self._is_deferred:
            raise Preempted(signum)

    def _end_in_time(self) -> None:
        """End the process when the time is over, while a step still runs."""
        deadline = time.monotonic() + self.seconds
        time.sleep(self.seconds * STEP_SHARE)
        step = self._save_copy() if self._save_copy is not None else None
        time.sleep(max(0.0, deadline - time.monotonic()))

        source = "the last checkpoint" if step is None else f"step {step}"
        print(
            f"train: the step did not end within {self.seconds:g} s of the signal; the next start "
            f"resumes from {source}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + self.signum)


NOTICE = ShutdownNotice()  # one a process, as signal handlers are
