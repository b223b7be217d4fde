"""Data in buckets: s3://, gs:// and az://, read by obstore.

`models.store.object_storage` says where credentials come from.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from models.store.object_storage import (
    ObjectStorageError,
    describe_error,
    explain_error,
    open_client,
    run_interruptibly,
    split_url,
)
from train.data.source import DataError
from train.data.sources.download import ConnectionLost, Response, Unreachable, Version

if TYPE_CHECKING:
    from obstore import ObjectMeta

PARALLEL_BLOCKS = 8  # of one object
BLOCK_BYTES = 8 << 20
CHUNK_BYTES = 1 << 20
LIST_CHUNK = 1000  # objects

Item = TypeVar("Item")
Result = TypeVar("Result")


class FetchedObject(NamedTuple):
    """What is known of an object that was written to a file."""

    version: str
    size: int
    sha256: str  # in hex


class Bucket:
    """A bucket, and a path in it. Its methods raise DataError, or ConnectionLost."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            _, _, self.path = split_url(url)
            self._store = open_client(url)
        except ObjectStorageError as error:
            raise DataError(str(error)) from error

    def describe_object(self) -> "ObjectMeta | None":
        """Return the description of the object at the path; None where there is none."""
        from obstore import head

        if not self.path:
            return None
        try:
            with self._translate_errors():
                return run_interruptibly(lambda: head(self._store, self.path))
        except FileNotFoundError:
            return None
        except ConnectionLost as error:
            raise Unreachable(f"{self.url}: can't be reached: {error}") from error

    def list_objects(self) -> "list[ObjectMeta]":
        """List all objects below the path."""
        with self._translate_errors():
            return run_interruptibly(self._list_objects)

    def _list_objects(self) -> "list[ObjectMeta]":
        from obstore import list as list_chunks

        objects: list[ObjectMeta] = []
        for chunk in list_chunks(self._store, self.path or None, chunk_size=LIST_CHUNK):
            objects += chunk
        return objects

    def read_block(self, start: int, end: int, etag: str | None) -> bytes:
        """Read a part of the object at the path, while it has this entity tag."""
        from obstore import get

        options: Any = {"range": (start, end)}
        if etag is not None:
            options["if_match"] = etag
        with self._translate_errors():
            return bytes(get(self._store, self.path, options=options).bytes())

    def fetch_object(self, path: str, target: Path) -> FetchedObject | None:
        """Write an object to a file; None where it is gone. Raises OSError for a full disk."""
        from obstore import get

        digest = hashlib.sha256()
        size = 0
        with target.open("wb") as file:
            try:
                with self._translate_errors():
                    result = get(self._store, path)
                    for chunk in result.stream(CHUNK_BYTES):
                        content = bytes(chunk)
                        digest.update(content)
                        size += file.write(content)
            except FileNotFoundError:
                return None
        return FetchedObject(describe_version(result.meta), size, digest.hexdigest())

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn obstore's errors into DataError for what the user can correct, or ConnectionLost.

        FileNotFoundError, which obstore raises for an object that is not there, stays.
        """
        from obstore import exceptions

        try:
            yield
        except exceptions.BaseError as error:
            problem = explain_error(error, self.url)
            if problem is not None:
                raise DataError(f"{self.url}: {problem}") from error
            raise ConnectionLost(describe_error(error)) from error


def describe_version(description: "ObjectMeta") -> str:
    """Return what tells one version of an object from another: its entity tag, or its time."""
    return description["e_tag"] or description["last_modified"].isoformat()


class BucketFile:
    """An object that is downloaded as one file, in parallel blocks."""

    def __init__(self, bucket: Bucket, description: "ObjectMeta"):
        self._bucket = bucket
        self._description = description

    @contextmanager
    def open(self, offset: int, version: Version | None) -> Iterator[Response]:
        """Read the blocks from `offset` on, in order; see `RemoteFile`."""
        current = Version(
            self._description["e_tag"],
            self._description["last_modified"].isoformat(),
            self._description["size"],
        )
        start = offset if version == current else 0
        with closing(self._read_blocks(start)) as chunks:
            yield Response(current, start, chunks)

    def _read_blocks(self, start: int) -> Generator[bytes]:
        size = self._description["size"]
        etag = self._description["e_tag"]

        def read(position: int) -> bytes:
            return self._bucket.read_block(position, min(position + BLOCK_BYTES, size), etag)

        return map_in_threads(read, range(start, size, BLOCK_BYTES), PARALLEL_BLOCKS)


def map_in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result]:
    """Yield `work(item)` in the order of the items, some of which are worked on at once."""
    executor = ThreadPoolExecutor(threads)
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(work, item))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
