"""One training run, from the data to the published bundle: `run` and `fit`.

    find weights -> open data -> embed -> audit -> probe -> fit
    -> test -> calibrate -> export -> quantize -> certify -> gate -> report -> publish

`run_training` calls the first line of steps, and `publish_bundle` the second. Where a run has
several processes, each of them calls `run_training`, and only the first one publishes.
"""

import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import LearningRateMonitor

from models.allocator import keep_freed_memory
from models.bundle import Gate
from models.store import Store
from train.data import DataError, ImageData
from train.data.cache import replace_text
from train.export.calibrate import calibrate
from train.export.candidates import (
    SavedProbe,
    choose_model,
    fit_and_save_probe,
    load_saved_probe,
)
from train.export.config import ExportConfig
from train.export.embedder import embed_data
from train.export.evaluate import describe_weak_classes, evaluate_parts
from train.export.gate import list_test_images, run_gate, write_list
from train.export.pipeline import (
    BundleContents,
    RunRecord,
    build_manifest,
    describe_bundle,
    describe_refusal,
    describe_variants,
    is_refused,
    load_best_model,
    load_model,
    publish,
    set_temperature,
    write_samples,
    write_weights,
)
from train.export.report import write_report
from train.export.steps import ExportSteps, estimate_export_seconds
from train.export.variants import (
    certify_variants,
    export_fp32,
    quantize_int8,
)
from train.failures import GateRefused
from train.learning.fit_config import FitConfig
from train.learning.lightning_speed import skip_unused_hooks
from train.learning.system import Classifier
from train.runs.data_audit import Audit, audit_data
from train.runs.distributed import (
    connect_processes,
    run_in_first_process,
    run_once_per_node,
    share_choice,
)
from train.runs.history import History
from train.runs.loggers import build_loggers
from train.runs.model_checkpoint import ModelCheckpoint
from train.runs.monitor import Monitor
from train.runs.progress_bar import ProgressBar
from train.runs.resume import ResumeCheckpoint, read_data_state
from train.runs.run_directory import Run, open_run
from train.runs.run_mirror import RunMirror
from train.runs.time_budget import Plan, measure_epoch, plan_epochs
from train.runs.trainer import ImageTrainer

PLAN_FILE = "plan.json"  # in the run directory: the epochs that a time budget allows


@dataclass(frozen=True)
class TrainingJob:
    """The objects and settings of one training run, as the command line builds them."""

    trainer: ImageTrainer
    system: Classifier
    data: ImageData

    name: str  # of the model in the store
    store: str  # directory or URL
    runs: Path  # parent directory of all runs
    is_fresh: bool  # never resume
    loggers: str  # names, separated by commas

    start_checkpoint: str | None  # of another run, from which this one continues
    weights_only: bool  # load that checkpoint without running code that its pickle may hold

    started: float  # of time.monotonic(), when the command began
    fit: FitConfig
    audit: Audit
    history: History
    monitor: Monitor
    progress: ProgressBar
    model_checkpoint: ModelCheckpoint
    resume_checkpoint: ResumeCheckpoint
    export: ExportConfig

    recipe: dict[str, Any]  # all settings as plain values, as the manifest records them
    requested_recipe: dict[str, Any]  # the same, with the precision that was asked for


def run_training(job: TrainingJob) -> Path | None:
    """Train a model and publish it as a bundle. Return its directory; None if none is published.

    Of a store in a bucket, that is the copy on this machine.

    A run that was interrupted resumes where it stopped. With `--trainer.fast_dev_run` only the
    given number of batches run, and nothing is written. Raises GateRefused in all processes where
    the bundle is published, but not promoted.
    """
    connect_processes(job.trainer)
    if job.trainer.fast_dev_run:
        find_weights(job)
        open_data(job)
        fit(job)
        return None

    check_store(job)
    mirror = open_mirror(job)
    try:
        return _run_to_bundle(job, mirror)
    finally:
        if mirror is not None:
            mirror.close()


def _run_to_bundle(job: TrainingJob, mirror: RunMirror | None) -> Path | None:
    """Run the steps from the run directory to the published bundle; return its directory."""
    run = start_run(job, mirror)
    try:
        find_weights(job, run)
        open_data(job)
        restore_normalization(job, run)
        embed_images(job, run)
        audit(job, run)
        probe = fit_probe(job, run)
        apply_time_budget(job, run, probe)
        fit(job, run)
    except BaseException:
        discard_if_not_started(job, run, mirror)
        raise

    # The other processes wait: if one of them ended, a launcher would end the first one as well.
    outcome = run_in_first_process(job.trainer, lambda: complete_run(job, run, probe, mirror))
    if not outcome:
        return None
    path = Path(outcome["path"])
    if outcome["refusal"]:
        raise GateRefused(path, outcome["refusal"])
    return path


def discard_if_not_started(job: TrainingJob, run: Run, mirror: RunMirror | None) -> None:
    """Delete the directory of a new run that has failed before its first step."""
    trainer = job.trainer
    if run.is_new and trainer.is_global_zero and trainer.global_step == 0:
        run.discard()
        if mirror is not None:
            mirror.discard(run.path.name)


def complete_run(
    job: TrainingJob, run: Run, probe: SavedProbe | None, mirror: RunMirror | None
) -> dict[str, str] | None:
    """Publish the bundle and mark the run as finished.

    Return the `path` of the bundle, and why it is not promoted, `refusal`; None without a bundle.
    """
    if not job.export.enabled:
        finish_run(run, mirror)
        return None
    path, gate = publish_bundle(job, probe)
    finish_run(run, mirror)
    refusal = "; ".join(gate.reasons) if gate else ""
    if refusal:
        job.monitor.report_refusal()
    return {"path": str(path), "refusal": refusal}


def finish_run(run: Run, mirror: RunMirror | None) -> None:
    """Mark the run as finished, in the bucket, too."""
    run.finish()
    if mirror is not None:
        mirror.finish()


def publish_bundle(job: TrainingJob, probe: SavedProbe | None = None) -> tuple[Path, Gate | None]:
    """Test the best weights, publish them as the next version of the model.

    Return its directory, and the result of its comparison with the version before.

    They are the best of the probe, the fine-tuned network and means of both. The bundle appears in
    the store complete or not at all. Prints one line with the test accuracy and the command that
    serves the model.
    """
    data = job.data
    config = job.export
    record = RunRecord(job.recipe, job.trainer.strategy.root_device, job.history.rows)
    store = Store(job.store)
    is_compared = config.gate.enabled and store.latest(job.name) is not None
    steps = ExportSteps(job.progress, data, config, record.device, is_compared)
    steps.add("fit", record.fit_seconds)

    model = load_best_model(job.trainer, job.system)
    notes: list[str] = []
    with steps.measure("test") as advance:
        if probe is not None and job.trainer.global_step > 0:
            probe_model = load_model(job.system, probe.path)
            model, note = choose_model(probe_model, model, probe.val, data, record.device, advance)
            notes.append(note)
        scores = evaluate_parts(model.graph, data, record.device, model.tta, advance)
    with steps.measure("calibrate"):
        calibration = calibrate(scores.val, scores.unleaked_test, config.calibrate)
        set_temperature(model, calibration)

    with store.stage(job.name) as staged:
        write_weights(staged.path, model, data.classes)
        samples = write_samples(staged.path, model, data, config.samples)
        with steps.measure("export"):
            fp32 = export_fp32(staged.path, model.graph, data, scores)

        files = [fp32]
        if config.quantize.enabled:
            with steps.measure("quantize") as advance:
                int8, note = quantize_int8(
                    fp32, data, scores, config.quantize, calibration.temperature, advance
                )
            notes.append(note)
            if int8 is not None:
                files.append(int8)

        with steps.measure("certify"):
            variants = certify_variants(
                files, model.graph, data, samples.expected, config.calibrate
            )
        notes += describe_variants(variants, calibration, scores)

        contents = BundleContents(model, scores, calibration, samples.entries, variants, notes)
        manifest = build_manifest(staged, contents, data, record, steps)
        assert manifest.test_metrics is not None
        warnings = describe_weak_classes(manifest.test_metrics, data.classes)
        manifest.notes += warnings
        test_images = list_test_images(data, scores)
        write_list(staged.path, data, test_images)
        if is_compared:
            with steps.measure("gate") as advance:
                compared = run_gate(staged.path, manifest, test_images, store, config.gate, advance)
            manifest.gate = compared.gate
            manifest.notes += compared.notes
        if config.report:
            with steps.measure("report"):
                write_report(
                    staged.path, manifest, model.graph, data, scores, record.history, config
                )
        path = publish(staged, manifest, steps, config)

    for warning in warnings:
        print(f"train: {warning}", file=sys.stderr)
    print(describe_bundle(staged.location, manifest, job.store, job.name))
    if is_refused(manifest):
        print(describe_refusal(manifest, job.store), file=sys.stderr)
    return path, manifest.gate


def check_store(job: TrainingJob) -> None:
    """Check before hours of training that a bundle can be written and signed.

    Only the first process writes to the store, so only that one checks it.
    """
    if job.export.enabled and job.trainer.is_global_zero:
        Store(job.store).check_writable(job.name)
        if job.export.sign_key:
            # Imported here, as it needs the extra `signing`.
            from models.bundle.signing import check_private_key

            check_private_key(Path(job.export.sign_key))


def open_mirror(job: TrainingJob) -> RunMirror | None:
    """Return the runs in a bucket, in the first process of each node; None where there are none."""
    url = job.resume_checkpoint.url
    return RunMirror(url, job.name) if url and job.trainer.local_rank == 0 else None


def start_run(job: TrainingJob, mirror: RunMirror | None) -> Run:
    """Open the run directory; start what writes to it: checkpoints, loggers, metrics."""
    trainer = job.trainer
    run = open_run(trainer, job.runs, job.name, job.requested_recipe, job.is_fresh, mirror)

    is_resumed = run.checkpoint is not None
    job.model_checkpoint.write_to(run.path, is_resumed)
    job.resume_checkpoint.write_to(run.path, is_resumed)
    if mirror is not None and trainer.is_global_zero:
        mirror.start(run.path)
        job.resume_checkpoint.upload_to(mirror)
    job.monitor.start(trainer)
    trainer.add_loggers(build_loggers(job.loggers, run))
    return run


def find_weights(job: TrainingJob, run: Run | None = None) -> None:
    """Find the weights to start from; the data is then prepared as theirs was.

    They are downloaded now, unless a checkpoint replaces them, and not after hours of decoding.
    """
    job.data.use_preprocessing(job.system.find_weights(job.store))
    if job.start_checkpoint or (run is not None and run.checkpoint is not None):
        job.system.expect_checkpoint()
    run_once_per_node(job.trainer, job.system.fetch_weights)


def open_data(job: TrainingJob) -> None:
    """Download the data once a node, where needed; then decode, split and measure it."""
    job.data.attach_trainer(job.trainer)
    run_once_per_node(job.trainer, job.data.prepare_data)
    job.data.setup("fit")


def restore_normalization(job: TrainingJob, run: Run) -> None:
    """Give a resumed run the mean and deviation of its first start.

    They can differ when they are measured again: data that fitted into memory at the first start
    may be streamed on this node, and streamed data is measured on a sample. Raises DataError where
    the data has changed: neither the order of the images nor the weights would fit.
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


def uses_probe(job: TrainingJob) -> bool:
    """Whether a linear probe is fitted before the fit."""
    return job.fit.uses_probe(bool(job.system.weights))


def embed_images(job: TrainingJob, run: Run) -> None:
    """Compute embeddings by the pretrained network, for the audit and the probe.

    The first process keeps them. A resumed run that has its probe, or trains already, needs none.
    """
    if run.checkpoint is not None or not uses_probe(job):
        return
    if load_saved_probe(job.data, run.path) is not None:
        return
    trainer = job.trainer
    job.system.build_network(trainer, job.data)
    device = trainer.strategy.root_device
    run_in_first_process(trainer, lambda: embed_data(job.system, job.data, device))


def audit(job: TrainingJob, run: Run) -> None:
    """Search for duplicates, leaked images and suspicious labels; write the report to the run."""
    if job.audit.enabled:
        audit_data(job.trainer, job.data, run.path / "audit")


def fit_probe(job: TrainingJob, run: Run) -> SavedProbe | None:
    """Fit a linear head on the embeddings, which the fit starts from; None without a probe.

    Only the first process has it. The others get its weights when the processes connect their
    networks.
    """
    if not uses_probe(job):
        return None
    if job.fit.mode == "probe":
        set_epochs(job.trainer, 0)
    if not job.trainer.is_global_zero:
        return None

    probe = load_saved_probe(job.data, run.path)
    if probe is not None and run.checkpoint is None:
        job.system.build_network(job.trainer, job.data)
        probe.load_into(job.system)
    if probe is None and job.data.embeddings is not None:
        probe = fit_and_save_probe(job.system, job.data, run.path)
        job.progress.console.print(
            f"linear probe  val accuracy {probe.val.accuracy:.4f}", soft_wrap=True
        )
    return probe


def set_epochs(trainer: ImageTrainer, epochs: int) -> None:
    """Run this many epochs instead of those of the settings."""
    trainer.fit_loop.max_epochs = epochs


def apply_time_budget(job: TrainingJob, run: Run, probe: SavedProbe | None) -> None:
    """Set the number of epochs that the time budget allows; a resumed run keeps its number."""
    budget = job.fit.budget_seconds
    if budget is None or job.fit.mode == "probe":
        return
    path = run.path / PLAN_FILE

    def load_or_choose() -> dict[str, Any]:
        if path.exists():
            return json.loads(path.read_text())
        plan = choose_epochs(job, budget, probe is not None)
        epochs = {"epochs": plan.epochs}
        replace_text(path, json.dumps(epochs))
        job.progress.console.print(plan.describe(), soft_wrap=True)
        return epochs

    plan = share_choice(job.trainer, load_or_choose)
    set_epochs(job.trainer, plan["epochs"])


def choose_epochs(job: TrainingJob, budget_seconds: float, has_probe: bool) -> Plan:
    """Measure a step, and return the number of epochs that end in time."""
    device = job.trainer.strategy.root_device
    job.system.build_network(job.trainer, job.data)
    time_of_epoch = measure_epoch(job.trainer, job.system, job.data)
    export_seconds = 0.0
    if job.export.enabled:
        export_seconds = estimate_export_seconds(
            job.data, job.export, device, time_of_epoch.evaluated_image
        )
    elapsed = time.monotonic() - job.started
    return plan_epochs(
        budget_seconds,
        elapsed,
        time_of_epoch,
        export_seconds,
        job.trainer.max_epochs,
        has_probe,
    )


def fit(job: TrainingJob, run: Run | None = None) -> None:
    """Train, from the checkpoint of the run where there is one."""
    trainer = job.trainer
    checkpoint = job.start_checkpoint
    weights_only = job.weights_only
    if run is not None and run.checkpoint is not None:
        checkpoint = str(run.checkpoint)
        weights_only = True

    if run is not None and job.export.enabled:
        device = trainer.strategy.root_device
        job.progress.expect_export(partial(estimate_export_seconds, job.data, job.export, device))
    if not trainer.loggers:
        trainer.remove_callbacks(LearningRateMonitor)  # it fails without a logger
    skip_unused_hooks(job.system, trainer.callbacks)
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()

    trainer.fit(job.system, datamodule=job.data, ckpt_path=checkpoint, weights_only=weights_only)
