"""Image files in folders: training and `imago serve predict` find the same ones.

    (found,) = find_files([folder])
    images = [path for path in found.files if is_image_file(path)]

Hidden files and folders are skipped, links are followed, and each real file is found once.
"""

import os
import stat
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from models.image.errors import UndecodableImage, UnsupportedFormat
from models.image.header import read_header

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
)
FORMATS = "JPEG, PNG, WebP, AVIF, BMP, GIF or TIFF"  # for messages
# Folders that systems add next to the user's own.
SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"))
MAGIC_BYTES = 64  # at the start of a file; enough for any format's magic number

REPEATED = "read already under another name"
FOLDER_ABOVE = "linked to a folder above"
NOT_REGULAR = "neither file nor folder"


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """The files of one folder. Paths begin with the folder, as `find_files` was given it."""

    files: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # path, reason
    errors: list[OSError] = field(default_factory=list)  # of folders that can't be listed


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is skipped."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def has_image_suffix(name: str) -> bool:
    """Whether a file name ends like that of an image that can be read."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_image_file(path: str | os.PathLike) -> bool:
    """Whether a file is to be read as an image.

    It is where its name ends like one. Otherwise its first bytes decide, as in the service.
    """
    if has_image_suffix(os.fspath(path)):
        return True
    try:
        start = read_regular_file(path, MAGIC_BYTES)
    except OSError:
        return False
    return _has_image_magic(start)


def _has_image_magic(start: bytes) -> bool:
    try:
        read_header(start)
    except UnsupportedFormat:
        return False
    except UndecodableImage:
        return len(start) > 0  # the header is longer than the bytes read
    return True


def read_regular_file(path: str | os.PathLike, size: int = -1) -> bytes:
    """Read a file, or its first `size` bytes.

    Raises OSError, also for what is no regular file: reading a named pipe would wait for a writer.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        return file.read(size)


def find_files(folders: Sequence[str | os.PathLike]) -> list[FoundFiles]:
    """Find the files in each folder and the folders below it, sorted by path.

    Links are followed after everything else, so that a file belongs to the folder that holds it
    rather than to one that links to it. A link to a missing file counts as a file, which reading
    then reports.
    """
    search = _Search([os.fspath(folder) for folder in folders])
    search.run()
    for found in search.found:
        found.files.sort()
    return search.found


class _Search:
    """The state of one `find_files`."""

    def __init__(self, folders: list[str]):
        self.found = [FoundFiles() for _ in folders]
        self.folders: deque[tuple[int, str]] = deque()  # number in `found`, path
        self.links: deque[tuple[int, str]] = deque()
        self.real_paths: set[str] = set()  # of the files and folders that were found

        for number, folder in enumerate(folders):
            waiting = self.links if os.path.islink(folder) else self.folders
            waiting.append((number, folder))

    def run(self) -> None:
        while self.folders or self.links:
            if self.folders:
                self._list_folder(*self.folders.popleft())
            else:
                self._follow_link(*self.links.popleft())

    def _list_folder(self, number: int, folder: str) -> None:
        found = self.found[number]
        real_folder = os.path.realpath(folder)
        if real_folder in self.real_paths:
            found.skipped.append((folder, REPEATED))
            return
        self.real_paths.add(real_folder)

        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not is_hidden(entry.name):
                        self._add_entry(number, entry, real_folder)
        except OSError as error:
            found.errors.append(error)

    def _add_entry(self, number: int, entry: os.DirEntry, real_folder: str) -> None:
        if entry.is_symlink():
            self.links.append((number, entry.path))
        elif entry.is_dir(follow_symlinks=False):
            self.folders.append((number, entry.path))
        elif entry.is_file(follow_symlinks=False):
            self._add_file(number, entry.path, os.path.join(real_folder, entry.name))
        else:
            self.found[number].skipped.append((entry.path, NOT_REGULAR))

    def _follow_link(self, number: int, link: str) -> None:
        real_path = os.path.realpath(link)
        if os.path.isdir(real_path):
            real_parent = os.path.realpath(os.path.dirname(link))
            if os.path.commonpath((real_path, real_parent)) == real_path:
                self.found[number].skipped.append((link, FOLDER_ABOVE))
            else:
                self.folders.append((number, link))
        elif os.path.isfile(real_path) or not os.path.exists(real_path):
            self._add_file(number, link, real_path)
        else:
            self.found[number].skipped.append((link, NOT_REGULAR))

    def _add_file(self, number: int, path: str, real_path: str) -> None:
        if real_path in self.real_paths:
            self.found[number].skipped.append((path, REPEATED))
            return
        self.real_paths.add(real_path)
        self.found[number].files.append(path)
