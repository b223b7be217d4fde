"""`from train import fit`: a training run in a Python program or a notebook.

It is the command `run` with the same settings and the same lines on stdout. But it leaves the
program as it was: signal handlers, warnings and log levels are restored, and nothing ends the
process.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from models.bundle import Bundle
from models.cpu_quota import available_cores
from train.cli.command_line import CommandLine
from train.cli.main import LIGHTNING_LOGGERS, exit_status_of, explain_errors, silence_lightning
from train.cli.recipes import UsageError, expand_data_command
from train.cli.run import run_training
from train.failures import ExitStatus, GateRefused
from train.runs.preemption import NOTICE, Preempted
from train.runs.run_directory import release_runs


def fit(
    data: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    store: str | os.PathLike[str] | None = None,
    recipe: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    time_budget: str | None = None,
    fresh: bool = False,
) -> Bundle:
    """Train a classifier on labelled images and publish it; return the bundle.

        bundle = fit("~/photos", {"trainer.max_epochs": 3}, name="photos")
        bundle.path, bundle.manifest.test_metrics.accuracy

    Where a version of the model exists that is better beyond a budget (export.gate), it stays the
    latest: `bundle.manifest.gate.passed` is false then.

    `data` is what the command `run` takes, and `settings` holds any of its flags by their names,
    without the dashes. The other parameters are the flags of the same names. A run that was
    interrupted is resumed by the same call.

    Raises ValueError with the line that the command prints for an invalid setting or input,
    Diverged, DownloadFailed or OutOfMemory (train.failures) for a run that failed, and
    KeyboardInterrupt after Ctrl-C, once the state is saved. May be called in another thread than
    the main one; Ctrl-C then does not reach the run.
    """
    flags = {
        "recipe": recipe,
        "root": root,
        # By default all GPUs are used, each by a process of its own.
        "trainer.devices": 1,
        "store": store,
        "name": name,
        "fit.time_budget": time_budget,
    }
    given = {flag: value for flag, value in flags.items() if value is not None}
    arguments = [_format_data(data), *_format_flags({**given, **(settings or {})})]
    if fresh:
        arguments.append("--fresh")

    try:
        with _run_in_program():
            return Bundle(_run(arguments), verify=False)
    except (ValueError, OSError, MisconfigurationException) as error:
        if exit_status_of(error) != ExitStatus.INVALID:
            raise
        raise ValueError(" ".join(str(error).split())) from error


def _run(arguments: list[str]) -> Path:
    """Run the command `run` and return the directory of the bundle."""
    command_line = CommandLine(expand_data_command("run", arguments))
    _check_publishes(command_line)
    try:
        with explain_errors(command_line):
            path = run_training(command_line.training_job())
    except GateRefused as error:
        return error.path
    except Preempted as error:
        raise KeyboardInterrupt from error
    except RuntimeError as error:
        # A signal to the whole process group ends the decoding workers first.
        if NOTICE.signum:
            raise KeyboardInterrupt from error
        raise
    assert path is not None  # checked before
    return path


def _check_publishes(command_line: CommandLine) -> None:
    """Raise UsageError for a run in several processes, and for one without a bundle."""
    if command_line.trainer.world_size > 1:
        raise UsageError(
            f"--trainer.devices: {command_line.trainer.world_size} processes can't be started from "
            "a program; use the command imago train run"
        )
    if command_line.trainer.fast_dev_run or not command_line.settings.export.enabled:
        raise UsageError(
            "--export.enabled false and --trainer.fast_dev_run publish no bundle, which fit "
            "returns; leave them out"
        )


def _format_data(data: str | os.PathLike[str]) -> str:
    """Return the data as the command line has it, where a path contains a slash."""
    text = os.fspath(data)
    is_bare_path = not isinstance(data, str) and os.sep not in text
    return f".{os.sep}{text}" if is_bare_path else text


def _format_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags of the command line."""
    return [f"--{name}={_format_value(value)}" for name, value in settings.items()]


def _format_value(value: Any) -> str:
    """Return a value as the command line reads it: text as it is, all else as JSON."""
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    return json.dumps(value, default=os.fspath)


@contextmanager
def _run_in_program() -> Iterator[None]:
    """Set up the process as the command does, and restore it after the block."""
    threads = torch.get_num_threads()
    levels = {name: logging.getLogger(name).level for name in LIGHTNING_LOGGERS}
    try:
        with warnings.catch_warnings(), NOTICE.record_interrupts():
            silence_lightning()
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(min(threads, available_cores()))
            yield
    finally:
        release_runs()
        torch.set_num_threads(threads)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
