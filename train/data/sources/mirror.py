"""The images below a prefix of a bucket, mirrored in the cache.

    files/          the objects, by their path below the prefix
    incoming/       objects that are being fetched
    objects.jsonl   a line for each object in files/: path, version, size, sha256
    complete        exists while files/ holds all that the last listing had

A line is written after its file, so that an interrupted mirror continues with what is missing. A
second one lists the bucket, fetches what is new or changed, and removes what is gone.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from models.image.files import has_image_suffix, is_hidden
from train.data.cache import replace_text
from train.data.source import DataError, printable_name
from train.data.sources.archive import DISK_FULL_ERRORS
from train.data.sources.bucket import Bucket, describe_version, map_in_threads
from train.data.sources.byte_progress import byte_progress
from train.data.sources.download import ATTEMPTS, ConnectionLost, Unreachable, check_free_space
from train.failures import DownloadFailed

if TYPE_CHECKING:
    from obstore import ObjectMeta

PARALLEL_OBJECTS = 32
TABLE_ENDING = ".csv"


class Record(NamedTuple):
    """An object that lies in files/."""

    path: str  # below the prefix
    version: str  # entity tag, or time of modification
    size: int
    sha256: str


class Mirror:
    """The directory of one prefix in the cache. A lock is held by the caller."""

    def __init__(self, directory: Path):
        self.files = directory / "files"
        self._incoming = directory / "incoming"
        self._records_path = directory / "objects.jsonl"
        self._complete_path = directory / "complete"

    @property
    def is_complete(self) -> bool:
        """Whether the mirror holds all objects of its last listing."""
        return self._complete_path.exists()

    def update(self, bucket: Bucket, objects: "dict[str, ObjectMeta]") -> None:
        """Hold these objects, by path, and no others; with a progress bar on a terminal.

        Raises DownloadFailed where the connection breaks, DataError, or OSError for a full disk.
        """
        records = self._load_records()
        missing = [
            path
            for path, description in objects.items()
            if not self._has_file(records.get(path), description)
        ]
        gone = records.keys() - objects.keys()
        if missing or gone:
            self._complete_path.unlink(missing_ok=True)
            self._remove(gone)
            self._fetch(bucket, {path: objects[path] for path in missing}, records)
            lines = [_to_line(records[path]) for path in objects if path in records]
            replace_text(self._records_path, "".join(lines))
        self._complete_path.touch()

    def _load_records(self) -> dict[str, Record]:
        """Return the records by path. The last line of an interrupted fetch may be cut."""
        records = {}
        with contextlib.suppress(OSError):
            for line in self._records_path.read_text().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    record = Record(*json.loads(line))
                    records[record.path] = record
        return records

    def _has_file(self, record: Record | None, description: "ObjectMeta") -> bool:
        """Whether files/ holds this version of an object."""
        if record is None or record.version != describe_version(description):
            return False
        if record.size != description["size"]:
            return False
        with contextlib.suppress(OSError):
            return (self.files / record.path).stat().st_size == record.size
        return False

    def _fetch(
        self, bucket: Bucket, objects: "dict[str, ObjectMeta]", records: dict[str, Record]
    ) -> None:
        """Fetch objects in parallel, and add their records."""
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(parents=True)
        total = sum(description["size"] for description in objects.values())
        check_free_space(self._incoming, total, bucket.url)

        def fetch(path: str) -> Record | None:
            return self._fetch_object(bucket, objects[path]["path"], path)

        done = 0
        try:
            with (
                self._records_path.open("a") as file,
                byte_progress(f"Fetching {bucket.url}", total) as report,
                closing(map_in_threads(fetch, objects, PARALLEL_OBJECTS)) as results,
            ):
                for path, record in zip(objects, results, strict=True):
                    if record is not None:
                        file.write(_to_line(record))
                        file.flush()
                        records[path] = record
                    done += objects[path]["size"]
                    report(done)
        except ConnectionLost as error:
            raise DownloadFailed(
                f"{bucket.url}: the download broke off after {done:,} of {total:,} bytes: {error}; "
                "run the same command again to continue it"
            ) from error
        finally:
            shutil.rmtree(self._incoming, ignore_errors=True)

    def _fetch_object(self, bucket: Bucket, name: str, path: str) -> Record | None:
        """Fetch one object; None where it is gone. Raises ConnectionLost after some attempts."""
        staged = self._incoming / hashlib.sha256(path.encode()).hexdigest()
        target = self.files / path
        for attempt in range(1, ATTEMPTS + 1):
            try:
                fetched = bucket.fetch_object(name, staged)
                break
            except ConnectionLost:
                if attempt == ATTEMPTS:
                    raise
        if fetched is None:
            return None

        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(target)
        except OSError as error:
            if error.errno in DISK_FULL_ERRORS:
                raise
            raise DataError(
                f"{bucket.url}: {printable_name(path)} can't be kept: {error.strerror}"
            ) from error
        return Record(path, fetched.version, fetched.size, fetched.sha256)

    def _remove(self, paths: Iterable[str]) -> None:
        """Remove files that the bucket no longer has, and the folders that are empty then."""
        for path in paths:
            (self.files / path).unlink(missing_ok=True)
            for folder in list_parents(path):
                with contextlib.suppress(OSError):  # it is not empty
                    (self.files / folder).rmdir()


def list_images(bucket: Bucket) -> "dict[str, ObjectMeta]":
    """Return path -> description of the images and tables below the bucket's path.

    Empty where nothing at all is there. Raises DataError where there are other objects only, or
    where the path of one is unsafe; Unreachable.
    """
    try:
        listing = bucket.list_objects()
    except ConnectionLost as error:
        raise Unreachable(f"{bucket.url}: can't be listed: {error}") from error

    objects = {}
    for description in listing:
        path = _relative_path(description["path"], bucket)
        if _is_wanted(path, description["size"]):
            objects[path] = description
    for path in list(objects):
        for folder in list_parents(path):
            objects.pop(folder, None)  # an object that marks a folder

    if objects or not listing:
        return objects
    raise DataError(
        f"{bucket.url}: {len(listing):,} objects, but no images; give the path of the class "
        "folders or of an archive; streams are written litdata:s3://…"
    )


def _relative_path(path: str, bucket: Bucket) -> str:
    """Return the path of an object below that of the bucket. Raises DataError for an unsafe one."""
    relative = path.removeprefix(bucket.path).lstrip("/")
    components = relative.split("/")
    if ".." in components or "" in components or "\0" in relative:
        raise DataError(f"{bucket.url}: an object has the unsafe name {printable_name(path)!r}")
    return relative


def _is_wanted(path: str, size: int) -> bool:
    """Whether to fetch an object: an image by its ending, or without one, or a table."""
    components = path.split("/")
    if any(is_hidden(component) for component in components):
        return False
    name = components[-1]
    if has_image_suffix(name) or name.lower().endswith(TABLE_ENDING):
        return True
    return size > 0 and "." not in name


def list_parents(path: str) -> list[str]:
    """Return the folders above a path, the innermost first."""
    return [str(parent) for parent in PurePosixPath(path).parents][:-1]


def _to_line(record: Record) -> str:
    return json.dumps(record) + "\n"
