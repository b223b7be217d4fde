"""Kept images in a bucket: s3://, gs:// and az://, by obstore.

Objects can't be appended to, so each line is an object of its own, `<writer>-<number>.jsonl`.
Credentials are those of the cloud's own variables, such as AWS_ACCESS_KEY_ID; AWS_ENDPOINT_URL
names another store with the interface of S3.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import PurePosixPath
from typing import Any

from models.kept.records import KeptError

SCHEMES = ("s3", "gs", "az")
LIST_CHUNK = 1000  # objects
TIMEOUTS = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "60s"}
RETRIES: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
ENDPOINT_VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT",
    "GOOGLE_BASE_URL",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
)
MAX_REASON_CHARACTERS = 200


class BucketFiles:
    """Files below a path of a bucket. Methods are those of `models.kept.files.Files`."""

    def __init__(self, url: str):
        """Raises KeptError for a URL or settings that can't be used."""
        self.location = url.rstrip("/")
        scheme, _, location = self.location.partition("://")
        bucket, _, self.prefix = location.partition("/")
        if scheme not in SCHEMES or not bucket:
            raise KeptError(f"{url}: not a bucket; write s3://bucket/path, gs://… or az://…")
        self.store = _open_store(f"{scheme}://{bucket}", scheme)
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
        except FileNotFoundError:
            raise
        except BaseError as error:
            raise OSError(f"{self.location}: {_describe(error)}") from error


def _open_store(url: str, scheme: str) -> Any:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise KeptError(f"{url}: buckets need the package obstore: pip install obstore") from error

    config: Any = {}
    endpoints = [os.environ.get(variable, "") for variable in ENDPOINT_VARIABLES]
    named = [endpoint for endpoint in endpoints[:3] if endpoint]
    if scheme == "s3" and named:
        config["endpoint"] = named[0]
    options: Any = dict(TIMEOUTS)
    if any(endpoint.startswith("http:") for endpoint in endpoints):
        options["allow_http"] = True  # stores inside a cluster often have no certificate
    try:
        return from_url(url, config=config, client_options=options, retry_config=RETRIES)
    except (BaseError, ValueError) as error:
        raise KeptError(f"{url}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """Return one line of what obstore says, without its description for developers."""
    reason = " ".join(str(error).partition("Debug source")[0].split())
    return reason[:MAX_REASON_CHARACTERS]
