"""Training runs that tests interrupt: how they start, and what must not differ afterwards."""

from pathlib import Path
from typing import Any

import torch

from support.forked_commands import ForkedCommand, ForkedCommands

EPOCHS = 3
STEPS = 11
"""Steps per epoch, with batches of 120."""

# Dropout, EMA and random crops: everything that draws random numbers or keeps state.
RECIPE = f"""
seed_everything: 3
data:
  source: digits
  size: 16
  batch_size: 120
  eval_batch_size: 60
  augment: {{crop_padding: 1, rotation: 10}}
model:
  network: lenet
  optimizer: {{name: muon, lr: 0.02, others: adamw, others_lr: 0.01}}
  schedule: {{name: cosine, warmup: 0.2}}
  label_smoothing: 0.1
ema: {{decay: 0.9}}
early_stopping: {{patience: 20}}
trainer:
  max_epochs: {EPOCHS}
  log_every_n_steps: 4
  callbacks: [support.interruption_callbacks.SendSignal]
logger: csv
progress: {{quiet: true}}
export: {{enabled: false}}
audit: {{enabled: false}}
resume: {{every_minutes: 0}}
"""

REPRODUCED_STATE = (
    "state_dict",
    "optimizer_states",
    "lr_schedulers",
    "resume",
    "global_step",
    "epoch",
)


def start_run(
    commands: ForkedCommands,
    runs: Path,
    *flags: object,
    kill: str = "",
    variables: dict[str, str] | None = None,
    **options: Any,
) -> ForkedCommand:
    """Start a run of RECIPE below `runs`; `kill` is the SEND_SIGNAL of `SendSignal`."""
    runs.mkdir(exist_ok=True)
    recipe = commands.directory / "recipe.yaml"
    recipe.write_text(RECIPE)
    settings = ("--config", recipe, "--trainer.default_root_dir", runs)
    return commands.start(
        "fit", *settings, *flags, env={**(variables or {}), "SEND_SIGNAL": kill}, **options
    )


def finish_run(
    commands: ForkedCommands, runs: Path, *flags: object, **options: Any
) -> ForkedCommand:
    """Start or resume the run and wait until it ends with exit status 0."""
    command = start_run(commands, runs, *flags, **options)
    assert command.status() == 0, command.text
    return command


def find_run_directory(runs: Path) -> Path:
    """The directory of the one run below `runs`."""
    (directory,) = (runs / "digits").iterdir()
    return directory


def load_last_checkpoint(runs: Path) -> dict[str, Any]:
    return torch.load(find_run_directory(runs) / "last.ckpt", weights_only=True)


def reproducible_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The part of a checkpoint that interruptions must not change.

    Weights, optimizer, schedule, random numbers and metrics; not times and paths.
    """
    callbacks = dict(checkpoint["callbacks"])
    for name in checkpoint["callbacks"]:
        if "ModelCheckpoint" in name:
            del callbacks[name]
    for row in callbacks["History"]["rows"]:
        del row["seconds"]

    state = {name: checkpoint[name] for name in REPRODUCED_STATE}
    return {**state, "callbacks": callbacks}


def assert_same_result(one: Path, other: Path) -> None:
    """Assert that the runs below two directories ended with the same reproducible state."""
    assert_equal(
        reproducible_state(load_last_checkpoint(one)),
        reproducible_state(load_last_checkpoint(other)),
    )


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Assert equality to the last bit, at any depth; `path` names the place in the message."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            assert_equal(value, other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for i, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_equal(left, right, f"{path}/{i}")
    else:
        assert one == other, path
