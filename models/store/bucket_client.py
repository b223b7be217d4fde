"""`BucketClient`: the objects below the prefix of a bucket, with conditional writes.

Its methods raise StoreError, in one line that names the URL, where the bucket can't be used. An
object appears whole or not at all.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from models.bundle import BundleError
from models.store.errors import StoreError
from models.store.object_storage import (
    ObjectStorageError,
    describe_error,
    explain_error,
    open_client,
    run_interruptibly,
    split_url,
)

if TYPE_CHECKING:
    from obstore import ObjectMeta

CHUNK_BYTES = 4 << 20
LIST_CHUNK = 1000  # objects
# A killed process leaves the parts of an upload in parts, which only a rule of the bucket deletes.
MAX_SINGLE_UPLOAD_BYTES = 1 << 30
ATTEMPTS = 3  # of what obstore does not repeat
MAX_COMPARED_BYTES = 64 << 20  # of an object that is written on a condition

Result = TypeVar("Result")


class StoredObject(NamedTuple):
    """The contents of an object, and what identifies this version of it."""

    content: bytes
    e_tag: str | None
    version: str | None


class BucketClient:
    """Reads and writes objects by their paths below the prefix of `url`."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        try:
            _, _, self._prefix = split_url(url)
        except ObjectStorageError as error:
            raise StoreError(str(error)) from error

    @cached_property
    def _client(self) -> Any:
        try:
            return open_client(self.url)
        except ObjectStorageError as error:
            raise StoreError(str(error)) from error
        except ImportError as error:
            raise StoreError(
                f"{self.url}: needs the package obstore: pip install obstore"
            ) from error

    def url_of(self, path: str) -> str:
        """Return the URL of an object, for messages."""
        return f"{self.url}/{path}"

    def read(self, path: str, max_bytes: int) -> StoredObject | None:
        """Return an object; None where there is none. Raises BundleError for a larger one."""
        return self.read_changed(path, max_bytes, None)

    def read_changed(
        self, path: str, max_bytes: int, known: StoredObject | None
    ) -> StoredObject | None:
        """Return an object, which is `known` where it has not changed; None where there is none.

        One request. Raises BundleError for an object larger than `max_bytes`.
        """
        from obstore import get
        from obstore.exceptions import NotModifiedError

        options: Any = {}
        if known is not None and known.e_tag:
            options["if_none_match"] = known.e_tag

        def run() -> StoredObject:
            result = get(self._client, self._full_path(path), options=options)
            size = result.meta["size"]
            if size > max_bytes:
                raise BundleError(
                    f"{self.url_of(path)}: {size} bytes are more than the {max_bytes} allowed"
                )
            content = bytes(result.bytes())
            return StoredObject(content, result.meta["e_tag"], result.meta["version"])

        try:
            return self._run(run)
        except NotModifiedError:
            return known
        except FileNotFoundError:
            return None

    def create(self, path: str, content: bytes) -> bool:
        """Write an object; return False, and change nothing, where it exists.

        An object of the same contents counts as written: it is that of a request whose answer was
        lost. So contents must name their writer where two could write the same.
        """
        return self._write_if(path, content, None)

    def replace(self, path: str, content: bytes, current: StoredObject) -> bool:
        """Write an object; return False, and change nothing, where it is not `current` any more.

        An object of the same contents counts as written, as for `create`.
        """
        return self._write_if(path, content, current)

    def _write_if(self, path: str, content: bytes, expected: StoredObject | None) -> bool:
        """Write an object that is `expected`, or does not exist, at the moment of the write.

        obstore does not repeat such a write where the connection breaks, since it may be done. So
        the object is read then.
        """
        from obstore import put
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        mode: Any = "create"
        if expected is not None:
            identity = {"e_tag": expected.e_tag, "version": expected.version}
            mode = {key: value for key, value in identity.items() if value is not None}

        def run() -> None:
            put(self._client, self._full_path(path), content, mode=mode, use_multipart=False)

        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._run(run)
                return True
            except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                current = self.read(path, MAX_COMPARED_BYTES)
                return current is not None and current.content == content
            except StoreError as error:
                if not error.may_pass or attempt == ATTEMPTS:
                    raise
                current = self.read(path, MAX_COMPARED_BYTES)
                if current is not None and current.content == content:
                    return True
                if current != expected:
                    return False
        raise AssertionError("the last attempt returns or raises")

    def upload(self, source: Path, path: str) -> None:
        """Write the contents of a file as an object."""
        from obstore import put

        in_parts = source.stat().st_size > MAX_SINGLE_UPLOAD_BYTES

        def run() -> None:
            put(self._client, self._full_path(path), source, use_multipart=in_parts)

        self._run(run)

    def download(self, path: str, target: Path) -> str | None:
        """Write an object to a file; return its sha256 in hex, None where there is no object.

        A connection that breaks is tried again.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with target.open("wb") as file:
                    return self._read_stream(path, file.write)
            except StoreError as error:
                if not error.may_pass or attempt == ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def sha256(self, path: str) -> str | None:
        """Read an object and return its sha256 in hex; None where there is none."""
        return self._read_stream(path, len)

    def _read_stream(self, path: str, handle_chunk: Callable[[bytes], int]) -> str | None:
        """Give the parts of an object to a function; return the sha256 of all."""
        from obstore import get

        digest = hashlib.sha256()

        def run() -> str:
            result = get(self._client, self._full_path(path))
            for chunk in result.stream(CHUNK_BYTES):
                content = bytes(chunk)
                digest.update(content)
                handle_chunk(content)
            return digest.hexdigest()

        try:
            return self._run(run)
        except FileNotFoundError:
            return None

    def list_objects(self, directory: str) -> "dict[str, ObjectMeta]":
        """Return the descriptions of all objects in a directory and below it, by path."""
        from obstore import list as list_chunks

        def run() -> "dict[str, ObjectMeta]":
            objects: dict[str, ObjectMeta] = {}
            location = self._full_path(directory) or None
            for chunk in list_chunks(self._client, location, chunk_size=LIST_CHUNK):
                for description in chunk:
                    objects[self._relative_path(description["path"])] = description
            return objects

        return self._run(run)

    def list_directories(self) -> list[str]:
        """Return the names of the directories at the top."""
        from obstore import list_with_delimiter

        def run() -> list[str]:
            result = list_with_delimiter(self._client, self._prefix or None)
            return [self._relative_path(path) for path in result["common_prefixes"]]

        return self._run(run)

    def delete(self, paths: list[str]) -> None:
        """Delete objects; one that does not exist is ignored."""
        from obstore import delete

        if not paths:
            return

        def run() -> None:
            delete(self._client, [self._full_path(path) for path in paths])

        # Not every store ignores a missing object.
        try:
            self._run(run)
        except FileNotFoundError:
            for path in paths if len(paths) > 1 else []:
                self.delete([path])

    def _full_path(self, path: str) -> str:
        return "/".join(part for part in (self._prefix, path) if part)

    def _relative_path(self, full_path: str) -> str:
        return full_path.removeprefix(self._prefix).strip("/")

    def _run(self, work: Callable[[], Result]) -> Result:
        """Run a request, with errors that say what is wrong.

        FileNotFoundError for an object that is not there, and the exceptions for conditions that
        do not hold, stay.
        """
        with self._translate_errors():
            return run_interruptibly(work)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        from obstore import exceptions

        try:
            yield
        except (
            exceptions.AlreadyExistsError,
            exceptions.NotModifiedError,
            exceptions.PreconditionError,
        ):
            raise
        except (exceptions.BaseError, FileNotFoundError) as error:
            problem = explain_error(error, self.url)
            if problem is not None:
                raise StoreError(f"{self.url}: {problem}") from error
            if isinstance(error, FileNotFoundError):
                raise
            reason = describe_error(error)
            raise StoreError(f"{self.url}: can't be reached: {reason}", may_pass=True) from error
