"""Checkpoints to go on from: a run that was killed and started again ends with the weights of one that never was.

Order and augmentation are functions of (seed, epoch, step), so what a checkpoint must hold beside Lightning's own
(weights, optimizer, schedule, loops, callbacks) is where the epoch stands, each process's random numbers and its
running sums, and the digest of the data, which must not change. A checkpoint is made at one of four stages, each of
which Lightning can start from:

    step        after a step, where neither a validation nor the epoch's end comes next
    validation  before a validation that was cut short; all of it is done again
    epoch       before the first step of an epoch
    end         after the last step, so that a run killed while its bundle is written need not train again
"""

import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from train.data import DataError, ImageData
from train.learning.system import Classifier, EpochSums
from train.learning.trainer import ours
from train.runs import checkpoints
from train.runs.preemption import NOTICE, Preempted

SAVE, STOP = 1, 2  # what is wanted at the next stage; more goes before less


class Resume(
    Checkpoint
):  # this base makes it the last of the callbacks, when the others have their states ready
    """Writes a checkpoint every so often, and when the process is told to end."""

    def __init__(self, every_minutes: float = 5.0, every_steps: int = 0, keep: int = 2):
        """
        Args:
            every_minutes: time between checkpoints; 0 for none by time.
            every_steps: steps between checkpoints; 0 for none by steps.
            keep: how many of the newest are kept, so that a damaged one costs little.
        """
        if every_minutes < 0 or every_steps < 0 or keep < 1:
            raise ValueError(
                "resume: every_minutes and every_steps must be 0 or more, and keep 1 or more"
            )
        self.every_seconds, self.every_steps, self.keep = (
            every_minutes * 60 or float("inf"),
            every_steps,
            keep,
        )
        self.directory: Path | None = (
            None  # set by the command line; without one nothing is written
        )
        self.begun: Path | None = (
            None  # the checkpoint there to go on from, if any; set by the command line too
        )
        self._wanted, self._saved_step = 0, -1
        self._next = float("inf")
        self._stage: str | None = None
        self._loaded: dict[str, Any] | None = None
        self._start = -1  # the step of the checkpoint that was loaded
        self._group: Any = None  # of CPU messages between processes
        self._asked: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        if (
            stage == "fit" and self.begun
        ):  # here, as Lightning loads the weights before it asks callbacks
            self._take_up(self.begun, ours(trainer).datamodule)

    def _take_up(self, begun: Path, data: ImageData) -> None:
        """Normalise as before: less free memory may have the data streamed now, and a sample of it measured.

        Raises DataError where the data is not what it was: neither order nor weights would fit.
        """
        state = torch.load(begun, map_location="cpu", mmap=True, weights_only=True)["resume"]
        if state.get("digest", data.digest) != data.digest:
            raise DataError(
                f"{self.directory}: begun on other images, labels or classes than {data.source} holds now; "
                "put those back to go on, or begin anew: with --fresh, or by removing that directory where "
                "the same command is retried by itself"
            )
        data.mean, data.std = state.get("moments", (data.mean, data.std))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        NOTICE.training = self.directory is not None
        self._next = time.monotonic() + self.every_seconds
        self._saved_step = trainer.global_step
        if self._loaded is not None:
            us, states = ours(trainer), self._loaded["processes"]
            alike = len(states) == trainer.world_size
            if self._loaded["stage"] not in ("epoch", "end"):
                steps = self._loaded.get("steps", len(us.train_dataloader))
                if not alike or steps != len(us.train_dataloader):
                    raise DataError(
                        f"{trainer.ckpt_path}: saved within an epoch of {steps} steps by {len(states)} "
                        "processes, so it is gone on from with as many of both; for other batches or other "
                        "processes give a checkpoint of an epoch's end, or its file as --model.weights"
                    )
            us.train_dataloader.load_state_dict(
                self._loaded["data"]
            )  # Lightning may have made it too early
            if alike:
                _restore(states[trainer.global_rank], us.lightning_module)
            self._loaded = None

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._look(trainer)
        if self._wanted:
            loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
            assert fetcher is not None  # within an epoch
            waits = loop.batch_progress.is_last_batch or loop._should_check_val_fx(fetcher)
            if not waits and not loop._should_accumulate():
                self._act(trainer, "step")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer)
            if (
                self._wanted == STOP and not trainer.fit_loop.epoch_loop._should_accumulate()
            ):  # gradients are not saved
                raise _preempted()  # on_exception saves, when the callbacks before have put their things in order

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer)
        if self._wanted and trainer.global_step > self._saved_step:
            self._act(trainer, "epoch")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, "end")
        NOTICE.training = False
        if NOTICE.signum:
            raise _preempted()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        NOTICE.training = False
        if isinstance(exception, Preempted) and trainer.validating and self._wanted == STOP:
            self._save(trainer, "validation")

    def _look(self, trainer: L.Trainer) -> None:
        """What is wanted now. Between processes the word goes round without waiting: all hear it a step later."""
        mine = 0
        if NOTICE.signum:
            mine = STOP
        elif time.monotonic() > self._next or (
            self.every_steps
            and trainer.global_step % self.every_steps == 0
            and trainer.global_step > self._saved_step
        ):
            mine = SAVE
        if self._group is not None:
            heard = 0
            if self._asked is not None:
                work, word = self._asked
                work.wait()
                heard = int(word)
            word = torch.tensor(mine)
            self._asked = (
                torch.distributed.all_reduce(
                    word, torch.distributed.ReduceOp.MAX, self._group, async_op=True
                ),
                word,
            )
            mine = heard
        self._wanted = max(self._wanted, mine)

    def _act(self, trainer: L.Trainer, stage: str) -> None:
        wanted, self._wanted = self._wanted, 0
        self._save(trainer, stage)
        if wanted == STOP:
            if stage == "step":
                trainer._logger_connector.update_train_step_metrics()  # which Lightning would send to the loggers next
            raise _preempted()

    def _save(self, trainer: L.Trainer, stage: str) -> None:
        """Write a checkpoint. Where that fails, the run goes on with the one before."""
        self._next = time.monotonic() + self.every_seconds
        if self.directory is None:
            return
        ours(trainer).lightning_module.check_finite(
            "train"
        )  # before good weights give place to bad ones
        self._stage, self._saved_step = stage, trainer.global_step
        try:
            trainer.save_checkpoint(checkpoints.place(self.directory, trainer.global_step))
        except OSError as error:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes are
            last = checkpoints.found(self.directory)
            left = (
                f"the last one is of step {checkpoints.step_of(last[0])}"
                if last
                else "there is none before"
            )
            print(
                f"train: {self.directory}: no checkpoint of step {trainer.global_step} could be written "
                f"({error.strerror or error}); {left}",
                file=sys.stderr,
                flush=True,
            )
        finally:
            self._stage = None
        if trainer.is_global_zero:
            checkpoints.prune(self.directory, self.keep)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._stage is None:
            return  # the best weights, which nobody goes on from
        us = ours(trainer)
        processes = [_state(us.lightning_module)]
        if self._group is not None:
            processes *= trainer.world_size
            torch.distributed.all_gather_object(processes, processes[0], group=self._group)
        checkpoint["resume"] = {
            "stage": self._stage,
            "data": us.train_dataloader.state_dict(),
            "digest": us.datamodule.digest,
            "moments": (us.datamodule.mean, us.datamodule.std),
            "steps": len(us.train_dataloader),
            "processes": processes,
        }
        loops = checkpoint["loops"]["fit_loop"]
        if self._stage == "validation":
            loops["epoch_loop.val_loop.batch_progress"] |= {
                "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
                "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
            }
        elif self._stage in ("epoch", "end"):
            for count in loops["epoch_progress"].values():
                count.update(dict.fromkeys(count, count["completed"]))

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return
        self._start = checkpoint["global_step"]
        if self.begun:
            _move(checkpoint["callbacks"], trainer)
        if "resume" not in checkpoint:
            return
        self._loaded = checkpoint["resume"]
        if self._loaded["stage"] in ("epoch", "end"):  # no epoch is under way, so none is restarted
            loop = trainer.fit_loop
            loop.load_state_dict(checkpoint.pop("loops")["fit_loop"])
            loop._restarting = loop.epoch_loop.restarting = False
        if (
            self._loaded["stage"] == "end" and self.begun
        ):  # another run's checkpoint is there to be trained on
            trainer.should_stop = True  # also when it had stopped early

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == self._start and not self.begun and trainer.is_global_zero:
            print(
                f"train: {trainer.ckpt_path}: nothing was trained, as its {trainer.current_epoch} epochs are all "
                "that was asked for; its weights stay as they are (more --trainer.max_epochs to go on)",
                file=sys.stderr,
            )


def _move(states: dict[str, Any], trainer: L.Trainer) -> None:
    """Let ModelCheckpoint look for the best weights where the run lies now, not where it lay when it was saved."""
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint) and (state := states.get(keeper.state_key)):
            was, now = state["dirpath"], str(keeper.dirpath)
            for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
                state[name] = state[name].replace(was, now, 1)
            state["best_k_models"] = {
                path.replace(was, now, 1): score for path, score in state["best_k_models"].items()
            }
            state["dirpath"] = now


def _preempted() -> Preempted:
    return Preempted(
        NOTICE.signum or signal.SIGTERM
    )  # the notice may have come to another process only


def _state(system: Classifier) -> dict[str, Any]:
    sums = {part: sums.totals().cpu() for part, sums in system.sums.items() if part == "train"}
    state = {"random": torch.get_rng_state(), "sums": sums}
    if system.device.type == "cuda":
        state["cuda_random"] = torch.cuda.get_rng_state(system.device)
    return state


def _restore(state: dict[str, Any], system: Classifier) -> None:
    system.sums.update(
        {part: EpochSums(totals.to(system.device)) for part, totals in state["sums"].items()}
    )
    torch.set_rng_state(state["random"])
    if "cuda_random" in state and system.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_random"], system.device)
