"""Run `python -m train …` without the seconds that importing torch takes.

One process imports everything once and forks a child for each command. A command is a process of
its own, with its own signals, limits and exit status, that starts in 20 ms instead of 8 s. Run as a
module (`python -m support.train_commands`), this file is that process: it reads a JSON request per
line from stdin and prints the process id of the command.
"""

import atexit
import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import ROOT

TIMEOUT_SECONDS = 280


class TrainCommand:
    """A started command. `log` holds its output."""

    def __init__(self, pid: int, log: Path, status_file: Path) -> None:
        self.pid = pid
        self.log = log
        self._status_file = status_file

    @property
    def text(self) -> str:
        """The output so far."""
        return self.log.read_text()

    def status(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """Wait for the end; return the exit status, 128 plus the signal's number if killed."""
        deadline = time.monotonic() + seconds
        while not self._status_file.exists():
            assert time.monotonic() < deadline, f"still running after {seconds} s: {self.text}"
            time.sleep(0.01)
        return int(self._status_file.read_text())

    def wait_for(self, words: str, seconds: float = TIMEOUT_SECONDS) -> None:
        """Wait until the output contains `words`."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            ended = self._status_file.exists()
            assert not ended, f"ended without printing {words!r}: {self.text}"
            assert time.monotonic() < deadline, f"did not print {words!r} in time: {self.text}"
            time.sleep(0.01)

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)


class TrainCommands:
    """Starts commands. Their working directory is `directory` where none is given."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0
        self._forker = subprocess.Popen(
            [sys.executable, "-m", "support.train_commands"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                "XDG_CACHE_HOME": str(directory / "cache"),
            },
        )

    def start(
        self,
        *argv: object,
        env: dict[str, str | None] | None = None,
        limits: dict[str, int] | None = None,
        cwd: Path | None = None,
    ) -> TrainCommand:
        """Start `python -m train ARGV…`.

        `env`: variables to set, or with None to unset. `limits`: by their names in `resource`.
        """
        self._count += 1
        log = self.directory / f"{self._count}.log"
        log.touch()
        status_file = self.directory / f"{self._count}.status"
        request: dict[str, Any] = {
            "argv": [str(word) for word in argv],
            "env": env or {},
            "limits": limits or {},
            "cwd": str(cwd or self.directory),
            "log": str(log),
            "status_file": str(status_file),
        }
        print(json.dumps(request), file=self._forker.stdin, flush=True)
        pid = int(self._forker.stdout.readline())
        return TrainCommand(pid, log, status_file)

    def run(self, *argv: object, **options: Any) -> TrainCommand:
        """Start a command, wait for its end and assert exit status 0."""
        command = self.start(*argv, **options)
        assert command.status() == 0, command.text
        return command

    def close(self) -> None:
        self._forker.stdin.close()
        self._forker.wait(60)
        self._forker.stdout.close()


def serve_requests() -> None:
    """Read requests from stdin until it closes."""
    import train.cli.main  # slow, and needed by every command

    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            _supervise(request, train.cli.main.main)
        _reap_children()


def _reap_children() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _supervise(request: dict[str, Any], main: Callable[[], int]) -> None:
    """Fork the command, print its process id, wait for its end and write its status."""
    pid = os.fork()
    if pid == 0:
        _run_command(request, main)
    print(pid, flush=True)

    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = code if code >= 0 else 128 - code
    status_file = Path(request["status_file"])
    partial = status_file.with_suffix(".tmp")
    partial.write_text(str(status))
    partial.rename(status_file)
    os._exit(0)


def _run_command(request: dict[str, Any], main: Callable[[], int]) -> None:
    """Become the command: set up this process as requested, run `main` and exit."""
    with open(request["log"], "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for name, value in request["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    os.chdir(request["cwd"])
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))

    sys.argv = ["python -m train", *request["argv"]]
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # C++ libraries would wait for threads that did not survive the fork


if __name__ == "__main__":
    serve_requests()
