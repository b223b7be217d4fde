"""Loggers by name, in the run directory. A resumed run continues the logs at its checkpoint."""

import csv
import logging
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path

from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from lightning.pytorch.utilities import rank_zero_only

from train.runs.run_directory import Run

OPTIONAL_PACKAGES = ("wandb", "mlflow")  # loggers whose package is an extra of the same name


def build_loggers(names: str, run: Run) -> list[Logger]:
    """Build the loggers of a comma-separated list of names.

    Raises ValueError for a name that is unknown or whose package is not installed.
    """
    chosen: list[str] = []
    for name in names.split(","):
        name = name.strip()
        if name not in ("", "none"):
            chosen.append(name)

    for name in chosen:
        if name not in LOGGERS:
            known = ", ".join(LOGGERS)
            raise ValueError(
                f"--logger {name}: not one of {known}, none (several are separated by commas)"
            )
    for name in chosen:
        if name in OPTIONAL_PACKAGES and find_spec(name) is None:
            raise ValueError(f"--logger {name}: not installed; pip install 'imago[{name}]'")
    return [LOGGERS[name](run) for name in chosen]


def _is_first_process() -> bool:
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it on the function


def build_tensorboard_logger(run: Run) -> Logger:
    """Build a TensorBoard logger that drops what was logged after the checkpoint of the run."""
    return TensorBoardLogger(run.path, name=None, version="tensorboard", purge_step=run.step)


def build_csv_logger(run: Run) -> Logger:
    """Build a logger to metrics.csv, without rows that the resumed run logs again."""
    rows = _rows_before_step(run.path / "csv" / "metrics.csv", run.step)
    logger = CSVLogger(run.path, name="", version="csv")
    if _is_first_process():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty")
            writer = logger.experiment
        writer.metrics = rows
        writer.save()
    return logger


def _rows_before_step(file: Path, step: int) -> list[dict[str, str]]:
    """Read the rows of metrics.csv up to a step, without their empty columns."""
    if not file.is_file():
        return []
    rows: list[dict[str, str]] = []
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            row_step = row.get("step") or ""
            if row_step.isdigit() and int(row_step) < step:
                rows.append({key: value for key, value in row.items() if value})
    return rows


def build_wandb_logger(run: Run) -> Logger:
    """Build a logger to Weights & Biases.

    It is online where there is an API key, else offline; WANDB_MODE overrides this. `wandb sync`
    uploads an offline run later.
    """
    default_mode = "online" if _has_wandb_key() else "offline"
    return WandbLogger(
        project=run.path.parent.name,
        name=run.title,
        id=run.key,
        save_dir=run.path,
        mode=os.environ.get("WANDB_MODE") or default_mode,
        resume="allow",
    )


def _has_wandb_key() -> bool:
    """Whether the environment or ~/.netrc, where `wandb login` writes it, holds a key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc().hosts)
    except (OSError, NetrcParseError):
        return False


def build_mlflow_logger(run: Run) -> Logger:
    """Build a logger to MLflow at MLFLOW_TRACKING_URI, else to a local store next to the runs.

    `mlflow ui --backend-store-uri sqlite:///…/mlflow.db` shows the local store.
    """
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI")
    artifacts: str | None = None
    if not tracking_uri:
        store = run.path.parent.parent / "mlflow"
        store.mkdir(exist_ok=True)
        tracking_uri = f"sqlite:///{store / 'mlflow.db'}"
        artifacts = store.as_uri()
        # alembic logs each table that it creates in a new database.
        logging.getLogger("alembic").setLevel(logging.WARNING)

    run_id_file = run.path / "mlflow-run"
    is_resumed = bool(run.step) and run_id_file.is_file()
    logger = MLFlowLogger(
        experiment_name=run.path.parent.name,
        run_name=run.title,
        tracking_uri=tracking_uri,
        artifact_location=artifacts,
        run_id=run_id_file.read_text() if is_resumed else None,
    )
    if _is_first_process() and logger.run_id:
        run_id_file.write_text(logger.run_id)
    return logger


LOGGERS: dict[str, Callable[[Run], Logger]] = {
    "tensorboard": build_tensorboard_logger,
    "csv": build_csv_logger,
    "wandb": build_wandb_logger,
    "mlflow": build_mlflow_logger,
}
