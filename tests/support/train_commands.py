"""`python -m train …` many times over: a process that has imported it all forks one for each command.

Each command is a process of its own, with signals, limits and a status of its own, that begins in 20 ms and not in 8 s.
Run as a script, this file is the process that forks: it reads a JSON request a line and answers with the process's id.
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


class TrainCommand:
    """A command that runs. `log` holds what it writes."""

    def __init__(self, pid: int, log: Path, done: Path):
        self.pid, self.log, self._done = pid, log, done

    def status(self, seconds: float = 280) -> int:
        """Wait for its end; as a shell says it: 128 and the signal's number where a signal killed it."""
        end = time.monotonic() + seconds
        while not self._done.exists():
            assert time.monotonic() < end, f"still running after {seconds} s: {self.text}"
            time.sleep(0.01)
        return int(self._done.read_text())

    def wait_for(self, words: str, seconds: float = 280) -> None:
        end = time.monotonic() + seconds
        while words not in self.text:
            assert not self._done.exists(), f"ended before it said {words!r}: {self.text}"
            assert time.monotonic() < end, f"did not say {words!r} within {seconds} s: {self.text}"
            time.sleep(0.01)

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    @property
    def text(self) -> str:
        return self.log.read_text()


class TrainCommands:
    """Starts commands, in `place` unless told otherwise."""

    def __init__(self, place: Path):
        self.place, self._count = place, 0
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self._forker = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": path,
                "XDG_CACHE_HOME": str(place / "cache"),
            },
        )

    def start(
        self,
        *argv: object,
        env: dict[str, str | None] | None = None,
        limits: dict[str, int] | None = None,
        cwd: Path | None = None,
    ) -> TrainCommand:
        """`env`: variables to set, or with None to unset. `limits`: of the resource module, by name."""
        self._count += 1
        log, done = self.place / f"{self._count}.log", self.place / f"{self._count}.status"
        log.touch()
        request: dict[str, Any] = {
            "argv": [str(word) for word in argv],
            "env": env or {},
            "limits": limits or {},
            "cwd": str(cwd or self.place),
            "log": str(log),
            "done": str(done),
        }
        print(json.dumps(request), file=self._forker.stdin, flush=True)
        return TrainCommand(int(self._forker.stdout.readline()), log, done)

    def run(self, *argv: object, **how: Any) -> TrainCommand:
        """Start, and wait for the status 0."""
        command = self.start(*argv, **how)
        assert command.status() == 0, command.text
        return command

    def close(self) -> None:
        self._forker.stdin.close()
        self._forker.wait(60)
        self._forker.stdout.close()


def _serve() -> None:
    import train.cli.main  # what takes long, once

    for line in sys.stdin:
        request = json.loads(line)
        if not os.fork():
            _supervise(request, train.cli.main.main)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _supervise(request: dict[str, Any], main: Callable[[], int]) -> None:
    """Fork the command, tell its process's id, wait for its end and note the status."""
    pid = os.fork()
    if pid == 0:
        _command(request, main)
    print(pid, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    done = Path(request["done"])
    done.with_suffix(".tmp").write_text(str(code if code >= 0 else 128 - code))
    done.with_suffix(".tmp").rename(done)
    os._exit(0)


def _command(request: dict[str, Any], main: Callable[[], int]) -> None:
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
    os._exit(code)  # libraries in C++ would wait for threads that a fork has not


if __name__ == "__main__":
    _serve()
