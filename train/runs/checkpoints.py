"""Checkpoint files that are whole or not there, and the newest whole one of a directory."""

import os
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

PREFIX, SUFFIX = "step-", ".ckpt"
UNFINISHED = ".tmp"


class WholeFiles(TorchCheckpointIO):
    """Writes beside the place, flushes to disk and renames: a reader never sees half a checkpoint, nor does the next
    start after a kill, a full disk or a power cut. A file that was there stays until its successor is whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f".{path.name}{UNFINISHED}")
        try:
            with written.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            written.replace(path)
            _flush(path.parent)
        except BaseException as error:
            written.unlink(missing_ok=True)
            reason = (
                error.__context__ if isinstance(error, RuntimeError) else error
            )  # torch's writer may hide it
            if isinstance(reason, OSError):
                raise OSError(reason.errno, reason.strerror, str(path)) from error
            raise


def _flush(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def place(directory: Path, step: int) -> Path:
    return directory / f"{PREFIX}{step:09d}{SUFFIX}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix(PREFIX).removesuffix(SUFFIX))


def found(directory: Path) -> list[Path]:
    """The checkpoints to go on from, newest first."""
    return sorted(directory.glob(f"{PREFIX}*{SUFFIX}"), reverse=True)


def newest(directory: Path) -> Path | None:
    """The newest checkpoint that is whole; names those that are not."""
    for path in found(directory):
        if whole(path):
            return path
        print(f"train: {path}: damaged, so it is passed over", file=sys.stderr)
    return None


def whole(path: Path) -> bool:
    """Whether all of a checkpoint reads back: torch writes zip files, with a CRC for each part.

    The CRCs do not cover the zip's own directory, so each part is read as torch finds it there, and the whole is opened
    (mapped: no tensor is copied). Parts are not compressed: where the two sizes differ, torch leaves part of the memory
    as it was, which may hold the right bytes of another reading.
    """
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        with zipfile.ZipFile(path) as archive:
            sound = all(
                part.compress_size == part.file_size
                and zlib.crc32(reader.get_record(part.filename.partition("/")[2])) == part.CRC
                for part in archive.infolist()
            )
        return sound and "state_dict" in torch.load(
            path, map_location="cpu", mmap=True, weights_only=True
        )
    except Exception:  # the zip and pickle readers raise anything for flipped bytes
        return False


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed process left half-written."""
    for path in [*found(directory)[keep:], *directory.glob(f".*{UNFINISHED}")]:
        path.unlink(missing_ok=True)
