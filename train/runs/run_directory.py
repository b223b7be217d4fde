"""The directory of a run, `<root>/<name>/<number>/`: settings, logs, best weights and checkpoints.

`open_run` resumes the newest run with the same settings. Where there is none, or it is finished, or
another process holds its lock, a new run starts. A run is finished when its bundle is published.
"""

import hashlib
import json
import shutil
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from filelock import FileLock, Timeout

from train.runs.checkpoints import (
    checkpoint_step,
    delete_old_checkpoints,
    list_checkpoints,
    newest_checkpoint,
)
from train.runs.distributed import run_once_per_node, share_choice
from train.runs.run_mirror import RunMirror

SETTINGS_FILE = "settings.json"
FINISHED_FILE = "finished"
LOCK_FILE = ".lock"

# Settings that decide the result. A run whose other settings change, such as its logger, is still
# the same run.
DECISIVE_SETTINGS = (
    "seed_everything",
    "data",
    "model",
    "fit",
    "ema",
    "early_stopping",
    "checkpoint",
    "trainer",
    "ckpt_path",
    "processes",
)
# Settings within these sections that do not change the result. A user may have to lower
# eval_batch_size after the last step, if the evaluation for the bundle does not fit into memory.
# Of the devices their number counts, which is in `processes`.
INDIFFERENT_SETTINGS = {
    "trainer": ("devices", "logger", "default_root_dir", "profiler", "enable_progress_bar"),
    "data": ("eval_batch_size", "workers", "cache", "memory", "memory_share"),
}


@dataclass(frozen=True)
class Run:
    """The run that this process works on, whose directory it has locked."""

    path: Path
    checkpoint: Path | None = None  # the one to resume from, if any
    is_new: bool = False  # created by this process

    @property
    def title(self) -> str:
        """A short name to display, such as digits-3."""
        return f"{self.path.parent.name}-{self.path.name}"

    @property
    def key(self) -> str:
        """A unique name, for services that keep the runs of many users."""
        digest = hashlib.sha256(f"{self.path} {self.path.stat().st_ino}".encode()).hexdigest()
        return f"{self.title}-{digest[:12]}"

    @property
    def step(self) -> int:
        """Optimizer steps done before this start."""
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0

    def discard(self) -> None:
        """Delete the directory of a run that failed to start, and its parents if they are empty."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()

    def finish(self) -> None:
        """Mark the run as finished, and keep only its last checkpoint, as last.ckpt."""
        (self.path / FINISHED_FILE).touch()
        checkpoints = list_checkpoints(self.path)
        if checkpoints:
            checkpoints[0].replace(self.path / "last.ckpt")
        delete_old_checkpoints(self.path, keep=0)


def open_run(
    trainer: L.Trainer,
    root: Path,
    name: str,
    settings: dict[str, Any],
    fresh: bool,
    mirror: RunMirror | None = None,
) -> Run:
    """Return the run to resume, or a new one; the same in all processes.

    Runs of the mirror that are newer than those of this machine are copied to it first. On several
    nodes without a shared volume, each gets the checkpoint from the mirror. `mirror` is None in all
    but the first process of each node.
    `settings` are all settings of the command as plain values, which are also written to the run's
    config.yaml. `fresh` always starts a new run.
    """

    def choose() -> dict[str, Any]:
        if mirror is not None:
            mirror.fetch(directory)
        run = claim_run(root, name, settings, trainer.world_size, fresh, mirror)
        (run.path / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        checkpoint = run.checkpoint.name if run.checkpoint else None
        return {"number": run.path.name, "checkpoint": checkpoint, "is_new": run.is_new}

    directory = (root / name).resolve()
    choice = share_choice(trainer, choose)
    path = directory / choice["number"]
    checkpoint = path / choice["checkpoint"] if choice["checkpoint"] else None

    def fetch_checkpoint() -> None:
        if mirror is not None and checkpoint is not None and not checkpoint.exists():
            mirror.fetch_snapshot(int(path.name), path)

    if trainer.num_nodes > 1:
        run_once_per_node(trainer, fetch_checkpoint)
    return Run(path, checkpoint, choice["is_new"])


def claim_run(
    root: Path,
    name: str,
    settings: dict[str, Any],
    processes: int,
    fresh: bool,
    mirror: RunMirror | None = None,
) -> Run:
    """Return the run to resume, or a new one, and lock it until this process ends.

    `processes` is their number, which decides the result as the settings do.
    """
    settings = _decisive_settings(settings | {"processes": processes})
    settings = json.loads(json.dumps(settings, default=str))
    directory = (root / name).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    runs = _list_runs(directory)

    same_runs = [path for path in runs if _read_settings(path) == settings]
    if same_runs and not fresh:
        newest = same_runs[-1]
        if not _is_finished(newest) and _try_lock(newest):
            return _resume(newest)

    if runs and not fresh:
        _report_other_settings(runs[-1], settings)
    first_number = int(runs[-1].name) + 1 if runs else 1
    return _start_new_run(directory, first_number, settings, mirror)


def _start_new_run(
    directory: Path, number: int, settings: dict[str, Any], mirror: RunMirror | None
) -> Run:
    """Create and lock the directory `number`, or the next one that no other process has taken."""
    while True:
        path = directory / str(number)
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        if mirror is not None and not mirror.claim(number, settings):
            path.rmdir()
            number += 1
            continue
        if _try_lock(path):
            (path / SETTINGS_FILE).write_text(json.dumps(settings, indent=1, sort_keys=True))
            return Run(path, is_new=True)


def _resume(path: Path) -> Run:
    """Return a run with its newest checkpoint, and print the step from which it resumes."""
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        print(f"train: {path}: no complete checkpoint yet, starts from step 0", file=sys.stderr)
    else:
        print(
            f"train: resuming from step {checkpoint_step(checkpoint):,}: {checkpoint} "
            "(--fresh starts over)",
            file=sys.stderr,
        )
    return Run(path, checkpoint)


def _report_other_settings(path: Path, settings: dict[str, Any]) -> None:
    """Print why an unfinished run is not resumed, where the settings differ."""
    differences = _list_differences(_read_settings(path) or settings, settings)
    if not differences or not list_checkpoints(path):
        return
    if _is_finished(path) or _is_locked_by_another(path):
        return
    print(
        f"train: {path}: unfinished, but started with other settings ({', '.join(differences)}); "
        "starts a new run",
        file=sys.stderr,
    )


def _decisive_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the result. Raises KeyError where sections are missing."""
    decisive = {key: settings.get(key) for key in DECISIVE_SETTINGS}
    for section, indifferent in INDIFFERENT_SETTINGS.items():
        decisive[section] = {
            key: value for key, value in settings[section].items() if key not in indifferent
        }
    return decisive


def _list_differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Return the settings that differ, by their names as flags."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else [name]
    differences: list[str] = []
    for key in sorted(one.keys() | other.keys()):
        key_name = f"{name}.{key}" if name else key
        differences += _list_differences(one.get(key), other.get(key), key_name)
    return differences


def _list_runs(directory: Path) -> list[Path]:
    """Return the directories whose name is a number, in the order of the numbers."""
    runs = [path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(runs, key=lambda path: int(path.name))


def _read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings of a run, or None where they are incomplete or of another format."""
    try:
        return _decisive_settings(json.loads((path / SETTINGS_FILE).read_text()))
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _is_finished(path: Path) -> bool:
    return (path / FINISHED_FILE).exists()


class _HeldLocks(threading.local):
    """The locks of one thread. The kernel releases them when the process ends."""

    def __init__(self) -> None:
        self.locks: list[FileLock] = []


_held = _HeldLocks()


def release_runs() -> None:
    """Release the runs that this thread has claimed, so that this process can resume them."""
    while _held.locks:
        _held.locks.pop().release()


def _try_lock(path: Path) -> bool:
    """Lock a run directory for this process; return False where another process holds the lock."""
    lock = FileLock(path / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _held.locks.append(lock)
    return True


def _is_locked_by_another(path: Path) -> bool:
    try:
        with FileLock(path / LOCK_FILE, timeout=0):
            return False
    except Timeout:
        return True
