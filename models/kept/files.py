"""The files of a directory of kept images: written whole or not at all, and on the disk.

`LocalFiles` is a directory. `models.kept.bucket` has the same methods for an object store.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from models.bundle.files import open_file
from models.durable_files import open_replacement, sync_path

STAGING_PREFIX = ".staging-"


class Files(Protocol):
    """Files by their path below a root, with slashes."""

    location: str  # for messages

    def list_files(self) -> list[tuple[str, int]]:
        """Return the path and the bytes of all files."""

    def exists(self, path: str) -> bool:
        """Whether a file is there. Raises OSError."""

    def read(self, path: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError, or OSError."""

    def write(self, path: str, content: bytes) -> None:
        """Write a file, which appears as a whole. Raises OSError."""

    def append(self, path: str, line: bytes) -> None:
        """Append a line to a file of lines, which need not exist. Raises OSError."""

    def filter_lines(self, path: str, is_kept: Callable[[bytes], bool]) -> None:
        """Remove the lines of a file that are not to be kept. Raises OSError."""

    def remove(self, path: str) -> None:
        """Remove a file, if it is there. Raises OSError."""

    def remove_staged(self, older_than: float) -> None:
        """Remove what a killed process has left before a time, in seconds since 1970."""

    def count_free_bytes(self) -> int | None:
        """Return how many bytes can be written; None where that is not limited."""


class LocalFiles:
    """Files in a local directory, which is created when the first one is written.

    A crash at any moment leaves whole files, and at most one torn line at the end of a file. Links,
    named pipes and devices are ignored: they could lead to files elsewhere, or block a reader.
    """

    def __init__(self, root: Path):
        self.root = root
        self.location = str(root)

    def list_files(self) -> list[tuple[str, int]]:
        """Return the path and the bytes of all regular files, sorted, without hidden ones."""
        files: list[tuple[str, int]] = []
        for directory, names, file_names in os.walk(self.root):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(file_names):
                if name.startswith("."):
                    continue
                path = Path(directory, name)
                status = _read_status(path)
                if status is not None:
                    files.append((path.relative_to(self.root).as_posix(), status.st_size))
        return files

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        return _read_status(self.root / path) is not None

    def read(self, path: str) -> bytes:
        """Return the content of a file."""
        with open_file(self.root / path) as file:
            return file.read()

    def write(self, path: str, content: bytes) -> None:
        """Write a hidden file, sync it, rename it, and sync the directory."""
        target = self._prepare_target(path)
        with open_replacement(target, f"{STAGING_PREFIX}{secrets.token_hex(8)}") as file:
            file.write(content)

    def append(self, path: str, line: bytes) -> None:
        """Append a line and sync. After a torn line it begins on a line of its own."""
        target = self._prepare_target(path)
        with _open_locked(target, "a+b") as descriptor:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            try:
                _write_all(descriptor, line)
            except OSError:
                os.ftruncate(descriptor, size)  # a full disk must not leave half a line
                raise
            os.fsync(descriptor)
        if not size:
            sync_path(target.parent)

    def filter_lines(self, path: str, is_kept: Callable[[bytes], bool]) -> None:
        """Rewrite the file without some lines, while others may append to it."""
        target = self.root / path
        with _open_locked(target, "r+b"):
            lines = target.read_bytes().splitlines(keepends=True)
            remaining = [line for line in lines if is_kept(line)]
            if len(remaining) < len(lines):
                self.write(path, b"".join(remaining))

    def remove(self, path: str) -> None:
        """Remove a file, and its directory if that is empty then."""
        target = self.root / path
        target.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            target.parent.rmdir()

    def remove_staged(self, older_than: float) -> None:
        """Remove files that a process which was killed has left.

        older_than: seconds since 1970; later ones may be written at this moment.
        """
        for staged in self.root.glob(f"*/{STAGING_PREFIX}*"):
            with contextlib.suppress(FileNotFoundError):
                if staged.stat().st_mtime < older_than:
                    staged.unlink()

    def count_free_bytes(self) -> int | None:
        """Return the free bytes of the disk."""
        existing = self.root
        while not existing.exists():
            existing = existing.parent
        return shutil.disk_usage(existing).free

    def _prepare_target(self, path: str) -> Path:
        """Return where to write a file, after its directory exists. Raises OSError for a link."""
        target = self.root / path
        directory = target.parent
        directory.mkdir(parents=True, exist_ok=True)
        if directory != self.root and directory.is_symlink():
            raise OSError(errno.ELOOP, "a link; replace it by a directory", str(directory))
        return target


def _read_status(path: Path) -> os.stat_result | None:
    """Return the status of a regular file; None for anything else, or if it is gone."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


@contextlib.contextmanager
def _open_locked(path: Path, mode: str) -> Iterator[int]:
    """Open a file that no other process appends to or rewrites within the block."""
    while True:
        with path.open(mode, buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same_file(file.fileno(), path):
                continue  # another process has replaced it, or removed it
            yield file.fileno()
            return


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
