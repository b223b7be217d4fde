"""Files that are complete or absent after a kill, a full disk or a power cut."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def open_replacement(path: Path, staged_name: str) -> Iterator[BinaryIO]:
    """Open a file beside `path` which replaces it, on the disk, when the block ends.

    Its name is `staged_name` until then. If the block or the disk raises, it is deleted and `path`
    stays as it was. Raises OSError.
    """
    staged = path.with_name(staged_name)
    try:
        with staged.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
