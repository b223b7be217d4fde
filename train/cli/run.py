"""One training run, from the data to the published bundle: `run` and `fit`.

`run_training` is the whole job in the order in which it happens. With several processes, each of
them calls it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import LearningRateMonitor

from models.store import Store
from train.data import DataError, ImageData
from train.export.config import ExportConfig
from train.export.pipeline import export_bundle
from train.learning.lightning_speed import keep_freed_memory, skip_unused_hooks
from train.learning.system import Classifier
from train.runs.data_audit import Audit, audit_data
from train.runs.distributed import connect_processes, run_in_first_process, run_once_per_node
from train.runs.loggers import build_loggers
from train.runs.model_checkpoint import ModelCheckpoint
from train.runs.monitor import Monitor
from train.runs.resume import ResumeCheckpoint, read_data_state
from train.runs.run_directory import Run, open_run
from train.runs.trainer import ImageTrainer


@dataclass(frozen=True)
class TrainingJob:
    """What one training run needs, as the command line builds it."""

    trainer: ImageTrainer
    system: Classifier
    data: ImageData

    name: str  # of the model in the store
    store: str  # directory or URL
    runs: Path  # parent directory of all runs
    is_fresh: bool  # never resume
    loggers: str  # names, separated by commas

    start_checkpoint: str | None  # of another run, to train on from
    weights_only: bool  # whether to load that checkpoint without pickle

    audit: Audit
    monitor: Monitor
    model_checkpoint: ModelCheckpoint
    resume_checkpoint: ResumeCheckpoint
    export: ExportConfig

    recipe: dict[str, Any]  # all settings as plain values, as the manifest records them
    requested_recipe: dict[str, Any]  # the same, with the precision that was asked for


def run_training(job: TrainingJob) -> None:
    """Train a model and publish it as a bundle.

    A run that was interrupted resumes where it stopped. With `--trainer.fast_dev_run` only some
    batches run, and nothing is written.
    """
    connect_processes(job.trainer)
    if job.trainer.fast_dev_run:
        open_data(job)
        fit(job)
        return

    check_store(job)
    run = start_run(job)
    open_data(job)
    restore_normalization(job, run)
    audit(job, run)
    fit(job, run)
    publish(job, run)


def check_store(job: TrainingJob) -> None:
    """Check that a bundle can be written, now and not after hours of training.

    Only the first process has to reach the store.
    """
    if job.export.enabled and job.trainer.is_global_zero:
        Store(job.store).ensure_writable(job.name)


def start_run(job: TrainingJob) -> Run:
    """Open the run directory, and start everything that writes to it or reports on the run."""
    trainer = job.trainer
    run = open_run(trainer, job.runs, job.name, job.requested_recipe, job.is_fresh)

    is_resumed = run.checkpoint is not None
    job.model_checkpoint.write_to(run.path, is_resumed)
    job.resume_checkpoint.write_to(run.path, is_resumed)
    job.monitor.start(trainer)
    trainer.add_loggers(build_loggers(job.loggers, run))
    return run


def open_data(job: TrainingJob) -> None:
    """Download the data where needed, once a node; then decode, split and measure it."""
    job.data.attach_trainer(job.trainer)
    run_once_per_node(job.trainer, job.data.prepare_data)
    job.data.setup("fit")


def restore_normalization(job: TrainingJob, run: Run) -> None:
    """Normalize as at the first start of the run.

    Mean and deviation of streamed data are measured on a sample, and the memory of this node may be
    too small for data that was kept in memory before. Raises DataError where the data has changed:
    neither the order of the images nor the weights would fit.
    """
    if run.checkpoint is None:
        return
    data = job.data
    state = read_data_state(run.checkpoint)
    if state.digest is not None and state.digest != data.digest:
        raise DataError(
            f"{run.path}: started on other images, labels or classes than {data.source} holds now; "
            "restore them to resume, or start over: with --fresh, or by removing that directory "
            "where the same command is retried automatically"
        )
    if state.normalization is not None:
        data.use_normalization(*state.normalization)


def audit(job: TrainingJob, run: Run) -> None:
    """Look for duplicates, leaked images and suspicious labels; write the report to the run."""
    if job.audit.enabled:
        audit_data(job.trainer, job.data, run.path / "audit")


def fit(job: TrainingJob, run: Run | None = None) -> None:
    """Train, from the checkpoint of the run where there is one."""
    trainer = job.trainer
    checkpoint = job.start_checkpoint
    weights_only = job.weights_only
    if run is not None and run.checkpoint is not None:
        checkpoint = str(run.checkpoint)
        weights_only = True
    if checkpoint:
        job.system.expect_checkpoint()

    if not trainer.loggers:
        trainer.remove_callbacks(LearningRateMonitor)  # it fails without a logger
    skip_unused_hooks(job.system, trainer.callbacks)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()

    trainer.fit(job.system, datamodule=job.data, ckpt_path=checkpoint, weights_only=weights_only)


def publish(job: TrainingJob, run: Run) -> None:
    """Publish the bundle and finish the run, in the first process.

    The other processes wait: if one of them ended, a launcher would end the first one as well.
    """

    def publish_in_first_process() -> None:
        if job.export.enabled:
            export_bundle(
                job.trainer, job.system, job.data, job.export, job.store, job.name, job.recipe
            )
        run.finish()

    run_in_first_process(job.trainer, publish_in_first_process)
