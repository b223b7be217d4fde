"""Run `python -m train …` and `python -m serve …` without the seconds that their imports take.

One process imports everything once and forks a child for each command. Each command is a separate
process, with its signals, limits and exit status, and begins with the first line of the package's
__main__. It starts in 20 ms instead of 8 s for train and 1 s for serve.

Run as a module (`python -m support.forked_commands PACKAGE LOCK`), this file is the process that
forks. All processes of pytest-xdist share it. It accepts connections on stdin, a socket, reads a
JSON request per line and answers with the process id of the command. It ends with the last client.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from support import ROOT

TIMEOUT_SECONDS = 280
POLL_SECONDS = 0.01

# What `python -m train` imports only when it needs them.
TRAIN_MODULES = (
    "boto3",
    "onnxruntime.quantization",
    "sklearn.datasets",
    "sklearn.linear_model",
    "sympy.tensor.tensor",
    "torch.utils.tensorboard",
)


# What the commands of `python -m serve` import when they run.
SERVE_MODULES = (
    "serve.processes.supervisor",
    "serve.commands.check",
    "serve.commands.kept",
    "serve.commands.label",
    "serve.commands.predict",
)


def warm_up_serve() -> None:
    """Import what `python -m serve` and its commands import."""
    for module in SERVE_MODULES:
        importlib.import_module(module)


def warm_up_train() -> None:
    """Import what `python -m train` imports at the start and later, and export a graph once.

    The first export of a process compiles the converters of all operators, which takes seconds.
    Each export parses their sources again, only for the names of their domains, so the registry of
    converters is kept. This is written for torch 2.13 and onnxscript 0.7.
    """
    importlib.import_module("train.cli.main")
    for module in TRAIN_MODULES:
        importlib.import_module(module)

    registry = importlib.import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
    opset = importlib.import_module("train.export.onnx_graph").OPSET

    torch = importlib.import_module("torch")
    images = torch.zeros(2, 1, 4, 4)
    network = torch.nn.Conv2d(1, 1, 3).eval()
    torch.onnx.export(
        network,
        (images,),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
        verbose=False,
    )


WARM_UPS = {"train": warm_up_train, "serve": warm_up_serve}


class ForkedCommand:
    """A started command, with the interface of `subprocess.Popen`. `log` holds its output."""

    def __init__(self, pid: int, log: Path, status_file: Path) -> None:
        self.pid = pid
        self.log = log
        self.returncode: int | None = None
        self._status_file = status_file

    @property
    def text(self) -> str:
        """The output so far."""
        return self.log.read_text()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the command runs."""
        if self.returncode is None and self._status_file.exists():
            self.returncode = int(self._status_file.read_text())
        return self.returncode

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_SECONDS)
        return self.returncode

    def status(self, seconds: float = TIMEOUT_SECONDS) -> int:
        """Wait for the end; return the status as a shell does, 128 plus the number of a signal."""
        try:
            code = self.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.text}") from None
        return code if code >= 0 else 128 - code

    def wait_for(self, words: str, seconds: float = TIMEOUT_SECONDS) -> None:
        """Wait until the output contains `words`."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert self.poll() is None, f"ended without printing {words!r}: {self.text}"
            assert time.monotonic() < deadline, f"did not print {words!r} in time: {self.text}"
            time.sleep(POLL_SECONDS)

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkedCommands:
    """Starts commands of one package, in `directory` where no other is given."""

    def __init__(self, package: str, directory: Path, shared: Path) -> None:
        """`package`: "train" or "serve"; `shared`: a directory that all test processes share."""
        self.directory = directory
        self._count = 0
        self._lock = threading.Lock()  # a test may start commands in several threads
        self._connection = connect(package, shared)
        self._replies = self._connection.makefile("r")

    def start(
        self,
        *argv: object,
        env: dict[str, str | None] | None = None,
        limits: dict[str, int] | None = None,
        cwd: Path | None = None,
        log: Path | None = None,
        error_log: Path | None = None,
        script: Path | None = None,
    ) -> ForkedCommand:
        """Start `python -m PACKAGE ARGV…`, or `python SCRIPT ARGV…` with the same imports.

        `env`: variables to set, or with None to unset. `limits`: by their names in `resource`.
        `error_log`: a file or terminal for stderr; without it, stderr goes to the log, too.
        """
        with self._lock:
            self._count += 1
            number = self._count
        log = log or self.directory / f"{number}.log"
        log.touch()
        status_file = self.directory / f"{number}.status"
        request: dict[str, Any] = {
            "argv": [str(word) for word in argv],
            "env": {"XDG_CACHE_HOME": str(self.directory / "cache"), **(env or {})},
            "limits": limits or {},
            "cwd": str(cwd or self.directory),
            "log": str(log),
            "error_log": str(error_log or log),
            "script": str(script) if script else None,
            "status_file": str(status_file),
        }
        with self._lock:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            pid = int(self._replies.readline())
        return ForkedCommand(pid, log, status_file)

    def run(self, *argv: object, **options: Any) -> ForkedCommand:
        """Start a command, wait for its end and assert exit status 0."""
        command = self.start(*argv, **options)
        assert command.status() == 0, command.text
        return command

    def complete(self, *argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; return its exit status and what it printed, as `subprocess`."""
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            error_log = Path(directory, "stderr")
            error_log.touch()
            command = self.start(
                *argv, log=Path(directory, "stdout"), error_log=error_log, **options
            )
            status = command.wait()
            return subprocess.CompletedProcess(
                argv, status, stdout=command.text, stderr=error_log.read_text()
            )

    def close(self) -> None:
        self._replies.close()
        self._connection.close()


def connect(package: str, shared: Path) -> socket.socket:
    """Connect to the process that forks commands of a package; start it if there is none."""
    address = shared / f"{package}.sock"
    lock_path = shared / f"{package}.lock"
    connection = socket.socket(socket.AF_UNIX)
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(str(address))
        except OSError:  # none was started, or its last client has left
            start_forker(package, address, lock_path)
            connection.connect(str(address))
    return connection


def start_forker(package: str, address: Path, lock_path: Path) -> None:
    """Start the process that forks commands, which outlives this one while it has clients."""
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        subprocess.run(
            [sys.executable, "-m", "support.forked_commands", package, str(lock_path)],
            stdin=listener,
            stdout=subprocess.DEVNULL,
            check=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
                # Libraries that read it when they are imported share this one among all commands.
                "XDG_CACHE_HOME": str(lock_path.with_name("cache")),
            },
        )


def serve_requests(package: str, lock_path: Path) -> None:
    """Fork commands for all clients that connect, until the last has left."""
    listener = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as null:
        os.dup2(null.fileno(), 0)  # commands must not keep the socket open
    WARM_UPS[package]()
    # The memory stays shared: the garbage collector of a command would write to all objects.
    gc.collect()
    gc.freeze()
    with listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    selector.register(connection, selectors.EVENT_READ, connection.makefile("r"))
                    continue
                line = ""
                with contextlib.suppress(ConnectionResetError):  # the client was killed
                    line = key.data.readline()
                if line:
                    _fork_command(package, json.loads(line), key.fileobj, selector)
                else:
                    selector.unregister(key.fileobj)
                    key.data.close()
                    key.fileobj.close()
            if len(selector.get_map()) == 1 and _may_end(selector, lock_path):
                return


def _may_end(selector: selectors.BaseSelector, lock_path: Path) -> bool:
    """Whether no client has connected. If so, none can any more: the lock is held until the end."""
    descriptor = os.open(lock_path, os.O_WRONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        may_end = not selector.select(0)
    except BlockingIOError:  # a client connects at this moment
        may_end = False
    if not may_end:
        os.close(descriptor)
    return may_end


def _fork_command(
    package: str,
    request: dict[str, Any],
    connection: socket.socket,
    selector: selectors.BaseSelector,
) -> None:
    if os.fork() == 0:
        for key in list(selector.get_map().values()):
            if key.fileobj is not connection:
                os.close(key.fd)
        _supervise(package, request, connection)
    _reap_children()


def _reap_children() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _supervise(package: str, request: dict[str, Any], connection: socket.socket) -> None:
    """Fork the command, send its process id, wait for its end and write its status."""
    pid = os.fork()
    if pid == 0:
        os.close(connection.fileno())
        _run_command(package, request)
    connection.sendall(f"{pid}\n".encode())
    os.close(connection.fileno())

    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status_file = Path(request["status_file"])
    partial = status_file.with_suffix(".partial")
    partial.write_text(str(status))
    partial.rename(status_file)
    os._exit(0)


def _run_command(package: str, request: dict[str, Any]) -> None:
    """Become the command: set up this process as requested, run the package and exit."""
    with open(os.devnull) as null, open(request["log"], "ab") as log:
        os.dup2(null.fileno(), 0)
        os.dup2(log.fileno(), 1)
    with open(request["error_log"], "ab", buffering=0) as error_log:
        os.dup2(error_log.fileno(), 2)
    # As in a terminal, even if the shell that started the tests ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in request["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if any(name.startswith("HF_") for name in request["env"]):
        _unload_huggingface_hub()
    os.chdir(request["cwd"])
    for name, value in request["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))

    script = request["script"]
    sys.argv = [script or package, *request["argv"]]
    try:
        if script:
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(package, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # C++ libraries would wait for threads that did not survive the fork


def _unload_huggingface_hub() -> None:
    """Let the command import huggingface_hub again, which reads its variables on import."""
    for module in list(sys.modules):
        if module.partition(".")[0] == "huggingface_hub":
            del sys.modules[module]


if __name__ == "__main__":
    if os.fork() == 0:  # so that the process that started this one need not wait for its end
        serve_requests(sys.argv[1], Path(sys.argv[2]))
