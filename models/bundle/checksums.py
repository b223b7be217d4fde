"""SHA256SUMS: the checksums of a bundle's files, and the paths that may be read from a bundle.

The format is that of `sha256sum`: a line `<64 hex digits>  <path>` for each file. Only SHA256SUMS
itself and bundle.sig, which signs all other files, are not listed.
"""

import hashlib
from pathlib import Path, PurePosixPath

from models.bundle.errors import BundleError

CHECKSUMS_FILE = "SHA256SUMS"
SIGNATURE_FILE = "bundle.sig"
MAX_FILES = 1000
MAX_CHECKSUMS_BYTES = 1 << 20
_HEX_DIGITS = frozenset("0123456789abcdef")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def write_checksums(directory: Path) -> None:
    """Write SHA256SUMS over every other file of the bundle."""
    lines = [f"{file_sha256(directory / name)}  {name}\n" for name in _list_files(directory)]
    (directory / CHECKSUMS_FILE).write_text("".join(lines))


def parse_checksums(text: str, source: object) -> dict[str, str]:
    """Return file name -> sha256 from the text of a SHA256SUMS.

    `source` names the file in error messages. Raises BundleError for a malformed line, a path
    outside the bundle, no file, or more than MAX_FILES.
    """
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


def check_checksums(directory: Path) -> dict[str, str]:
    """Compare every file with SHA256SUMS and return its contents.

    Raises BundleError for a file that is missing, unreadable, changed or not listed.
    """
    checksums = _read_checksums(directory)
    files = set(_list_files(directory))

    for name in sorted(set(checksums) | files):
        path = directory / name
        if name not in checksums:
            raise BundleError(f"{path}: not listed in {CHECKSUMS_FILE}")
        if name not in files:
            raise BundleError(f"{path}: listed in {CHECKSUMS_FILE}, but missing")

        try:
            digest = file_sha256(resolve_inside(directory, name))
        except OSError as error:
            raise BundleError(f"{path}: not readable: {error.strerror}") from error
        if digest != checksums[name]:
            raise BundleError(
                f"{path}: changed since it was written (sha256 differs from {CHECKSUMS_FILE})"
            )
    return checksums


def _read_checksums(directory: Path) -> dict[str, str]:
    file = directory / CHECKSUMS_FILE
    try:
        if file.stat().st_size > MAX_CHECKSUMS_BYTES:
            raise BundleError(f"{file}: larger than {MAX_CHECKSUMS_BYTES} bytes")
        return parse_checksums(file.read_text(), file)
    except FileNotFoundError as error:
        raise BundleError(f"{file}: no such file, so the bundle is incomplete") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: not readable: {error}") from error


def _list_files(directory: Path) -> list[str]:
    """Return the relative paths that SHA256SUMS lists, sorted. Links count as files."""
    names: list[str] = []
    for path in directory.rglob("*"):
        if path.is_file() or path.is_symlink():
            names.append(path.relative_to(directory).as_posix())
    return sorted(name for name in names if name not in (CHECKSUMS_FILE, SIGNATURE_FILE))
