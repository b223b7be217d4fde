"""Paths that block or fail for a process, as on a network file system that is unreachable."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

# An audit hook in the child process: `open`, `listdir` and `scandir` poll while the flag exists.
SITECUSTOMIZE = """
import os, sys, time

PATH = os.environ["BLOCKED_PATH"]
FLAG = os.environ["BLOCKED_FLAG"]
ERRNO = int(os.environ["BLOCKED_ERRNO"])

def block(event, arguments):
    if event not in ("open", "os.listdir", "os.scandir"):
        return
    path = arguments[0]
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(PATH):
        return
    while os.path.exists(FLAG):
        open(FLAG + "-reached", "w").close()
        if ERRNO:
            raise OSError(ERRNO, os.strerror(ERRNO))
        time.sleep(0.02)

sys.addaudithook(block)
"""


class BlockedPath:
    """A path prefix that a process started with `env` cannot open or list within `blocked()`.

    The call waits until the block ends, or fails at once where `error`, an errno, is given.
    """

    def __init__(self, directory: Path, path: Path, error: int | None = None) -> None:
        """`directory` is created for the hook and its flag."""
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
        self.flag = directory / "blocked"
        self.env = {
            "PYTHONPATH": str(directory),
            "BLOCKED_PATH": str(path),
            "BLOCKED_FLAG": str(self.flag),
            "BLOCKED_ERRNO": str(error or 0),
        }

    def is_reached(self) -> bool:
        """Whether a process has tried to open or list the path within `blocked()`."""
        return self.flag.with_name("blocked-reached").exists()

    @contextlib.contextmanager
    def blocked(self) -> Iterator[None]:
        self.flag.touch()
        try:
            yield
        finally:
            self.flag.unlink()
