"""One directory a run, `<root>/<name>/<number>/`: its settings, logs, best weights and checkpoints to go on from.

A start looks for the newest run of the same settings: unfinished, it is gone on with; finished, or in the hands of
another process, a new run begins. A run is finished when its bundle is published.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import ModelCheckpoint

from train.runs import checkpoints
from train.runs.distributed import agree
from train.runs.resume import Resume

SETTINGS, FINISHED = "settings.json", "finished"
# Settings that decide what is learnt. A run whose other settings change, such as its logger, is still the same run.
DECISIVE = (
    "seed_everything",
    "data",
    "model",
    "ema",
    "early_stopping",
    "checkpoint",
    "trainer",
    "ckpt_path",
    "processes",
)
# eval_batch_size may have to shrink after the last step, where the bundle's figures did not fit into memory.
INDIFFERENT = {
    "trainer": ("logger", "default_root_dir", "profiler", "enable_progress_bar"),
    "data": ("eval_batch_size", "workers", "cache", "memory", "memory_share"),
}


@dataclass(frozen=True)
class Run:
    """A run that this process works on. `checkpoint`: the one to go on from, if any."""

    path: Path
    checkpoint: Path | None = None

    @property
    def title(self) -> str:
        return f"{self.path.parent.name}-{self.path.name}"

    @property
    def key(self) -> str:
        """Names the run among all of its maker's, for services that keep runs of many."""
        digest = hashlib.sha256(f"{self.path} {self.path.stat().st_ino}".encode()).hexdigest()
        return f"{self.title}-{digest[:12]}"

    @property
    def step(self) -> int:
        """Optimizer steps that were done before this start."""
        return checkpoints.step_of(self.checkpoint) if self.checkpoint else 0

    def finish(self) -> None:
        """Not to be gone on with: only the last checkpoint stays, as last.ckpt."""
        (self.path / FINISHED).touch()
        left = checkpoints.found(self.path)
        if left:
            left[0].replace(self.path / "last.ckpt")
        checkpoints.prune(self.path, 0)


def begin(trainer: L.Trainer, root: Path, name: str, config: dict[str, Any], fresh: bool) -> Run:
    """The run to go on with, or a new one; the same in all processes. Callbacks write to its directory from now on."""

    def choose() -> dict[str, Any]:
        run = claim(root, name, config, trainer.world_size, fresh)
        (run.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        return {
            "path": str(run.path),
            "checkpoint": str(run.checkpoint) if run.checkpoint else None,
        }

    chosen = agree(trainer, choose)
    run = Run(Path(chosen["path"]), Path(chosen["checkpoint"]) if chosen["checkpoint"] else None)
    trainer.strategy.checkpoint_io = checkpoints.WholeFiles()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Resume):
            callback.directory, callback.begun = run.path, run.checkpoint
        elif isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(run.path)
    return run


def claim(root: Path, name: str, config: dict[str, Any], processes: int, fresh: bool) -> Run:
    """The same for one process. The run is this process's until it ends, however it ends."""
    settings = json.loads(json.dumps(_decisive(config | {"processes": processes}), default=str))
    parent = (root / name).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    there = _numbered(parent)
    same = [path for path in there if _settings(path) == settings]
    if same and not fresh and not (same[-1] / FINISHED).exists() and _lock(same[-1]):
        return _going_on(same[-1])
    if there and not fresh:
        _tell_of_other(there[-1], settings)
    number = int(there[-1].name) + 1 if there else 1
    while True:
        path = parent / str(number)
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        if _lock(path):
            (path / SETTINGS).write_text(json.dumps(settings, indent=1, sort_keys=True))
            return Run(path)


def _going_on(path: Path) -> Run:
    checkpoint = checkpoints.newest(path)
    if checkpoint is None:
        print(
            f"train: {path}: begun before, with no whole checkpoint, so it begins again",
            file=sys.stderr,
        )
    else:
        print(
            f"train: going on from step {checkpoints.step_of(checkpoint):,}: {checkpoint} (--fresh to begin anew)",
            file=sys.stderr,
        )
    return Run(path, checkpoint)


def _tell_of_other(path: Path, settings: dict[str, Any]) -> None:
    """Say so where a run that could be gone on with is not, as its settings are others."""
    differing = _differing(_settings(path) or settings, settings)
    if (
        differing
        and checkpoints.found(path)
        and not (path / FINISHED).exists()
        and not _held_by_another(path)
    ):
        print(
            f"train: {path}: unfinished, but begun with other settings ({', '.join(differing)}), so a new run begins",
            file=sys.stderr,
        )


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: config.get(key) for key in DECISIVE}
    return kept | {
        owner: {k: v for k, v in config[owner].items() if k not in names}
        for owner, names in INDIFFERENT.items()
    }


def _differing(one: Any, other: Any, name: str = "") -> list[str]:
    """The settings that are not the same in both, as flags name them."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in sorted(one.keys() | other.keys())
            for found in _differing(one.get(key), other.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if one == other else [name]


def _numbered(parent: Path) -> list[Path]:
    return sorted(
        (p for p in parent.iterdir() if p.name.isdecimal() and p.is_dir()),
        key=lambda p: int(p.name),
    )


def _settings(path: Path) -> dict[str, Any] | None:
    try:
        return _decisive(json.loads((path / SETTINGS).read_text()))
    except (OSError, ValueError, KeyError, AttributeError):  # being made, or made by somebody else
        return None


_held: list[FileLock] = []  # the kernel lets go of them when the process ends


def _lock(path: Path) -> bool:
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _held.append(lock)
    return True


def _held_by_another(path: Path) -> bool:
    try:
        with FileLock(path / ".lock", timeout=0):
            return False
    except Timeout:
        return True
