"""Data that is fetched into the cache first: archives, URLs of archives, and prefixes of buckets.

    <cache>/fetched/<name>-<digest of the source>/    one directory a source, with a lock beside it
        archive.json        version, size and sha256 of the archive that was unpacked
        archive-<sha256>/   what it holds; locked while a process may read images from it
        archive.part        an archive that is being downloaded
        files/, …           the mirror of a prefix; see mirror.py

Each run asks the server whether the data has changed, and uses what it has where the server can't
be reached. What lies in the cache is then read as a folder.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import urllib.parse
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from models.image.files import has_image_suffix, is_hidden
from models.store.object_storage import BUCKET_SCHEMES
from train.data.cache import replace_text
from train.data.source import (
    CORRECTIONS_FILE,
    DataError,
    FileItems,
    LabelledImages,
    normalize_name,
    notify,
    parse_part,
    printable_name,
)
from train.data.sources import csv_file, folder
from train.data.sources.archive import (
    DISK_FULL_ERRORS,
    check_archive,
    has_archive_ending,
    strip_archive_ending,
    unpack_archive,
)
from train.data.sources.bucket import Bucket, BucketFile
from train.data.sources.download import (
    HttpFile,
    PartialFile,
    RemoteFile,
    Unreachable,
    Version,
    download,
)
from train.data.sources.mirror import Mirror, list_images
from train.failures import DownloadFailed

HTTP_SCHEMES = ("http", "https")
MAX_NAME_LENGTH = 40  # of the source's name in the name of its directory
TABLE_ENDING = ".csv"


@dataclass(frozen=True)
class UnpackedArchive:
    """The archive that a directory of the cache holds, as archive.json describes it."""

    version: Version
    sha256: str
    directory: str  # name


def is_url(source: str) -> bool:
    """Whether a source is a URL that is fetched: http, https, s3, gs or az."""
    scheme, separator, _ = source.partition("://")
    return bool(separator) and scheme.lower() in (*HTTP_SCHEMES, *BUCKET_SCHEMES)


def hide_secrets(source: str) -> str:
    """Return a source for messages and manifests: without the password and query of a URL.

    The query of a signed link gives access to the file.
    """
    if not is_url(source):
        return source
    parts = urllib.parse.urlsplit(source)
    return urllib.parse.urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")
    )


def source_name(source: str) -> str:
    """Return the last component of a URL or path, without the ending of an archive or a table."""
    path = urllib.parse.unquote(hide_secrets(source)) if is_url(source) else source
    name = strip_archive_ending(path.rstrip("/").rpartition("/")[2])
    return name[: -len(TABLE_ENDING)] if name.lower().endswith(TABLE_ENDING) else name


def read_remote(source: str, cache: Path | None, refresh: bool) -> LabelledImages:
    """Fetch an archive or a URL into the cache, and read what it holds.

    With `refresh` false, what an earlier call has fetched is used without asking the server: all
    processes of a run must read the same data. Raises DataError, DownloadFailed or OSError.
    """
    shown = hide_secrets(source)
    if cache is None:
        raise DataError(
            f"{shown}: needs a cache to be fetched into; set --data.cache to a directory"
        )
    name = source_name(source)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    safe_name = "".join(c if c.isalnum() else "-" for c in name)[:MAX_NAME_LENGTH]
    entry = CacheEntry(cache / "fetched" / f"{safe_name}-{digest}", shown)
    with entry.lock(), entry.explain_full_disk():
        if is_url(source):
            directory = entry.fetch(source, refresh)
        else:
            directory = entry.unpack_file(Path(source), refresh)
        in_use = _mark_in_use(directory)
    try:
        dataset = read_directory(directory, shown, name)
    except BaseException:
        os.close(in_use)
        raise
    weakref.finalize(dataset.items, os.close, in_use)
    # Not in the cache, which may be deleted.
    corrections = None if is_url(source) else Path(source).with_name(f"{name}.{CORRECTIONS_FILE}")
    return dataclasses.replace(dataset, corrections_file=corrections)


class CacheEntry:
    """The directory of one source in the cache. Its methods need the lock."""

    def __init__(self, path: Path, source: str):
        """`source`: for messages."""
        self.path = path
        self.source = source
        self._state_path = path / "archive.json"
        self._mirror = Mirror(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the directory, and wait until no other process changes it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{self.path}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                notify(f"{self.source}: another process fetches it; waiting for it")
                lock.acquire()
        except OSError as error:
            if error.errno in DISK_FULL_ERRORS:
                raise
            raise DataError(
                f"{self.path}: can't be written ({error.strerror}); set --data.cache to another "
                "directory"
            ) from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def explain_full_disk(self) -> Iterator[None]:
        """Add what is fetched, and what to do, to errors of a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL_ERRORS:
                raise
            reason = error.strerror or os.strerror(error.errno)
            if self.source not in reason:
                reason += f" to fetch {self.source}"
            advice = "free some space, or set --data.cache to a directory on another disk"
            raise OSError(error.errno, f"{reason}; {advice}", str(self.path)) from error

    def fetch(self, url: str, refresh: bool) -> Path:
        """Return the directory with what is at a URL, up to date where `refresh` asks for it."""
        kept = self._kept_directory()
        if kept is not None and not refresh:
            return kept
        try:
            return self._fetch(url)
        except (Unreachable, DownloadFailed) as error:
            kept = self._kept_directory()  # without a mirror that is half updated
            if kept is None:
                raise
            notify(f"{error}; the copy in {kept} is used")
            return kept

    def _kept_directory(self) -> Path | None:
        """Return the directory that holds all of the source, as of its last fetch."""
        archive = self._load_archive()
        if archive is not None:
            return self.path / archive.directory
        return self._mirror.files if self._mirror.is_complete else None

    def _fetch(self, url: str) -> Path:
        if url.partition("://")[0].lower() in HTTP_SCHEMES:
            return self._fetch_archive(HttpFile(url, self.source))

        bucket = Bucket(url)
        if not has_archive_ending(bucket.path):
            objects = list_images(bucket)
            if objects:
                self._mirror.update(bucket, objects)
                return self._mirror.files
        description = bucket.describe_object()
        if description is None:
            raise DataError(f"{self.source}: nothing there; check the bucket and the path")
        return self._fetch_archive(BucketFile(bucket, description))

    def _fetch_archive(self, remote: RemoteFile) -> Path:
        """Download an archive and unpack it, where it is not the one that was unpacked."""
        archive = self._load_archive()
        known = archive.version if archive is not None else None
        part = PartialFile(self.path / "archive.part")
        if not download(remote, part, known, self._check_head, self.source):
            assert archive is not None  # its version is known
            return self.path / archive.directory

        assert part.version is not None  # it is complete
        try:
            directory = self._unpack(part.path, part.version)
        except DataError:
            part.discard()
            raise
        part.discard()
        return directory

    def _check_head(self, head: bytes) -> None:
        check_archive(head, self.source)

    def unpack_file(self, path: Path, refresh: bool) -> Path:
        """Unpack an archive on disk, where it is not the one that was unpacked."""
        archive = self._load_archive()
        status = path.stat()
        version = Version(f"{status.st_mtime_ns} {status.st_ctime_ns}", None, status.st_size)
        if archive is not None and (archive.version == version or not refresh):
            return self.path / archive.directory
        return self._unpack(path, version)

    def _unpack(self, path: Path, version: Version) -> Path:
        """Unpack an archive into a directory named by its digest.

        Older ones are deleted, except for those from which a process may still read images.
        """
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        directory = self.path / f"archive-{sha256[:16]}"
        if not directory.exists():
            staged = self.path / "unpacking"
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir()
            try:
                unpack_archive(path, staged, self.source)
                staged.rename(directory)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        state = UnpackedArchive(version, sha256, directory.name)
        replace_text(self._state_path, json.dumps(asdict(state)))
        for other in self.path.glob("archive-*"):
            if other != directory and not _is_in_use(other):
                shutil.rmtree(other, ignore_errors=True)
        return directory

    def _load_archive(self) -> UnpackedArchive | None:
        """Return the archive that was unpacked; None where there is none."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            state = json.loads(self._state_path.read_text())
            version = Version(**state["version"])
            archive = UnpackedArchive(version, state["sha256"], state["directory"])
            if (self.path / archive.directory).is_dir():
                return archive
        return None


def _mark_in_use(directory: Path) -> int:
    """Lock a directory as one that is read; return the file descriptor, which holds the lock."""
    descriptor = os.open(directory, os.O_RDONLY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return descriptor


def _is_in_use(directory: Path) -> bool:
    """Whether a process, such as this one, reads images of a directory."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


# What was fetched, as a folder or a table


def read_directory(directory: Path, source: str, name: str) -> LabelledImages:
    """Read class folders, or else the only .csv file. Messages name `source`. Raises DataError."""
    root = _skip_outer_folders(directory)
    try:
        dataset = _read_folder_or_table(root)
    except DataError as error:
        raise DataError(str(error).replace(str(directory), source)) from error
    return dataclasses.replace(dataset, name=normalize_name(printable_name(name)))


def _read_folder_or_table(root: Path) -> LabelledImages:
    """Read class folders, or a table where there are none: its images may lie in one folder."""
    tables = [path for path in _visible_entries(root) if _is_table(path)]
    try:
        dataset = folder.read_folder(root)
    except DataError:
        if len(tables) != 1:
            raise
    else:
        if len(tables) != 1 or len(dataset.classes) > 1:
            return dataset

    dataset = csv_file.read_csv(tables[0])
    assert isinstance(dataset.items, FileItems)  # as any table has
    for path in dataset.items.paths:
        if path.startswith("/") or ".." in path.split("/"):
            raise DataError(f"{tables[0]}: {printable_name(path)} is outside the fetched data")
    return dataset


def _skip_outer_folders(directory: Path) -> Path:
    """Return the folder that holds the class folders: photos/ of an archive of photos/<class>/."""
    while True:
        entries = _visible_entries(directory)
        folders = [path for path in entries if path.is_dir()]
        if len(folders) != 1 or parse_part(folders[0].name) or any(map(_is_data, entries)):
            return directory
        inner = _visible_entries(folders[0])
        if not any(path.is_dir() or _is_table(path) for path in inner):
            return directory
        directory = folders[0]


def _visible_entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if not is_hidden(path.name))


def _is_table(path: Path) -> bool:
    name = path.name.lower()
    # The audit's page saves corrections beside the table.
    return name.endswith(TABLE_ENDING) and not name.endswith("corrections.csv") and path.is_file()


def _is_data(path: Path) -> bool:
    return path.is_file() and (has_image_suffix(path.name) or _is_table(path))
