"""Kept images in a bucket: s3://, gs:// and az://, by obstore.

Objects can't be appended to, so each line is an object of its own, `<writer>-<number>.jsonl`.
`models.store.object_storage` says where credentials come from.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import PurePosixPath

from models.kept.records import KeptError
from models.store.object_storage import (
    BUCKET_SCHEMES,
    ObjectStorageError,
    describe_error,
    explain_error,
    open_client,
    split_url,
)

LIST_CHUNK = 1000  # objects


class BucketFiles:
    """Files below a path of a bucket. Methods are those of `models.kept.files.Files`."""

    def __init__(self, url: str):
        """Raises KeptError for a URL or settings that can't be used."""
        self.location = url.rstrip("/")
        try:
            scheme, _, self.prefix = split_url(url)
            if scheme not in BUCKET_SCHEMES:
                raise KeptError(f"{url}: not a bucket; write s3://bucket/path, gs://… or az://…")
            self.store = open_client(self.location)
        except ImportError as error:
            raise KeptError(f"{url}: buckets need the package obstore") from error
        except ObjectStorageError as error:
            raise KeptError(str(error)) from error
        self._numbers = count()

    def list_files(self) -> list[tuple[str, int]]:
        """Return the path and the bytes of all objects, sorted."""
        from obstore import list as list_chunks

        prefix = f"{self.prefix}/" if self.prefix else ""
        files: list[tuple[str, int]] = []
        with self._translate_errors():
            for chunk in list_chunks(self.store, prefix or None, chunk_size=LIST_CHUNK):
                files += [(entry["path"].removeprefix(prefix), entry["size"]) for entry in chunk]
        return sorted(files)

    def exists(self, path: str) -> bool:
        """Whether an object is there."""
        from obstore import head

        try:
            with self._translate_errors():
                head(self.store, self._full_path(path))
        except FileNotFoundError:
            return False
        return True

    def read(self, path: str) -> bytes:
        """Return the content of an object."""
        from obstore import get

        with self._translate_errors():
            return bytes(get(self.store, self._full_path(path)).bytes())

    def write(self, path: str, content: bytes) -> None:
        """Put an object."""
        from obstore import put

        with self._translate_errors():
            put(self.store, self._full_path(path), content)

    def append(self, path: str, line: bytes) -> None:
        """Put an object with the line."""
        name = PurePosixPath(path)
        numbered = name.with_stem(f"{name.stem}-{next(self._numbers):06d}")
        self.write(str(numbered), line)

    def filter_lines(self, path: str, is_kept: Callable[[bytes], bool]) -> None:
        """Put the object without some of its lines, or delete it if none remains."""
        lines = self.read(path).splitlines(keepends=True)
        remaining = [line for line in lines if is_kept(line)]
        if not remaining:
            self.remove(path)
        elif len(remaining) < len(lines):
            self.write(path, b"".join(remaining))

    def remove(self, path: str) -> None:
        """Delete an object, if it is there."""
        from obstore import delete

        with self._translate_errors():
            delete(self.store, self._full_path(path))

    def remove_staged(self, older_than: float) -> None:
        """Do nothing: an object appears as a whole."""

    def count_free_bytes(self) -> int | None:
        """Return None: a bucket has no limit."""
        return None

    def _full_path(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn obstore's errors into OSError of one line; FileNotFoundError stays."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            problem = explain_error(error, self.location)
            if problem is None and isinstance(error, FileNotFoundError):
                raise
            raise OSError(f"{self.location}: {problem or describe_error(error)}") from error
