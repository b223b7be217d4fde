"""The store: `<store>/<name>/<version>/`, versions 1, 2, 3, …, and `latest`, a link that moves in one rename.

A version appears whole or not at all, and two writers that finish together get two versions.
"""
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.bundle import Bundle, BundleError

LATEST = "latest"


class Store:
    """Bundles by name and version under one directory, which need not exist yet."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def names(self) -> list[str]:
        """Names with at least one version, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if not p.name.startswith(".") and self.versions(p.name))

    def versions(self, name: str) -> list[int]:
        """Versions of a name, rising; empty where there is none."""
        directory = self.root / name
        if not directory.is_dir():
            return []
        return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())

    def latest(self, name: str) -> int | None:
        """The version that `latest` points to, or None."""
        try:
            target = os.readlink(self.root / name / LATEST)
        except OSError:
            return None
        return int(target) if target.isdecimal() else None

    def path(self, name: str, version: str | int = LATEST) -> Path:
        """Directory of one version ("latest" or a number). Raises BundleError, saying what there is instead."""
        if name not in self.names():
            there = ", ".join(self.names()) or "nothing"
            raise BundleError(f"{self.root}: no model {name!r} in this store; it has {there}")
        number = self.latest(name) if str(version) == LATEST else version
        path = self.root / name / str(number)
        if number is None or not str(number).isdecimal() or not path.is_dir():
            there = ", ".join(map(str, self.versions(name)))
            raise BundleError(f"{self.root}: {name} has no version {version}; it has {there}")
        return path

    def open(self, name: str, version: str | int = LATEST, verify: bool = True) -> Bundle:
        return Bundle(self.path(name, version), verify)

    @contextmanager
    def stage(self, name: str) -> Iterator[Path]:
        """A hidden directory beside the versions, on the same file system; gone when the block ends."""
        parent = self.root / name
        parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=".staging-", dir=parent))
        try:
            directory.chmod(0o755)
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            if not any(parent.iterdir()):
                parent.rmdir()

    def claim(self, name: str, first: int = 1) -> int:
        """The version number the next `publish` is likely to get; only the rename decides."""
        return max([first - 1, *self.versions(name)]) + 1

    def publish(self, staged: Path, name: str, version: int) -> bool:
        """Rename a staged directory to its version. False where another writer has that version already."""
        target = self.root / name / str(version)
        try:
            os.rename(staged, target)  # fails on a directory that is not empty, and a bundle never is
        except OSError:
            if target.exists():
                return False
            raise
        return True

    def promote(self, name: str, version: int) -> None:
        """Point `latest` at a version, in one atomic rename. Raises BundleError where there is no such version."""
        self.path(name, version)
        directory = self.root / name
        link = Path(tempfile.mktemp(prefix=".latest-", dir=directory))
        link.symlink_to(str(version))
        os.replace(link, directory / LATEST)
