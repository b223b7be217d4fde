"""`KeptFolder`: read, add and delete kept images and their labels."""

import os
import re
import secrets
import socket
from collections.abc import Iterable
from datetime import date, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from models.kept.files import Files, LocalFiles
from models.kept.records import (
    KeptImage,
    Label,
    LabelledImage,
    Record,
    join,
    merge_images,
    merge_labels,
    now,
    pack_line,
    parse_lines,
)

LABELS_DIRECTORY = "labels"
LINES_SUFFIX = ".jsonl"
ABANDONED_SECONDS = 600.0  # age from which a half-written file counts as one of a killed process
DAY = re.compile(r"\d{4}-\d\d-\d\d")
WRITER_CHARACTERS = re.compile(r"[^A-Za-z0-9.-]")

# Suffix of an image file by its format, as `models.image.header.Header` names it.
SUFFIXES = {"jpeg": "jpg"}


def open_kept(location: str | os.PathLike[str]) -> "KeptFolder":
    """Open a directory, or the URL of a bucket such as s3://bucket/kept, which may be empty yet.

    Raises KeptError for a URL that can't be used.
    """
    text = os.fspath(location)
    if "://" not in text:
        return KeptFolder(LocalFiles(Path(text)))

    from models.kept.bucket import BucketFiles

    return KeptFolder(BucketFiles(text))


def build_writer_name(suffix: str = "") -> str:
    """Return a name of the files of one process, which no other process uses."""
    host = WRITER_CHARACTERS.sub("-", socket.gethostname()) or "host"
    return f"{host}-{secrets.token_hex(4)}{suffix}"


def build_file_path(digest: str, image_format: str, day: date) -> str:
    """Return the path of an image that arrives on `day`."""
    return f"{day.isoformat()}/{digest}.{SUFFIXES.get(image_format, image_format)}"


class KeptFolder:
    """A directory of kept images. Several threads and processes may use it at once.

    Methods raise OSError where the directory or bucket can't be read or written.
    """

    def __init__(self, files: Files):
        self.files = files
        self.writer = build_writer_name()
        # Records of each file of lines that was read, with the bytes that it had.
        self._parsed: dict[str, tuple[int, list[Any]]] = {}

    @property
    def location(self) -> str:
        """The directory or URL, for messages."""
        return self.files.location

    # Reading

    def read(self) -> list[LabelledImage]:
        """Return the images whose files are there, in the order of arrival, with their labels."""
        files = self.files.list_files()
        return join(self._read_images(files), self._read_labels(files))

    def read_images(self) -> dict[str, KeptImage]:
        """Return the images whose files are there by digest, in the order of arrival."""
        return self._read_images(self.files.list_files())

    def read_labels(self) -> dict[str, tuple[Label, tuple[Label, ...]]]:
        """Return by digest the label that counts, and the last labels of others that differ."""
        return self._read_labels(self.files.list_files())

    def read_file(self, image: KeptImage) -> bytes:
        """Return the bytes of an image file. Raises FileNotFoundError if it is gone."""
        return self.files.read(image.file)

    def has_file(self, path: str) -> bool:
        """Whether an image file is there."""
        return self.files.exists(path)

    def count_bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(size for _, size in self.files.list_files())

    def _read_images(self, files: list[tuple[str, int]]) -> dict[str, KeptImage]:
        present = {path for path, _ in files}
        lines: list[KeptImage] = []
        for path, size in files:
            if path.endswith(LINES_SUFFIX) and is_day(path):
                lines += self._read_lines(path, size, KeptImage)
        return merge_images(line for line in lines if line.file in present)

    def _read_labels(
        self, files: list[tuple[str, int]]
    ) -> dict[str, tuple[Label, tuple[Label, ...]]]:
        lines: list[Label] = []
        for path, size in files:
            if path.endswith(LINES_SUFFIX) and path.startswith(f"{LABELS_DIRECTORY}/"):
                lines += self._read_lines(path, size, Label)
        return merge_labels(lines)

    def _read_lines(self, path: str, size: int, record_type: type[Record]) -> list[Record]:
        """Return the records of a file of lines, which is read again only if its size changed."""
        parsed_size, records = self._parsed.get(path, (-1, []))
        if parsed_size == size:
            return records
        try:
            content = self.files.read(path)
        except FileNotFoundError:
            return []
        records = parse_lines(content, record_type)
        self._parsed[path] = (len(content), records)
        return records

    # Adding

    def add_image(self, image: KeptImage, content: bytes | None) -> None:
        """Add an image: first its file, then its line. `content` is None if the file is there."""
        if content is not None:
            self.files.write(image.file, content)
        day = PurePosixPath(image.file).parts[0]
        self.files.append(f"{day}/{self.writer}{LINES_SUFFIX}", pack_line(image))

    def add_labels(self, labels: Iterable[Label]) -> None:
        """Add labels; they are on the disk when this returns."""
        content = b"".join([pack_line(label) for label in labels])
        self.files.append(f"{LABELS_DIRECTORY}/{self.writer}{LINES_SUFFIX}", content)

    # Deleting

    def delete_request(self, request_id: str) -> int:
        """Delete all images of a request, with their lines and labels. Return how many.

        An image that several requests sent is deleted with any of them.
        """
        digests: list[str] = []
        for image in self.read_images().values():
            if request_id in image.request_ids:
                digests.append(image.digest)
        self.delete_images(digests)
        return len(digests)

    def delete_images(self, digests: Iterable[str]) -> None:
        """Delete images, with their lines and labels."""
        deleted = {digest.encode() for digest in digests}
        if not deleted:
            return

        def is_kept(line: bytes) -> bool:
            return not any(digest in line for digest in deleted)

        for path, _ in self.files.list_files():
            digest = os.fsencode(PurePosixPath(path).stem)
            if path.endswith(LINES_SUFFIX):
                self.files.filter_lines(path, is_kept)
            elif digest in deleted:
                self.files.remove(path)

    def delete_leftovers(self) -> None:
        """Delete files that a killed process has left half-written."""
        self.files.remove_staged(now().timestamp() - ABANDONED_SECONDS)

    def delete_older(self, days: int) -> int:
        """Delete the images that arrived more than `days` days ago. Return how many.

        Their labels go with them.
        """
        first_day = (now().date() - timedelta(days=days)).isoformat()
        expired = [path for path, _ in self.files.list_files() if is_day(path) and path < first_day]
        digests: set[str] = set()
        for path in expired:
            if not path.endswith(LINES_SUFFIX):
                digests.add(PurePosixPath(path).stem)
            self.files.remove(path)
        self.delete_images(digests)
        return len(digests)


def select_image_files(files: list[tuple[str, int]]) -> dict[str, str]:
    """Return the path of each image by its digest, of all files of a directory of kept images."""
    images: dict[str, str] = {}
    for path, _ in files:
        if is_day(path) and not path.endswith(LINES_SUFFIX):
            images[PurePosixPath(path).stem] = path
    return images


def is_day(path: str) -> bool:
    """Whether a path is below the directory of a day."""
    return DAY.fullmatch(PurePosixPath(path).parts[0]) is not None
