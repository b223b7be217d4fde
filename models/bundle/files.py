"""The files of a bundle: which ones it may hold, and how they are read.

A bundle holds regular files in plain directories. A link, a named pipe or a device could lead to
other contents than those that were checked, or block the reader for ever, so they are refused.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path, PurePosixPath

from models.bundle.errors import BundleError

CHECKSUMS_FILE = "SHA256SUMS"
SIGNATURE_FILE = "bundle.sig"
MAX_SIGNATURE_BYTES = 4 << 20
MAX_FILES = 1000

# What file managers leave in each directory that they show: never read, and not listed.
FILE_MANAGER_FILES = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))
APPLE_DOUBLE_PREFIX = "._"

# onnxruntime's own format, which the ONNX screening can't read.
ORT_SUFFIX = ".ort"


def resolve_inside(root: Path, name: str) -> Path:
    """Return `root/name`.

    Raises BundleError where the name is absolute, contains "..", or follows a link to a file
    outside of `root`.
    """
    relative = PurePosixPath(name)
    path = root / relative
    is_outside = relative.is_absolute() or ".." in relative.parts
    if is_outside or not path.resolve().is_relative_to(root.resolve()):
        raise BundleError(f"{root}: the path {name!r} points outside the bundle")
    return path


def list_files(directory: Path) -> list[str]:
    """Return the relative paths of the files that SHA256SUMS lists, sorted.

    Left out are SHA256SUMS, bundle.sig, and what file managers leave. Raises BundleError for a link
    or a special file, a file in onnxruntime's own format, or more than MAX_FILES files.
    """
    names: list[str] = []
    pending = [directory]
    while pending:
        for entry in _scan(pending.pop()):
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
                continue
            if is_left_by_file_manager(entry.name):
                continue
            _check_is_regular(path, entry.stat(follow_symlinks=False).st_mode)
            if path.suffix.lower() == ORT_SUFFIX:
                raise BundleError(f"{path}: in onnxruntime's own format; only ONNX is allowed")
            names.append(path.relative_to(directory).as_posix())
        if len(names) > MAX_FILES + 2:
            raise BundleError(f"{directory}: more than {MAX_FILES} files")
    return sorted(name for name in names if name not in (CHECKSUMS_FILE, SIGNATURE_FILE))


def is_left_by_file_manager(name: str) -> bool:
    """Whether a file of this name is one that a file manager leaves, such as .DS_Store."""
    return name in FILE_MANAGER_FILES or name.startswith(APPLE_DOUBLE_PREFIX)


def read_file(path: Path, max_bytes: int, if_missing: str = "no such file") -> bytes:
    """Return the contents of a regular file.

    Raises BundleError where it is missing (with the reason `if_missing`), unreadable, larger than
    `max_bytes`, or a link or special file.
    """
    with _open(path, if_missing) as file:
        # The size first, so that a file that is far too large is not read at all.
        size = os.fstat(file.fileno()).st_size
        content = file.read(max_bytes + 1) if size <= max_bytes else b""
    if max(size, len(content)) > max_bytes:
        raise BundleError(f"{path}: larger than {max_bytes} bytes")
    return content


def file_sha256(path: Path) -> str:
    """Return the sha256 of a regular file as 64 hex digits. Raises BundleError as `read_file`."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_file(path: Path) -> BufferedReader:
    """Open a regular file. Raises OSError where it is missing, unreadable, or a link."""
    # Without O_NONBLOCK, opening a named pipe waits for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(os.open(path, flags), "rb")


@contextmanager
def _open(path: Path, if_missing: str = "no such file") -> Iterator[BufferedReader]:
    """Open a regular file. Errors, also those of the block, are BundleErrors."""
    try:
        with open_file(path) as file:
            _check_is_regular(path, os.fstat(file.fileno()).st_mode)
            yield file
    except FileNotFoundError as error:
        raise BundleError(f"{path}: {if_missing}") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BundleError(_describe_link(path)) from error
        raise BundleError(f"{path}: not readable: {error.strerror}") from error


def _scan(directory: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError as error:
        raise BundleError(f"{directory}: not readable: {error.strerror}") from error


def _check_is_regular(path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise BundleError(_describe_link(path))
    if not stat.S_ISREG(mode):
        raise BundleError(f"{path}: not a regular file; a bundle holds nothing else")


def _describe_link(path: Path) -> str:
    return f"{path}: a link; a bundle holds regular files only, copy it with its contents (cp -L)"
