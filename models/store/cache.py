"""`BundleCache`: copies on disk of versions that are in a bucket.

    <cache>/<digest of the URL>/url                 the URL, for people
    <cache>/<digest of the URL>/<name>/<version>/   a bundle
    <cache>/<digest of the URL>/<name>/served       number of the version that was last served

A copy appears whole, in one rename. Processes share the directory; a lock lets one of them copy.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.bundle import BundleError

DEFAULT_MAX_BYTES = 4 << 30
CACHE_VARIABLE = "IMAGO_STORE_CACHE"
STAGING_PREFIX = ".staging-"
LOCK_FILE = ".lock"
SERVED_FILE = "served"
URL_FILE = "url"
MIN_ABANDONED_SECONDS = 60  # a directory may be newer than its lock
KEPT_VERSIONS = 2  # the one that is copied and the one that was used before it


class BundleCache:
    """Copies of the versions of the store at `url`, at most `max_bytes` of them.

    The newest copy and the one used before it stay, whatever their size. Methods raise BundleError
    where the directory can't be written.
    """

    def __init__(self, url: str, directory: Path | None, max_bytes: int = DEFAULT_MAX_BYTES):
        self.url = url.rstrip("/")
        self.max_bytes = max_bytes
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.root = (directory or default_cache_directory()) / digest

    def find(self, name: str, version: int) -> Path | None:
        """Return the directory of a copy; None where there is none."""
        path = self.root / name / str(version)
        return path if path.is_dir() else None

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let no other process change the copies of a name within the block."""
        directory = self.root / name
        with self._translate_errors():
            directory.mkdir(parents=True, exist_ok=True)
            (self.root / URL_FILE).write_text(f"{self.url}\n")
            file = (directory / LOCK_FILE).open("a")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """Give an empty directory for a copy, which is deleted when the block ends."""
        with self._translate_errors():
            self.root.mkdir(parents=True, exist_ok=True)
            directory = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self.root))
            directory.chmod(0o755)
        with self._held(directory):
            yield directory

    @contextmanager
    def _held(self, directory: Path) -> Iterator[None]:
        """Lock a staging directory, so that one without a lock is that of a process that died."""
        try:
            handle = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield
            finally:
                os.close(handle)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def add(self, name: str, version: int, staged: Path) -> Path:
        """Make a copy visible that was written to `staged`, and return its directory.

        The caller holds the lock of the name.
        """
        target = self.root / name / str(version)
        self.remove(name, version)
        with self._translate_errors():
            os.rename(staged, target)
        return target

    def remove(self, name: str, version: int) -> None:
        """Delete a copy, if there is one."""
        copy = self.find(name, version)
        if copy is None:
            return
        with self._translate_errors():
            trash = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self.root))
            os.rename(copy, trash)  # never visible in part
        shutil.rmtree(trash, ignore_errors=True)

    def mark_used(self, path: Path) -> None:
        """Note that a copy is used now: the least recently used ones are deleted first."""
        with suppress(OSError):
            os.utime(path)

    def make_room(self, new_bytes: int) -> None:
        """Delete copies until `new_bytes` more fit, and what processes that died have left."""
        self._remove_abandoned()
        copies = [path for path in self.root.glob("*/*") if path.name.isdecimal()]
        copies.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        sizes = {path: measure_bytes(path) for path in copies}
        total = sum(sizes.values()) + new_bytes
        for path in reversed(copies[KEPT_VERSIONS - 1 :]):
            if total <= self.max_bytes:
                return
            self.remove(path.parent.name, int(path.name))
            total -= sizes[path]

    def _remove_abandoned(self) -> None:
        for directory in self.root.glob(f"{STAGING_PREFIX}*"):
            with suppress(OSError):
                if directory.stat().st_mtime > time.time() - MIN_ABANDONED_SECONDS:
                    continue
                handle = os.open(directory, os.O_RDONLY)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(directory, ignore_errors=True)
                finally:
                    os.close(handle)

    def record_served(self, name: str, version: int) -> None:
        """Record the version that is served, to start from it where the bucket is out of reach."""
        path = self.root / name / SERVED_FILE
        with self._translate_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_name(f".{SERVED_FILE}-{os.getpid()}")
            staged.write_text(f"{version}\n")
            staged.replace(path)

    def read_served(self, name: str) -> int | None:
        """Return the recorded version; None where there is none, or no copy of it."""
        try:
            text = (self.root / name / SERVED_FILE).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not text.isdecimal() or self.find(name, int(text)) is None:
            return None
        return int(text)

    def list_served_names(self) -> list[str]:
        """Return the names that have a recorded version, sorted."""
        names = [path.parent.name for path in self.root.glob(f"*/{SERVED_FILE}")]
        return sorted(name for name in names if self.read_served(name) is not None)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BundleError(
                f"{self.root}: copies of {self.url} can't be kept there ({error.strerror}); "
                f"set another directory with {CACHE_VARIABLE}"
            ) from error


def default_cache_directory() -> Path:
    """Return $IMAGO_STORE_CACHE, else imago/store in $XDG_CACHE_HOME or ~/.cache.

    A user without a home directory has one in the temporary directory.
    """
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "imago" / "store"
    try:
        return Path.home() / ".cache" / "imago" / "store"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"imago-{os.getuid()}" / "store"


def measure_bytes(directory: Path) -> int:
    """Return the bytes of all files in a directory and below it."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
