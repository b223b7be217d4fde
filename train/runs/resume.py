"""Checkpoints to resume from: an interrupted run ends with the weights of an uninterrupted one.

Order and augmentation of the images are functions of (seed, epoch, step). Lightning's checkpoint
holds weights, optimizer, schedule, loops and callbacks. This module adds the position within the
epoch, the random numbers and running sums of each process, and the digest of the data, which must
not change. A checkpoint is written at one of four stages, from each of which Lightning can start:

    step        after a step that neither a validation nor the end of the epoch follows
    validation  before a validation that was interrupted; it runs again completely
    epoch       before the first step of an epoch
    end         after the last step, so that a run that is interrupted while it writes its bundle
                does not train again

Any step may take longer than the time that a signal leaves. So the state is copied to memory after
each slow step, and after a fast one every few seconds. Where a signal arrives and the step does not
end, the copy is written.
"""

import copy
import signal
import sys
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from models.store.object_storage import BUCKET_SCHEMES
from train.data import DataError
from train.learning.lightning_loop_state import (
    LightningLoopState,
    complete_epoch,
    restart_validation,
)
from train.learning.system import Classifier
from train.runs.checkpoints import (
    AtomicCheckpointIO,
    checkpoint_path,
    checkpoint_step,
    delete_old_checkpoints,
    list_checkpoints,
)
from train.runs.preemption import NOTICE, SHUTDOWN_SECONDS, Preempted
from train.runs.run_mirror import RunMirror

Stage = Literal["step", "validation", "epoch", "end"]
BETWEEN_EPOCHS: tuple[Stage, ...] = ("epoch", "end")  # stages at which no epoch is under way

# A step that takes this share of the time that a signal leaves is slow: the state is copied after
# it, which takes a small part of the time of such a step. While steps are fast, the state is copied
# again after this share, or later where copies would take more than COPY_SHARE of the time.
SLOW_STEP_SHARE = 1 / 3
COPY_SHARE = 0.01


class Request(IntEnum):
    """What to do at the next stage; the greater one wins between processes."""

    NOTHING = 0
    COPY = 1  # keep the state in memory
    SAVE = 2
    STOP = 3  # save and end the process


@dataclass(frozen=True)
class DataState:
    """What a checkpoint records of the data that its run trains on."""

    digest: str | None  # sha256 of images, labels and classes
    normalization: tuple[list[float], list[float]] | None  # mean and std, in 0..255


def read_data_state(checkpoint: Path) -> DataState:
    """Read what a checkpoint of this module records of the data."""
    state = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["resume"]
    return DataState(state.get("digest"), state.get("moments"))


@dataclass(frozen=True)
class StateCopy:
    """A checkpoint that is in memory only."""

    path: Path  # to write it to
    checkpoint: dict[str, Any] | None  # None in all but the first process, which writes it

    def write(self) -> int | None:
        """Write the file; return its optimizer step, or None where the disk refuses it."""
        step = checkpoint_step(self.path)
        if self.checkpoint is None:
            return step
        try:
            AtomicCheckpointIO().save_checkpoint(self.checkpoint, self.path)
        except OSError as error:
            _report_failed_save(self.path.parent, step, error)
            return None
        return step


class ResumeCheckpoint(Checkpoint):
    """Writes a checkpoint every few minutes or steps, and before a signal ends the process.

    Lightning calls a `Checkpoint` after all other callbacks, so their states are up to date.

    Args:
        every_minutes: time between checkpoints; 0 for none by time.
        every_steps: steps between checkpoints; 0 for none by steps.
        keep: number of newest checkpoints to keep, so that a damaged one costs little.
        notice_seconds: time from SIGTERM or Ctrl-C to the end of the process, at most.
        url: place in a bucket, s3://…, gs://… or az://…, to which each checkpoint is uploaded, and
            from which the run resumes on another machine, and each of its nodes.
    """

    def __init__(
        self,
        every_minutes: float = 5.0,
        every_steps: int = 0,
        keep: int = 2,
        notice_seconds: float = SHUTDOWN_SECONDS,
        url: str | None = None,
    ):
        if every_minutes < 0 or every_steps < 0 or keep < 1:
            raise ValueError(
                "resume: every_minutes and every_steps must be 0 or more, and keep 1 or more"
            )
        if notice_seconds <= 0:
            raise ValueError(f"resume.notice_seconds: {notice_seconds} is not above 0")
        if url and url.partition("://")[0] not in BUCKET_SCHEMES:
            raise ValueError(
                f"resume.url: {url} is not a URL of a bucket, such as s3://bucket/runs"
            )
        self.url = url
        self._mirror: RunMirror | None = None
        self.every_seconds = every_minutes * 60 or float("inf")
        self.every_steps = every_steps
        self.keep = keep
        self.notice_seconds = notice_seconds
        self._slow_step_seconds = notice_seconds * SLOW_STEP_SHARE

        self._directory: Path | None = None  # None writes no checkpoints
        self._is_resumed = False  # from a checkpoint of the same run
        self._request = Request.NOTHING
        self._saved_step = -1
        self._next_save_time = float("inf")  # of time.monotonic()
        self._slow_batch_seconds = float("inf")  # of a part of an accumulated step
        self._batch_ended = float("inf")  # of time.monotonic(): the last batch
        self._copy: StateCopy | None = None  # of the state after an earlier step
        self._next_copy_time = float("inf")  # of time.monotonic()
        self._write_lock = threading.Lock()  # held while a checkpoint or the copy is written
        self._stage: Stage | None = None  # of the checkpoint that is being written
        self._loaded_state: dict[str, Any] | None = None  # to restore when training starts
        self._loaded_step = -1
        # Of all processes, to exchange requests; None for one process.
        self._group: torch.distributed.ProcessGroup | None = None
        # The exchange that is under way, and its request.
        self._pending: tuple[torch.distributed.Work, torch.Tensor] | None = None

    def upload_to(self, mirror: RunMirror) -> None:
        """Upload each checkpoint of the run directory to a bucket."""
        self._mirror = mirror

    def write_to(self, directory: Path, is_resumed: bool) -> None:
        """Write checkpoints to the run directory; `is_resumed`: `fit` starts from one of them."""
        self._directory = directory
        self._is_resumed = is_resumed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Create the group in which the processes exchange requests."""
        if stage == "fit" and trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")

    # When to save

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the state of a checkpoint, and defer signals to the end of a step."""
        if self._directory is not None:
            NOTICE.defer(self.notice_seconds, self._write_copy)
        self._slow_batch_seconds = self._slow_step_seconds / trainer.accumulate_grad_batches
        self._batch_ended = time.monotonic()
        self._next_save_time = time.monotonic() + self.every_seconds
        self._next_copy_time = time.monotonic() + self._slow_step_seconds
        self._saved_step = trainer.global_step
        if self._loaded_state is not None:
            assert isinstance(pl_module, Classifier)
            self._restore(self._loaded_state, trainer, pl_module)
            self._loaded_state = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save or stop, unless a validation or the end of the epoch comes next."""
        self._update_request(trainer)
        if not self._request:
            return
        loop_state = LightningLoopState(trainer)
        if loop_state.is_epoch_end_or_validation_next() or loop_state.is_accumulating():
            return
        self._fulfil_request(trainer, pl_module, "step")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Interrupt the validation where the process has to stop."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._update_request(trainer)
        if self._request == Request.STOP and not LightningLoopState(trainer).is_accumulating():
            # on_exception saves, after the other callbacks have left the validation.
            raise _preempted()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save or stop before the first step of an epoch."""
        self._update_request(trainer)
        if self._request and trainer.global_step > self._saved_step:
            self._fulfil_request(trainer, pl_module, "epoch")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of the training."""
        self._save(trainer, pl_module, "end")
        NOTICE.stop_deferring()
        if NOTICE.signum:
            raise _preempted()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the state before a validation that `on_validation_batch_end` interrupted."""
        NOTICE.stop_deferring()
        is_stopped = isinstance(exception, Preempted) and self._request == Request.STOP
        if is_stopped and trainer.validating:
            self._save(trainer, pl_module, "validation")

    def _update_request(self, trainer: L.Trainer) -> None:
        """Decide what to do at the next stage, the same in all processes."""
        request = self._local_request(trainer)
        if self._group is not None:
            request = self._exchange_request(request)
        self._request = max(self._request, request)

    def _local_request(self, trainer: L.Trainer) -> Request:
        if NOTICE.signum:
            return Request.STOP
        now = time.monotonic()
        is_slow = now - self._batch_ended > self._slow_batch_seconds
        self._batch_ended = now
        if now > self._next_save_time:
            return Request.SAVE
        is_due = self.every_steps and trainer.global_step % self.every_steps == 0
        if is_due and trainer.global_step > self._saved_step:
            return Request.SAVE
        is_copy_due = is_slow or now > self._next_copy_time
        return Request.COPY if is_copy_due else Request.NOTHING

    def _exchange_request(self, request: Request) -> Request:
        """Send this process's request and return the greatest one that was sent a step ago.

        The delay of one step lets the processes exchange requests without waiting for each other.
        """
        received = Request.NOTHING
        if self._pending is not None:
            operation, value = self._pending
            operation.wait()
            received = Request(int(value))

        value = torch.tensor(int(request))
        operation = torch.distributed.all_reduce(
            value, torch.distributed.ReduceOp.MAX, self._group, async_op=True
        )
        self._pending = (operation, value)
        return received

    # Save

    def _fulfil_request(
        self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Stage
    ) -> None:
        """Copy or save at a stage, and end the process where the request is to stop."""
        request = self._request
        self._request = Request.NOTHING
        if request == Request.COPY:
            self._copy_state(trainer, pl_module, stage)
            return
        self._save(trainer, pl_module, stage)
        if request == Request.STOP:
            if stage == "step":
                LightningLoopState(trainer).flush_step_metrics()
            raise _preempted()

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Stage) -> None:
        """Write a checkpoint. If the disk is full, training continues with the earlier one."""
        self._next_save_time = time.monotonic() + self.every_seconds
        self._next_copy_time = time.monotonic() + self._slow_step_seconds
        if self._directory is None:
            return
        assert isinstance(pl_module, Classifier)
        pl_module.check_finite("train")  # before good weights are replaced by bad ones

        self._saved_step = trainer.global_step
        with self._write_lock:
            self._copy = None  # what is written now is newer
            self._write_checkpoint(trainer, self._directory, stage)

    def _write_checkpoint(self, trainer: L.Trainer, directory: Path, stage: Stage) -> None:
        self._stage = stage
        try:
            trainer.save_checkpoint(checkpoint_path(directory, trainer.global_step))
        except OSError as error:
            # The barrier at the end of save_checkpoint, at which the other processes wait.
            trainer.strategy.barrier("Trainer.save_checkpoint")
            _report_failed_save(directory, trainer.global_step, error)
        finally:
            self._stage = None
        if trainer.is_global_zero:
            delete_old_checkpoints(directory, self.keep)
            if self._mirror is not None:
                self._mirror.upload_soon()

    def _copy_state(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Stage) -> None:
        """Copy the state to memory, in case the next step is interrupted."""
        if self._directory is None:
            return
        started = time.monotonic()
        assert isinstance(pl_module, Classifier)
        pl_module.check_finite("train")

        self._stage = stage
        try:
            checkpoint = LightningLoopState(trainer).dump_checkpoint()
        finally:
            self._stage = None
        path = checkpoint_path(self._directory, trainer.global_step)
        self._copy = StateCopy(path, _copy_to_cpu(checkpoint) if trainer.is_global_zero else None)

        now = time.monotonic()
        pause = max(self._slow_step_seconds, (now - started) / COPY_SHARE)
        self._next_copy_time = now + pause

    def _write_copy(self) -> int | None:
        """Write the copy of the state, if any; return its step.

        Called in another thread, while a step runs.
        """
        if not self._write_lock.acquire(blocking=False):
            return None  # the step has ended, and a checkpoint is being written
        try:
            return self._copy.write() if self._copy is not None else None
        finally:
            self._write_lock.release()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the position, random numbers and sums of all processes."""
        if self._stage is None:
            return  # the best weights, from which no run resumes
        assert isinstance(pl_module, Classifier)
        process_states = [_process_state(pl_module)]
        if self._group is not None:
            process_states *= trainer.world_size
            torch.distributed.all_gather_object(
                process_states, process_states[0], group=self._group
            )

        loader: Any = trainer.train_dataloader
        data = pl_module.data
        checkpoint["resume"] = {
            "stage": self._stage,
            "data": loader.state_dict(),
            "digest": data.digest,
            "moments": (data.mean, data.std),
            "steps": len(loader),
            "processes": process_states,
        }
        loops = checkpoint["loops"]["fit_loop"]
        if self._stage == "validation":
            restart_validation(loops)
        elif self._stage in BETWEEN_EPOCHS:
            complete_epoch(loops)

    # Load

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the checkpoint holds until training starts."""
        if trainer.state.fn != "fit":
            return
        self._loaded_step = checkpoint["global_step"]
        if "resume" not in checkpoint:
            return
        self._loaded_state = checkpoint["resume"]
        stage = self._loaded_state["stage"]
        if stage in BETWEEN_EPOCHS:
            LightningLoopState(trainer).start_at_next_epoch(checkpoint.pop("loops")["fit_loop"])
        if stage == "end" and self._is_resumed:
            # Also where early stopping ended the run. A checkpoint of another run trains on.
            trainer.should_stop = True

    def _restore(self, state: dict[str, Any], trainer: L.Trainer, system: Classifier) -> None:
        """Restore the position in the epoch, the random numbers and the running sums."""
        loader: Any = trainer.train_dataloader
        process_states = state["processes"]
        has_same_processes = len(process_states) == trainer.world_size
        steps = state.get("steps", len(loader))
        has_same_steps = has_same_processes and steps == len(loader)
        if state["stage"] not in BETWEEN_EPOCHS and not has_same_steps:
            raise DataError(
                f"{trainer.ckpt_path}: saved within an epoch of {steps} steps by "
                f"{len(process_states)} processes, so it resumes with the same numbers only; give "
                "a checkpoint of the end of an epoch, or this file as --model.weights"
            )

        loader.load_state_dict(state["data"])
        if has_same_processes:
            _restore_process_state(process_states[trainer.global_rank], system)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print a warning where the checkpoint had already finished its training."""
        is_untrained = trainer.global_step == self._loaded_step
        if is_untrained and not self._is_resumed and trainer.is_global_zero:
            print(
                f"train: {trainer.ckpt_path}: nothing was trained, its {trainer.current_epoch} "
                "epochs are done already; set a higher --trainer.max_epochs to train on",
                file=sys.stderr,
            )


def _preempted() -> Preempted:
    """Return the exception that ends this process.

    If only another process has received a signal, this one ends as after SIGTERM.
    """
    return Preempted(NOTICE.signum or signal.SIGTERM)


def _report_failed_save(directory: Path, step: int, error: OSError) -> None:
    """Print why a checkpoint is missing, and from which step the run can resume."""
    checkpoints = list_checkpoints(directory)
    rest = "there is no earlier one"
    if checkpoints:
        rest = f"the last one is of step {checkpoint_step(checkpoints[0])}"
    print(
        f"train: {directory}: can't write the checkpoint of step {step} "
        f"({error.strerror or error}); {rest}",
        file=sys.stderr,
        flush=True,
    )


def _copy_to_cpu(value: Any) -> Any:
    """Return a copy of nested containers that shares no memory with them, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy_to_cpu(item) for item in value]
    return copy.deepcopy(value)


def _process_state(system: Classifier) -> dict[str, Any]:
    """Return the random state and the running sums of this process."""
    sums: dict[str, torch.Tensor] = {}
    if "train" in system.sums:
        sums["train"] = system.sums["train"].totals().cpu()
    state: dict[str, Any] = {"random": torch.get_rng_state(), "sums": sums}
    if system.device.type == "cuda":
        state["cuda_random"] = torch.cuda.get_rng_state(system.device)
    return state


def _restore_process_state(state: dict[str, Any], system: Classifier) -> None:
    system.restore_sums(state["sums"])
    torch.set_rng_state(state["random"])
    if "cuda_random" in state and system.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_random"], system.device)
