"""The commands of `python -m train`: dispatch, exit statuses and one-line error messages.

Every process of a run calls `main`, through train/__main__.py.
"""

import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from train.cli.audit_command import extract_audit_options, run_audit_command
from train.cli.command_line import CommandLine
from train.cli.evaluation import run_evaluation
from train.cli.recipes import UsageError, expand_data_command
from train.cli.run import run_training
from train.cli.tuner import find_batch_size, find_learning_rate
from train.failures import (
    BatchOutOfMemory,
    Diverged,
    DownloadFailed,
    ExitStatus,
    GateRefused,
    OutOfMemory,
    is_out_of_memory,
)
from train.runs.preemption import NOTICE

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
# Their first argument is the data: `run DATA`.
DATA_COMMANDS = ("run", "audit", "find-lr", "find-batch-size")
COMMANDS = (*DATA_COMMANDS, *LIGHTNING_COMMANDS, "launch")  # train/__main__.py dispatches launch
TRIAL_COMMANDS = ("find-lr", "find-batch-size")

LIGHTNING_LOGGERS = ("lightning.pytorch", "lightning.fabric")
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
EXPECTED_WARNINGS = (
    ".*LeafSpec.*",  # a deprecated class of torch that Lightning uses
    "Checkpoint directory .* exists and is not empty",  # the run directory
    "The number of training batches .* is smaller than the logging interval",  # epochs are logged
    "It is recommended to use `self.log.*sync_dist",  # logged values are sums over all processes
    "Found .* in eval mode at the start of training",  # frozen batch norms
    "Grad strides do not match bucket view strides",
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; see `ExitStatus`.

    An error is printed as one line on stderr. With IMAGO_TRACEBACK=1 its traceback comes first,
    because a message about an invalid setting may hide a defect of this program.
    """
    silence_lightning()
    NOTICE.install_handlers()
    try:
        run(sys.argv[1:] if arguments is None else arguments)
    except (
        ValueError,
        OSError,
        MisconfigurationException,
        Diverged,
        DownloadFailed,
        OutOfMemory,
    ) as error:
        if os.environ.get("IMAGO_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"train: {' '.join(str(error).split())}", file=sys.stderr)
        return exit_status_of(error)
    except GateRefused:  # the last line of the run says so
        return ExitStatus.REFUSED
    except RuntimeError:
        # A signal to the whole process group ends the decoding workers first.
        if NOTICE.signum:
            return 128 + NOTICE.signum
        raise
    return ExitStatus.DONE


def silence_lightning() -> None:
    """Hide Lightning's advice and warnings that do not apply to these commands."""
    for name in LIGHTNING_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def exit_status_of(error: BaseException) -> ExitStatus:
    """Return the exit status for an error: the run failed, or a setting or the input is invalid."""
    is_disk_error = getattr(error, "errno", None) in DISK_ERRORS
    if is_disk_error or isinstance(error, Diverged | DownloadFailed | OutOfMemory):
        return ExitStatus.FAILED
    return ExitStatus.INVALID


def run(arguments: list[str]) -> CommandLine:
    """Run one command and return the trainer, system and data module that it used.

    Raises ValueError or OSError with a one-line message for what the user can correct; Diverged,
    DownloadFailed and OutOfMemory for a run that failed.
    """
    command = arguments[0] if arguments else ""
    is_help = command.startswith("-")
    if command not in COMMANDS and not is_help:
        problem = f"{command!r} is not a command" if command else "no command given"
        raise UsageError(f"{problem}; the commands are {', '.join(COMMANDS)}")

    if command == "audit":
        return run_audit(arguments[1:])
    if command in TRIAL_COMMANDS:
        return run_trial(command, arguments[1:])

    if command == "run":
        arguments = expand_data_command(command, arguments[1:])
    command_line = CommandLine(arguments)
    with explain_errors(command_line):
        if command_line.subcommand == "fit":
            run_training(command_line.training_job())
        else:
            run_evaluation(command_line)
    return command_line


def run_audit(arguments: list[str]) -> CommandLine:
    """Run `audit DATA [--out DIR] [--serve] [fit flags]`."""
    options, arguments = extract_audit_options(arguments)
    command_line = CommandLine(data_arguments("audit", arguments))
    check_no_checkpoint("audit", command_line)
    command_line.find_weights()
    with explain_errors(command_line):
        run_audit_command(command_line.datamodule, options, command_line.embedder())
    return command_line


def run_trial(command: str, arguments: list[str]) -> CommandLine:
    """Run `find-lr DATA [fit flags]` or `find-batch-size DATA [fit flags]`."""
    command_line = CommandLine(data_arguments(command, arguments))
    check_no_checkpoint(command, command_line)
    command_line.find_weights()
    find = find_learning_rate if command == "find-lr" else find_batch_size
    with explain_errors(command_line):
        trainer_settings = command_line.settings.trainer
        find(trainer_settings, command_line.model, command_line.datamodule)
    return command_line


def data_arguments(command: str, arguments: list[str]) -> list[str]:
    """Return the arguments of `fit` for `COMMAND DATA …` or `COMMAND [fit flags]`."""
    if arguments and arguments[0].startswith("-"):
        return ["fit", *arguments]
    return expand_data_command(command, arguments)


def check_no_checkpoint(command: str, command_line: CommandLine) -> None:
    """Raise UsageError where the settings name a checkpoint, for a command that takes none."""
    if command_line.settings.ckpt_path:
        raise UsageError(
            f"--ckpt_path: {command} does not take a checkpoint; leave it out (--model.weights "
            "gives weights to start from)"
        )


@contextmanager
def explain_errors(command_line: CommandLine) -> Iterator[None]:
    """Replace torch's errors about checkpoints and memory with messages that say what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "Error(s) in loading state_dict" in str(error):
            raise UsageError(
                f"--ckpt_path {command_line.settings.ckpt_path}: of another network or another "
                "number of classes; give the settings that it was trained with"
            ) from error
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise explain_out_of_memory(command_line) from error


def explain_out_of_memory(command_line: CommandLine) -> BatchOutOfMemory:
    """Return the error that names the batch size that was too large."""
    trainer = command_line.trainer
    data = command_line.datamodule

    # Lightning has reset the trainer's stage by now, but not the mode of the network.
    is_training = command_line.subcommand == "fit" and command_line.model.training
    is_evaluation = trainer.state.finished or not is_training
    batch_size = data.batch_size
    if is_evaluation:
        batch_size = data.eval_batch_size or 2 * data.batch_size
    return BatchOutOfMemory(batch_size, trainer.strategy.root_device, is_evaluation)
