"""A place on disk that hangs or fails, as a network file system does whose server is away."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOOK = """
import os, sys, time

def hook(event, given):
    if event in ("open", "os.listdir", "os.scandir") and isinstance(given[0], (str, os.PathLike)):
        while os.fspath(given[0]).startswith(os.environ["HANGS"]) and os.path.exists(os.environ["HANGS_WHILE"]):
            open(os.environ["HANGS_WHILE"] + "-reached", "w").close()
            if os.environ.get("FAILS_WITH"):
                raise OSError(int(os.environ["FAILS_WITH"]), os.strerror(int(os.environ["FAILS_WITH"])))
            time.sleep(0.02)

sys.addaudithook(hook)
"""


class BlockedPath:
    """In a process with `env`, to open or list what begins with `place` takes until `blocked()` ends.

    Where `error` is given, an errno, it fails with that until then.
    """

    def __init__(self, directory: Path, place: Path, error: int | None = None):
        directory.mkdir()
        (directory / "sitecustomize.py").write_text(HOOK)
        self.flag = directory / "hangs"
        self.env = {
            "PYTHONPATH": str(directory),
            "HANGS": str(place),
            "HANGS_WHILE": str(self.flag),
            **({"FAILS_WITH": str(error)} if error else {}),
        }

    def is_reached(self) -> bool:
        """Whether anyone has come to hang there."""
        return Path(f"{self.flag}-reached").exists()

    @contextmanager
    def blocked(self) -> Iterator[None]:
        self.flag.touch()
        try:
            yield
        finally:
            os.unlink(self.flag)
