"""Runs that the tests kill: how they are started, and what is left of them."""

from pathlib import Path
from typing import Any

import torch

from support.train_commands import TrainCommand, TrainCommands

EPOCHS, STEPS = 3, 11  # with batches of 120
# Dropout, EMA and random crops: all that draws random numbers or keeps a state of its own.
RECIPE = f"""
seed_everything: 3
data: {{source: digits, size: 16, batch_size: 120, eval_batch_size: 60, augment: {{crop_padding: 1, rotation: 10}}}}
model:
  network: lenet
  optimizer: {{name: muon, lr: 0.02, others: adamw, others_lr: 0.01}}
  schedule: {{name: cosine, warmup: 0.2}}
  label_smoothing: 0.1
ema: {{decay: 0.9}}
early_stopping: {{patience: 20}}
trainer: {{max_epochs: {EPOCHS}, log_every_n_steps: 4, callbacks: [support.interruption_callbacks.SendSignal]}}
logger: csv
progress: {{quiet: true}}
export: {{enabled: false}}
audit: {{enabled: false}}
resume: {{every_minutes: 0}}
"""


def start_run(
    commands: TrainCommands, place: Path, *more: object, kill: str = "", **how: Any
) -> TrainCommand:
    place.mkdir(exist_ok=True)
    recipe = commands.place / "recipe.yaml"
    recipe.write_text(RECIPE)
    return commands.start(
        "fit",
        "--config",
        recipe,
        "--trainer.default_root_dir",
        place,
        *more,
        env={"SEND_SIGNAL": kill},
        **how,
    )


def finish_run(commands: TrainCommands, place: Path, *more: object, **how: Any) -> TrainCommand:
    command = start_run(commands, place, *more, **how)
    assert command.status() == 0, command.text
    return command


def find_run_directory(place: Path) -> Path:
    """The one run in `place`."""
    (run,) = (place / "digits").iterdir()
    return run


def load_last_checkpoint(place: Path) -> dict[str, Any]:
    return torch.load(find_run_directory(place) / "last.ckpt", weights_only=True)


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Equal to the last bit, at any depth."""
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


def reproducible_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on kills: weights, optimizer, schedule, random numbers, metrics; not times and paths."""
    callbacks = {
        name: state
        for name, state in checkpoint["callbacks"].items()
        if "ModelCheckpoint" not in name
    }
    for row in callbacks["History"]["rows"]:
        del row["seconds"]
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "resume", "global_step", "epoch")
    return {name: checkpoint[name] for name in kept} | {"callbacks": callbacks}
