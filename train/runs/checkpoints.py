"""Checkpoint files of a run directory: written completely or not at all, numbered by step."""

import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from models.durable_files import open_replacement

PREFIX = "step-"
SUFFIX = ".ckpt"
UNFINISHED_SUFFIX = ".tmp"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file, flushes it to disk and renames it.

    Readers never see half a checkpoint, nor does the next start after a kill, a full disk or a
    power cut. An older file of the same name stays until the new one is complete.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint. Raises OSError where the disk refuses it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open_replacement(path, f".{path.name}{UNFINISHED_SUFFIX}") as file:
                torch.save(checkpoint, file)
        except BaseException as error:
            # torch's writer may hide the cause behind a RuntimeError.
            cause = error.__context__ if isinstance(error, RuntimeError) else error
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return the file for the checkpoint of an optimizer step."""
    return directory / f"{PREFIX}{step:09d}{SUFFIX}"


def checkpoint_step(path: Path) -> int:
    """Return the optimizer step of a checkpoint file."""
    return int(path.name.removeprefix(PREFIX).removesuffix(SUFFIX))


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the numbered checkpoints of a run, newest first."""
    return sorted(directory.glob(f"{PREFIX}*{SUFFIX}"), reverse=True)


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint of a run; print the names of damaged ones."""
    for path in list_checkpoints(directory):
        if is_complete_checkpoint(path):
            return path
        print(f"train: {path}: damaged, skipped", file=sys.stderr)
    return None


def is_complete_checkpoint(path: Path) -> bool:
    """Whether all of a checkpoint reads back.

    torch writes zip files with a CRC for each record. The CRCs do not cover the directory of the
    zip file, so each record is read as torch finds it there, and the checkpoint is opened as a
    whole (memory mapped, so that no tensor is copied).
    """
    try:
        if not _records_match_checksums(path):
            return False
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return "state_dict" in checkpoint
    except Exception:  # the zip and pickle readers raise anything for changed bytes
        return False


def _records_match_checksums(path: Path) -> bool:
    """Whether each record, as torch reads it, matches the CRC in the zip file."""
    reader = torch._C.PyTorchFileReader(str(path))
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            # Records are not compressed, so the two sizes are equal. Where they differ, torch fills
            # only a part of the memory; the rest may contain the same record from an earlier read,
            # and its CRC would match.
            if entry.compress_size != entry.file_size:
                return False
            record = reader.get_record(entry.filename.partition("/")[2])
            if zlib.crc32(record) != entry.CRC:
                return False
    return True


def delete_old_checkpoints(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and unfinished files of killed processes."""
    old = list_checkpoints(directory)[keep:]
    unfinished = directory.glob(f".*{UNFINISHED_SUFFIX}")
    for path in [*old, *unfinished]:
        path.unlink(missing_ok=True)
