"""The one adapter to what Lightning 2.6 does not offer publicly.

Checkpoints within an epoch, orderly ends on a signal and cheap training steps need to know where
Lightning's loops stand. Written for lightning 2.6 (pyproject.toml caps it at that minor version);
each operation names the private part that it uses and why. Used in every process that trains.
"""

import atexit
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher


class LightningLoopState:
    """Where the loops of a trainer stand, and the few changes to them that resuming needs."""

    __slots__ = ("_trainer",)

    def __init__(self, trainer: L.Trainer):
        self._trainer = trainer

    def is_step_logged(self) -> bool:
        """Whether what the current training step logs reaches the loggers.

        `_logger_connector.should_update_logs`: logging copies values from the device, so other
        steps skip it.
        """
        return self._trainer._logger_connector.should_update_logs

    def is_accumulating(self) -> bool:
        """Whether gradients wait for an optimizer step; a checkpoint does not hold them.

        `epoch_loop._should_accumulate`: knows accumulation windows and the shorter window at the
        end of an epoch.
        """
        return self._trainer.fit_loop.epoch_loop._should_accumulate()

    def is_epoch_end_or_validation_next(self) -> bool:
        """Whether a validation or the end of the epoch follows the batch that has just ended.

        `epoch_loop._should_check_val_fx` with `fit_loop._data_fetcher`: Lightning's own decision
        whether to validate.
        """
        fit_loop = self._trainer.fit_loop
        if fit_loop.epoch_loop.batch_progress.is_last_batch:
            return True

        fetcher = fit_loop._data_fetcher
        assert fetcher is not None  # it exists within an epoch
        return fit_loop.epoch_loop._should_check_val_fx(fetcher)

    def flush_step_metrics(self) -> None:
        """Send the metrics of the current training step to the loggers, before the loop is left.

        `_logger_connector.update_train_step_metrics`: Lightning calls it only after the callbacks
        of the step.
        """
        self._trainer._logger_connector.update_train_step_metrics()

    def dump_checkpoint(self) -> dict[str, Any]:
        """Return what `trainer.save_checkpoint` writes, with references to the current tensors.

        `_checkpoint_connector.dump_checkpoint`: to keep a copy in memory instead of a file. With
        several processes all of them call it.
        """
        return self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)

    def start_at_next_epoch(self, fit_loop_state: dict[str, Any]) -> None:
        """Continue with the first step of an epoch, and restart no epoch.

        `fit_loop._restarting`: while it is set, Lightning treats the epoch as interrupted and skips
        `on_train_epoch_start`.
        """
        fit_loop = self._trainer.fit_loop
        fit_loop.load_state_dict(fit_loop_state)
        fit_loop._restarting = False
        fit_loop.epoch_loop.restarting = False

    def start_processes(self) -> bool:
        """Start the processes of this node before `fit` does; return whether all are started now.

        `strategy.launcher.launch` starts them where no launcher such as torchrun has. It sets
        LOCAL_RANK, by which it knows in `fit` that nothing is left to start. Launchers that do not
        run this command again in each process (ddp_spawn, ddp_fork) have to wait for `fit`.
        """
        launcher = self._trainer.strategy.launcher
        if not isinstance(launcher, _SubprocessScriptLauncher):
            return False
        launcher.launch(_do_nothing)
        return True

    def connect_processes(self) -> None:
        """Join the process group before `fit` does, so that processes can agree on a run directory.

        `strategy.setup_environment` is public, but Lightning calls it only within `fit`; a second
        call does nothing.
        """
        self._trainer.strategy.setup_environment()

    def signal_sender(self) -> Callable[[int], None] | None:
        """Return what passes a signal on to the processes that Lightning has started, if any.

        `strategy.launcher.kill`: only launchers of processes have it.
        """
        return getattr(self._trainer.strategy.launcher, "kill", None)

    def disable_signal_handling(self) -> None:
        """Leave SIGTERM to this project.

        `_signal_connector.register_signal_handlers` ends a run with status 0, which Kubernetes
        takes for success. `epoch_loop._broadcast_sigterm_tensor` makes each step of several
        processes wait for the first one.
        """
        connector = self._trainer._signal_connector
        connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        epoch_loop = self._trainer.fit_loop.epoch_loop
        epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def _do_nothing() -> None:
    """Run by a launcher that has started its processes."""


def restart_validation(fit_loop_state: dict[str, Any]) -> None:
    """Change a checkpoint's loops so that an interrupted validation runs again completely.

    The validation loop counts as started when it has taken its first batch: its progress is set to
    one batch that is not done.
    """
    fit_loop_state["epoch_loop.val_loop.batch_progress"] |= {
        "total": {"ready": 1, "started": 1, "processed": 0, "completed": 0},
        "current": {"ready": 0, "started": 0, "processed": 0, "completed": 0},
    }


def complete_epoch(fit_loop_state: dict[str, Any]) -> None:
    """Change a checkpoint's loops so that no epoch is under way."""
    for counts in fit_loop_state["epoch_progress"].values():
        counts.update(dict.fromkeys(counts, counts["completed"]))


def keep_process_group_at_exit() -> None:
    """Do not tear down the process group at the interpreter's exit.

    `_destroy_dist_connection`, which Lightning registers with atexit, waits for processes that are
    within a collective operation and never answer.
    """
    atexit.unregister(_destroy_dist_connection)
