"""Images and results in buckets: s3://, gs:// and az://, as `imago serve predict` uses them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from models.image.files import has_image_suffix, is_hidden
from models.store.object_storage import (
    BUCKET_SCHEMES,
    ObjectStorageError,
    describe_error,
    explain_error,
    open_client,
    run_interruptibly,
    split_url,
)

LIST_CHUNK = 1000  # objects
PARQUET_END_BYTES = 8  # the length of the footer, and the magic number


class BucketUnreachable(Exception):
    """The bucket did not answer, after several attempts. Later it may."""


class BucketImage(os.PathLike[str]):
    """An image in a bucket. Reads like the Path of a local one."""

    def __init__(self, folder: "BucketFolder", key: str, size: int):
        self.folder = folder
        self.key = key
        self.size = size  # bytes

    def __fspath__(self) -> str:
        return f"{self.folder.root_url}/{self.key}"

    def read_bytes(self) -> bytes:
        """Read the object.

        Raises OSError for one that is too large or was deleted, BucketUnreachable, and
        ObjectStorageError without access.
        """
        if self.size > self.folder.max_bytes:
            raise OSError(f"{self.size} bytes are more than the {self.folder.max_bytes} allowed")
        try:
            return self.folder.read(self.key)
        except FileNotFoundError as error:
            raise OSError("the object was deleted after it was listed") from error


class BucketFolder:
    """A prefix of a bucket. Its methods raise ObjectStorageError, or BucketUnreachable."""

    def __init__(self, url: str, max_bytes: int):
        scheme, bucket, self.path = split_url(url)
        self.url = url.rstrip("/")
        self.root_url = f"{scheme}://{bucket}"
        self.max_bytes = max_bytes  # of an image
        self.client = open_client(url)

    def list_images(self) -> list[BucketImage]:
        """Return the images below the prefix, or the one of that name, sorted by key.

        Hidden files and folders are left out, as in a directory. Raises ValueError without any.
        """
        with self._translate_errors():
            images = run_interruptibly(self._list_images)
        if not images:
            raise ValueError(f"{self.url}: no images below this prefix")
        return sorted(images, key=lambda image: image.key)

    def _list_images(self) -> list[BucketImage]:
        from obstore import head
        from obstore import list as list_chunks

        images: list[BucketImage] = []
        for chunk in list_chunks(self.client, self.path or None, chunk_size=LIST_CHUNK):
            for description in chunk:
                key = description["path"]
                below = key.removeprefix(self.path).strip("/").split("/")
                if has_image_suffix(key) and not any(is_hidden(part) for part in below):
                    images.append(BucketImage(self, key, description["size"]))
        if images or not has_image_suffix(self.path):
            return images

        try:
            description = head(self.client, self.path)
        except FileNotFoundError:
            return []
        return [BucketImage(self, self.path, description["size"])]

    def read(self, key: str) -> bytes:
        """Return the content of an object. Raises FileNotFoundError."""
        from obstore import get

        with self._translate_errors():
            return bytes(get(self.client, key).bytes())

    def read_parquet_footer(self, name: str) -> bytes:
        """Return the end of a Parquet file, which holds its metadata. Raises FileNotFoundError."""
        from obstore import get_range, head

        key = self._key(name)
        with self._translate_errors():
            size = head(self.client, key)["size"]
            start = max(0, size - PARQUET_END_BYTES)
            end = bytes(get_range(self.client, key, start=start, end=size))
            length = int.from_bytes(end[:4], "little") + PARQUET_END_BYTES
            return bytes(get_range(self.client, key, start=max(0, size - length), end=size))

    def put(self, name: str, file: IO[bytes]) -> None:
        """Write an object below the prefix. It appears when it is complete."""
        from obstore import put

        with self._translate_errors():
            run_interruptibly(lambda: put(self.client, self._key(name), file))

    def _key(self, name: str) -> str:
        return f"{self.path}/{name}".lstrip("/")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Turn obstore's errors into those of this class; FileNotFoundError stays."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            problem = explain_error(error, self.url)
            if problem is not None:
                raise ObjectStorageError(f"{self.url}: {problem}") from error
            if isinstance(error, FileNotFoundError):
                raise
            raise BucketUnreachable(
                f"{self.url}: {describe_error(error)}; run the same command again"
            ) from error


def is_bucket_url(path: Any) -> bool:
    """Whether a path is the URL of a bucket."""
    return os.fspath(path).startswith(tuple(f"{scheme}://" for scheme in BUCKET_SCHEMES))
