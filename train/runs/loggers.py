"""Loggers by name, in the directory of the run. One that is resumed goes on where its checkpoint was made."""

import csv
import logging
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from netrc import NetrcParseError, netrc

from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.utilities import rank_zero_only

from train.runs.run_directory import Run


def make(names: str, run: Run) -> list[Logger]:
    """Loggers for a comma-separated list of names. Raises ValueError for one that is unknown or not installed."""
    chosen = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    if unknown := [name for name in chosen if name not in LOGGERS]:
        raise ValueError(
            f"--logger {unknown[0]}: not one of {', '.join(LOGGERS)}, none (several with commas between)"
        )
    for name in chosen:
        if name in ("wandb", "mlflow") and find_spec(name) is None:
            raise ValueError(f"--logger {name}: not installed; pip install 'imago[{name}]'")
    return [LOGGERS[name](run) for name in chosen]


def _first() -> bool:
    """Whether this is the first process."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning keeps it on the function


def tensorboard(run: Run) -> Logger:
    """What was logged after the checkpoint, or by a start that was killed before its first one, is purged."""
    return TensorBoardLogger(run.path, name=None, version="tensorboard", purge_step=run.step)


def comma_separated(run: Run) -> Logger:
    """metrics.csv; what was logged after the checkpoint is logged again, so it is cut off."""
    file = run.path / "csv" / "metrics.csv"
    rows = []
    if file.is_file():
        with file.open(newline="") as lines:
            rows = [
                row
                for row in csv.DictReader(lines)
                if (row.get("step") or "").isdigit() and int(row["step"]) < run.step
            ]
    logger = CSVLogger(run.path, name="", version="csv")
    if _first():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty")
            writer = logger.experiment
        writer.metrics = [{key: value for key, value in row.items() if value} for row in rows]
        writer.save()
    return logger


def wandb(run: Run) -> Logger:
    """As WANDB_MODE says; else online where there is a key, and offline where not: `wandb sync` sends the run later."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    return WandbLogger(
        project=run.path.parent.name,
        name=run.title,
        id=run.key,
        save_dir=run.path,
        mode=mode,
        resume="allow",
    )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc().hosts)  # where `wandb login` writes it
    except (OSError, NetrcParseError):
        return False


def mlflow(run: Run) -> Logger:
    """Where MLFLOW_TRACKING_URI says, else a local store beside the runs: `mlflow ui --backend-store-uri sqlite:///…`."""
    place, noted = run.path.parent.parent / "mlflow", run.path / "mlflow-run"
    remote = os.environ.get("MLFLOW_TRACKING_URI")
    if not remote:
        place.mkdir(exist_ok=True)
        logging.getLogger("alembic").setLevel(
            logging.WARNING
        )  # it tells how it lays out a new database
    logger = MLFlowLogger(
        experiment_name=run.path.parent.name,
        run_name=run.title,
        tracking_uri=remote or f"sqlite:///{place / 'mlflow.db'}",
        artifact_location=None if remote else place.as_uri(),
        run_id=noted.read_text() if run.step and noted.is_file() else None,
    )
    if _first() and logger.run_id:
        noted.write_text(logger.run_id)
    return logger


LOGGERS: dict[str, Callable[[Run], Logger]] = {
    "tensorboard": tensorboard,
    "csv": comma_separated,
    "wandb": wandb,
    "mlflow": mlflow,
}
