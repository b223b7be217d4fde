"""Archives of images: .zip, and .tar with or without compression.

An archive may come from anywhere, so it is unpacked with limits. Refused are paths that lead out of
the directory, links to anything but a file of the archive, devices, encrypted files, and archives
that unpack to far more than their own size. Hidden files, and what macOS adds, are left out.
"""

import bz2
import errno
import gzip
import lzma
import os
import posixpath
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from models.image.files import is_hidden
from train.data.source import DataError, printable_name
from train.data.sources.byte_progress import byte_progress

ARCHIVE_ENDINGS = (
    *(".zip", ".tar"),
    *(".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz"),
)
HEAD_BYTES = tarfile.BLOCKSIZE  # at the start of a file; they tell whether it is an archive

MAX_MEMBERS = 20_000_000  # files, folders and links of an archive
MAX_EXPANSION = 200  # unpacked bytes for each byte of the archive; photos hardly compress
SMALL_BYTES = 1 << 30  # an archive that unpacks to fewer bytes may expand by any factor
MAX_HEADER_BYTES = 16 << 20  # of one header of a .tar, which is read into memory
MAX_LINK_BYTES = 4096  # of the target of a link
MAX_LINK_CHAIN = 8  # links that lead to links
COPY_BYTES = 1 << 20

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# What is raised for damaged files, besides OSError without errno by gzip and bz2.
DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OverflowError,
    ValueError,
    struct.error,
)
DECOMPRESSORS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # the second one is of an empty archive
UTF8_NAME_FLAG = 0x800  # of a member of a .zip
ENCRYPTED_FLAG = 0x1
DRIVE = re.compile(r"[A-Za-z]:[/\\]")


class Link(NamedTuple):
    """A link of an archive, to create after all files."""

    path: Path
    target: Path
    name: str  # of the member
    is_hard: bool


def has_archive_ending(name: str) -> bool:
    """Whether a file name ends like that of an archive."""
    return name.lower().endswith(ARCHIVE_ENDINGS)


def strip_archive_ending(name: str) -> str:
    """Return a file name without the ending of an archive: photos for photos.tar.gz."""
    for ending in sorted(ARCHIVE_ENDINGS, key=len, reverse=True):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def check_archive(head: bytes, source: str) -> None:
    """Raise DataError where a file with these first `HEAD_BYTES` bytes is no archive."""
    if head.startswith((*ZIP_MAGICS, *DECOMPRESSORS)) or _is_tar_header(head):
        return
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise DataError(
            f"{source}: a web page, not an archive; give the address of the .zip or .tar file"
        )
    raise DataError(f"{source}: not a .zip or .tar archive")


def _is_tar_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def unpack_archive(archive: Path, directory: Path, source: str) -> None:
    """Unpack an archive into an empty directory, with a progress bar on a terminal.

    Raises DataError, beginning with `source`, where it is damaged or unsafe, and OSError where the
    disk is full.
    """
    with archive.open("rb") as file:
        head = file.read(HEAD_BYTES)
    check_archive(head, source)

    unpacker = _Unpacker(source, directory, archive.stat().st_size)
    unpack = _unpack_zip if head.startswith(ZIP_MAGICS) else _unpack_tar
    try:
        unpack(archive, head, unpacker)
        unpacker.create_links()
    except DataError:  # a ValueError, too
        raise
    except NotImplementedError as error:  # of zipfile: another compression, or encryption
        raise DataError(
            f"{source}: {error}, which is not supported; pack it with deflate"
        ) from error
    except DAMAGE_ERRORS as error:
        raise DataError(_describe_damage(source, error)) from error
    except OSError as error:
        if error.errno is None:  # raised by gzip and bz2
            raise DataError(_describe_damage(source, error)) from error
        raise


def _describe_damage(source: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{source}: a damaged archive ({printable_name(reason)}); get it again"


# .zip


def _unpack_zip(archive: Path, head: bytes, unpacker: "_Unpacker") -> None:
    with zipfile.ZipFile(archive) as file, byte_progress("Unpacking", unpacker.size) as report:
        members = file.infolist()
        for member in members:
            unpacker.count_member(member.file_size)

        done = 0
        for member in members:
            _unpack_zip_member(file, member, unpacker)
            done += member.compress_size
            report(done)


def _unpack_zip_member(
    file: zipfile.ZipFile, member: zipfile.ZipInfo, unpacker: "_Unpacker"
) -> None:
    name = _decode_zip_name(member)
    if member.flag_bits & ENCRYPTED_FLAG:
        raise DataError(
            f"{unpacker.source}: protected by a password; unpack it, and give the folder"
        )
    if member.is_dir() or name.endswith("\\"):
        unpacker.check_path(name)
        return

    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where another system wrote the archive
    if kind == stat.S_IFLNK:
        with file.open(member) as content:
            target = content.read(MAX_LINK_BYTES).decode()
        unpacker.add_link(name, target)
        return
    if kind not in (0, stat.S_IFREG):
        raise unpacker.refuse(name, "neither file, folder nor link")
    with file.open(member) as content:
        unpacker.write_file(name, content)


def _decode_zip_name(member: zipfile.ZipInfo) -> str:
    """Return the name of a member; macOS writes UTF-8 without the flag that says so."""
    if member.flag_bits & UTF8_NAME_FLAG:
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


# .tar


class _LimitedReads:
    """A file for tarfile, which reads as many bytes of a header at once as the header says."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _unpack_tar(archive: Path, head: bytes, unpacker: "_Unpacker") -> None:
    with ExitStack() as stack:
        raw = stack.enter_context(archive.open("rb"))
        content: Any = raw
        for magic, decompress in DECOMPRESSORS.items():
            if head.startswith(magic):
                content = stack.enter_context(decompress(raw))
        reads: Any = _LimitedReads(content)
        file = stack.enter_context(tarfile.open(fileobj=reads, mode="r:"))
        report = stack.enter_context(byte_progress("Unpacking", unpacker.size))

        while (member := file.next()) is not None:
            unpacker.count_member(member.size)
            _unpack_tar_member(file, member, unpacker)
            report(raw.tell())
            # tarfile keeps each member that it has read: a gigabyte for a million files.
            file.members = []  # type: ignore[attr-defined]
        _check_tar_end(file, reads)


def _unpack_tar_member(
    file: tarfile.TarFile, member: tarfile.TarInfo, unpacker: "_Unpacker"
) -> None:
    if member.isdir():
        unpacker.check_path(member.name)
    elif member.issym():
        unpacker.add_link(member.name, member.linkname)
    elif member.islnk():
        unpacker.add_hard_link(member.name, member.linkname)
    elif member.isreg():
        content = file.extractfile(member)
        assert content is not None  # it is None for what is no file
        with content:
            unpacker.write_file(member.name, content)
    else:
        raise unpacker.refuse(member.name, "neither file, folder nor link")


def _check_tar_end(file: tarfile.TarFile, reads: _LimitedReads) -> None:
    """Raise ReadError where tarfile stopped at a damaged header, which it takes for the end."""
    reads.seek(file.offset)
    block = reads.read(tarfile.BLOCKSIZE)
    is_end = block == b"" or block == bytes(tarfile.BLOCKSIZE)
    if not is_end:
        raise tarfile.ReadError(f"no valid header at byte {file.offset}")


# What is written


class _Unpacker:
    """Writes the members of one archive below a directory, within its limits."""

    def __init__(self, source: str, directory: Path, size: int):
        self.source = source
        self.size = size  # of the archive, in bytes
        self._directory = directory
        self._links: list[Link] = []
        self._members = 0
        self._bytes = 0

        disk = os.statvfs(directory)
        self._free_bytes = shutil.disk_usage(directory).free
        # Some file systems have no fixed number of files, and report 0.
        self._free_files = disk.f_favail if disk.f_files else MAX_MEMBERS

    def count_member(self, size: int) -> None:
        """Add one member to the totals. Raises DataError or OSError for too many or too large."""
        if size < 0:
            raise ValueError(f"a file of {size} bytes")
        self._members += 1
        self._bytes += size
        if self._members > MAX_MEMBERS:
            raise DataError(f"{self.source}: more than {MAX_MEMBERS:,} files; split the archive")
        if self._bytes > max(SMALL_BYTES, MAX_EXPANSION * self.size):
            raise DataError(
                f"{self.source}: unpacks to more than {MAX_EXPANSION} times its size, unlike any "
                "archive of photos; unpack it, and give the folder"
            )
        if self._bytes > self._free_bytes or self._members > self._free_files:
            reason = f"{os.strerror(errno.ENOSPC)} to unpack {self.source}"
            raise OSError(errno.ENOSPC, reason, str(self._directory))

    def refuse(self, name: str, problem: str) -> DataError:
        """Return the error for an unsafe member."""
        return DataError(
            f"{self.source}: refused, as it holds {printable_name(name)!r}: {problem}; pack the "
            "class folders alone (tar --dereference for links)"
        )

    def check_path(self, name: str) -> list[str]:
        """Return the components of a member's path. Raises DataError for an unsafe one."""
        if "/" not in name:
            name = name.replace("\\", "/")  # written on Windows
        if name.startswith("/") or DRIVE.match(name):
            raise self.refuse(name, "an absolute path")
        if "\0" in name:
            raise self.refuse(name, "a path with a NUL byte")

        components = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in components:
            raise self.refuse(name, "a path with ..")
        return components

    def _visible_path(self, name: str) -> Path | None:
        """Return where to write a member; None where it is hidden."""
        components = self.check_path(name)
        if not components or any(is_hidden(part) for part in components):
            return None
        return self._directory.joinpath(*components)

    def write_file(self, name: str, content: IO[bytes]) -> None:
        """Write one file. All folders above it are real ones, as links are created last."""
        path = self._visible_path(name)
        if path is None:
            return
        with self._explain_errors(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb", buffering=0)
        with file:
            while chunk := content.read(COPY_BYTES):
                with self._explain_errors(name):
                    file.write(chunk)

    @contextmanager
    def _explain_errors(self, name: str) -> Iterator[None]:
        """Turn what the disk refuses into DataError, other than that it is full."""
        try:
            yield
        except OSError as error:
            if error.errno in DISK_FULL_ERRORS:
                raise OSError(error.errno, error.strerror, str(self._directory)) from error
            raise DataError(
                f"{self.source}: {printable_name(name)!r} can't be written: {error.strerror}"
            ) from error

    def add_link(self, name: str, target: str) -> None:
        """Add a symbolic link, whose target is relative to its own folder."""
        path = self._visible_path(name)
        if path is None:
            return
        if target.startswith("/"):
            raise self.refuse(name, f"a link to {printable_name(target)}")
        folder = "/".join(self.check_path(name)[:-1])
        joined = posixpath.normpath(posixpath.join(folder, target))
        if joined == ".." or joined.startswith("../"):
            raise self.refuse(name, f"a link to {printable_name(target)}")
        self._links.append(Link(path, self._directory / joined, name, False))

    def add_hard_link(self, name: str, target: str) -> None:
        """Add a second name of an earlier member."""
        path = self._visible_path(name)
        if path is not None:
            target_path = self._directory.joinpath(*self.check_path(target))
            self._links.append(Link(path, target_path, name, True))

    def create_links(self) -> None:
        """Create the links to files of the archive. Raises DataError for any other link."""
        pending = self._links
        for _ in range(MAX_LINK_CHAIN):
            unresolved = [link for link in pending if not link.target.is_file()]
            for link in pending:
                if link not in unresolved:
                    self._create_link(link)
            pending = unresolved
        if pending:
            target = pending[0].target.relative_to(self._directory).as_posix()
            raise self.refuse(
                pending[0].name, f"a link to {printable_name(target)}, no file of the archive"
            )

    def _create_link(self, link: Link) -> None:
        with self._explain_errors(link.name):
            link.path.parent.mkdir(parents=True, exist_ok=True)
            if link.is_hard:
                link.path.hardlink_to(link.target)
            else:
                link.path.symlink_to(os.path.relpath(link.target, link.path.parent))
