"""Digests of a bundle's files and the paths that may be read: what makes a copy of it safe to trust."""

import hashlib
from pathlib import Path, PurePosixPath

CHECKSUMS_FILE = "SHA256SUMS"
SIGNATURE = (
    "bundle.sig"  # signs all other files, SHA256SUMS too, so it is the one file not listed there
)
MAX_FILES = 1000
MAX_CHECKSUMS_BYTES = 1 << 20


class BundleError(ValueError):
    """A bundle or a store that can't be trusted or read; the message is one line that names the file and the cause."""


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolve_inside(root: Path, name: str) -> Path:
    """`root/name`, refused where the name is absolute, climbs out of the bundle or leads through a link."""
    pure = PurePosixPath(name)
    path = root / pure
    if (
        pure.is_absolute()
        or ".." in pure.parts
        or not path.resolve().is_relative_to(root.resolve())
    ):
        raise BundleError(f"{root}: the path {name!r} leads out of the bundle")
    return path


def write_checksums(directory: Path) -> None:
    """Write SHA256SUMS over every other file of the bundle, in the format that `sha256sum -c` reads."""
    lines = [f"{file_sha256(directory / name)}  {name}\n" for name in _files(directory)]
    (directory / CHECKSUMS_FILE).write_text("".join(lines))


def parse_checksums(text: str, where: object) -> dict[str, str]:
    """File name -> sha256, from the text of a SHA256SUMS; names that climb out of the bundle raise BundleError."""
    sums = {}
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        parts = PurePosixPath(name).parts
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef") or not name:
            raise BundleError(f"{where}: malformed line {line[:80]!r}")
        if name.startswith("/") or ".." in parts or "\\" in name:
            raise BundleError(f"{where}: the path {name!r} leads out of the bundle")
        sums[name] = digest
    if not 0 < len(sums) <= MAX_FILES:
        raise BundleError(f"{where}: lists {len(sums)} files (1 to {MAX_FILES} allowed)")
    return sums


def check_checksums(path: Path) -> dict[str, str]:
    """Compare every file with SHA256SUMS and return it; a file missing, unreadable, changed or extra: BundleError."""
    file = path / CHECKSUMS_FILE
    try:
        if file.stat().st_size > MAX_CHECKSUMS_BYTES:
            raise BundleError(f"{file}: larger than {MAX_CHECKSUMS_BYTES} bytes")
        listed = parse_checksums(file.read_text(), file)
    except FileNotFoundError as error:
        raise BundleError(f"{file}: no such file, so the bundle is not whole") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{file}: not readable: {error}") from error
    present = set(_files(path))
    for name in sorted(set(listed) | present):
        if name not in listed:
            raise BundleError(f"{path / name}: not listed in {CHECKSUMS_FILE}")
        if name not in present:
            raise BundleError(f"{path / name}: listed in {CHECKSUMS_FILE}, but missing")
        try:
            found = file_sha256(resolve_inside(path, name))
        except OSError as error:
            raise BundleError(f"{path / name}: not readable: {error.strerror}") from error
        if found != listed[name]:
            raise BundleError(
                f"{path / name}: changed since it was written (sha256 differs from {CHECKSUMS_FILE})"
            )
    return listed


def _files(directory: Path) -> list[str]:
    paths = (p for p in directory.rglob("*") if p.is_file() or p.is_symlink())
    names = (p.relative_to(directory).as_posix() for p in paths)
    return sorted(name for name in names if name not in (CHECKSUMS_FILE, SIGNATURE))
