"""Shards: parts of a large set of images, each classified by its own process into its own file.

A file's name tells its shard, and its metadata the model, so that a run that was interrupted skips
the shards that are finished.
"""

import argparse
import io
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from models.store.object_storage import run_interruptibly
from serve.commands.bucket_images import BucketFolder, is_bucket_url
from serve.commands.result_writers import import_pyarrow, open_output
from serve.model import Model

MAX_SHARDS = 100_000


@dataclass(frozen=True)
class Shard:
    """One of `count` parts, numbered from 0."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def file_name(self) -> str:
        """The name of its file of results."""
        return f"part-{self.number:05d}-of-{self.count:05d}.parquet"

    def has(self, file: os.PathLike[str]) -> bool:
        """Whether a file belongs to this shard. Its name alone decides, so new files move none."""
        return zlib.crc32(os.fsencode(file)) % self.count == self.number


def parse_shard(text: str) -> Shard:
    """Parse `NUMBER/COUNT`. Raises argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match:
        shard = Shard(int(match[1]), int(match[2]))
        if shard.number < shard.count <= MAX_SHARDS:
            return shard
    raise argparse.ArgumentTypeError(
        f"{text!r} is not a shard such as 3/8: the number from 0 to 7 of one of 8"
    )


class ShardFolder(Protocol):
    """Where the files of all shards are written: a directory, or a prefix of a bucket."""

    def open_result(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open the file of a shard to read its metadata. Raises FileNotFoundError."""

    def write_result(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file that appears under this name when the block ends, complete."""


class LocalShards:
    """A directory, which is created when the first shard is finished."""

    def __init__(self, path: Path):
        self.path = path

    def open_result(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open the file of a shard to read it. Raises FileNotFoundError."""
        return (self.path / name).open("rb")

    @contextmanager
    def write_result(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file that appears under this name when the block ends, complete."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {self.path}: {error.strerror}") from error
        with open_output(self.path / name, is_binary=True) as file:
            yield file


class BucketShards:
    """A prefix of a bucket. A file is written here first, and uploaded when it is complete."""

    def __init__(self, url: str):
        self.folder = BucketFolder(url, max_bytes=0)

    def open_result(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open the end of the file of a shard, which holds its metadata."""
        return io.BytesIO(self.folder.read_parquet_footer(name))

    @contextmanager
    def write_result(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file that appears under this name when the block ends, complete."""
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            self.folder.put(name, file)


def open_shards(out: str) -> ShardFolder:
    """Return where --out says that the shards are written."""
    return BucketShards(out) if is_bucket_url(out) else LocalShards(Path(out))


def is_finished(folder: ShardFolder, shard: Shard, model: Model, out: str) -> bool:
    """Whether the shard has been classified by this version of the model.

    Raises ValueError if another version has, or if the file is not one of such results.
    """
    pyarrow = import_pyarrow()
    from pyarrow import parquet

    def read_metadata() -> dict[bytes, bytes]:
        with folder.open_result(shard.file_name) as file:
            return parquet.read_metadata(file).metadata or {}

    try:
        metadata = run_interruptibly(read_metadata)
    except FileNotFoundError:
        return False
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"--out {out}: {shard.file_name} can't be read; delete it or give another --out"
        ) from error

    name = metadata.get(b"model", b"").decode()
    version = metadata.get(b"version", b"").decode()
    if (name, version) != (model.name, str(model.version)):
        raise ValueError(
            f"--out {out}: {shard.file_name} is of {name or 'no model'}, version {version or '?'}, "
            f"not of {model.name}, version {model.version}; delete it or give another --out"
        )
    return True
