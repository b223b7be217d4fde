"""SHA256SUMS: the checksums of a bundle's files.

The format is that of `sha256sum`: a line `<64 hex digits>  <path>` for each file. Only SHA256SUMS
itself and bundle.sig, which signs all other files, are not listed.
"""

import hashlib
from io import BufferedReader
from pathlib import Path, PurePosixPath

from models.bundle.errors import BundleError
from models.bundle.files import (
    CHECKSUMS_FILE,
    MAX_FILES,
    file_sha256,
    list_files,
    open_file,
    read_file,
)

MAX_CHECKSUMS_BYTES = 1 << 20
_HEX_DIGITS = frozenset("0123456789abcdef")


def write_checksums(directory: Path) -> None:
    """Write SHA256SUMS over every other file of the bundle."""
    lines = [f"{file_sha256(directory / name)}  {name}\n" for name in list_files(directory)]
    (directory / CHECKSUMS_FILE).write_text("".join(lines))


def read_checksums(directory: Path) -> bytes:
    """Return the contents of SHA256SUMS. Raises BundleError where it is missing or unreadable."""
    file = directory / CHECKSUMS_FILE
    missing = "no such file, so the bundle is incomplete"
    return read_file(file, MAX_CHECKSUMS_BYTES, missing)


def parse_checksums(content: bytes, source: object) -> dict[str, str]:
    """Return file name -> sha256 from the contents of a SHA256SUMS.

    `source` names the file in error messages. Raises BundleError for text that is not UTF-8, a
    malformed line, a path outside the bundle, no file, or more than MAX_FILES.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BundleError(f"{source}: not readable: {error}") from error

    checksums: dict[str, str] = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not set(digest) <= _HEX_DIGITS or not name:
            raise BundleError(f"{source}: malformed line {line[:80]!r}")

        is_outside = name.startswith("/") or ".." in PurePosixPath(name).parts
        if is_outside or "\\" in name:
            raise BundleError(f"{source}: the path {name!r} points outside the bundle")
        checksums[name] = digest

    if not 0 < len(checksums) <= MAX_FILES:
        raise BundleError(f"{source}: lists {len(checksums)} files (1 to {MAX_FILES} are allowed)")
    return checksums


def check_listed(directory: Path, checksums: dict[str, str]) -> None:
    """Raise BundleError for a file that is missing, or that SHA256SUMS does not list."""
    files = set(list_files(directory))
    for name in sorted(files ^ checksums.keys()):
        if name in files:
            raise BundleError(f"{directory / name}: not listed in {CHECKSUMS_FILE}")
        raise BundleError(f"{directory / name}: listed in {CHECKSUMS_FILE}, but missing")


def check_sha256(path: Path, actual: str, expected: str) -> None:
    """Raise BundleError where the digest of a file is not that of SHA256SUMS."""
    if actual != expected:
        raise BundleError(
            f"{path}: changed since it was written (sha256 differs from {CHECKSUMS_FILE})"
        )


def open_verified(directory: Path, name: str, digest: str) -> BufferedReader | None:
    """Open a file of a bundle that was verified before and had this digest.

    Returns None where the bundle has no such file. Raises BundleError where the file is not the one
    that was verified.
    """
    source = directory / CHECKSUMS_FILE
    content = read_checksums(directory)
    check_sha256(source, hashlib.sha256(content).hexdigest(), digest)
    checksums = parse_checksums(content, source)
    if name not in checksums:
        return None

    path = directory / name
    try:
        stream = open_file(path)
    except OSError as error:
        raise BundleError(f"{path}: not readable: {error.strerror}") from error
    try:
        check_sha256(path, hashlib.file_digest(stream, "sha256").hexdigest(), checksums[name])
        stream.seek(0)
    except BaseException:
        stream.close()
        raise
    return stream
