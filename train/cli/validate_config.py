"""Checks of settings that are valid one by one but not together, before anything starts."""

from pathlib import Path

from jsonargparse import Namespace

from train.learning.initial_weights import RANDOM
from train.learning.system import METRICS
from train.runs.checkpoints import is_complete_checkpoint

# What may choose the best weights. Training metrics may not: the choice follows a validation, when
# they are those of the epoch before. None keeps the last weights.
CHECKPOINT_METRICS: list[str | None] = ["val/loss", "val/accuracy", None]
RECORDING_MODES = ("reduce-overhead", "max-autotune")  # of torch.compile


def validate_config(command: str, config: Namespace) -> None:
    """Raise ValueError with a one-line message for settings that do not fit together.

    Fills in `checkpoint.mode` and `early_stopping.mode`, which follow from the metric.
    """
    config.checkpoint.mode = _choose_mode("checkpoint", config.checkpoint, CHECKPOINT_METRICS)
    config.early_stopping.mode = _choose_mode("early_stopping", config.early_stopping, [*METRICS])
    _check_training(config)
    _check_start(command, config)


def _check_training(config: Namespace) -> None:
    """Check settings of the checkpoint, the classes and the compiler that exclude one another."""
    if config.checkpoint.save_top_k not in (0, 1):
        raise ValueError(
            f"checkpoint.save_top_k: {config.checkpoint.save_top_k} is not supported; give 1 to "
            "keep the weights of the best epoch as best.ckpt, or 0 for none"
        )

    if config.model.weigh_classes and config.data.sampling == "balanced":
        raise ValueError(
            "model.weigh_classes and data.sampling: balanced both compensate for rare classes; "
            "choose one"
        )

    mode = config.model.compile
    if config.trainer.accumulate_grad_batches > 1 and mode in RECORDING_MODES:
        raise ValueError(
            f"model.compile: {mode} replays a recorded step, which can't accumulate gradients over "
            "trainer.accumulate_grad_batches; choose default"
        )


def _check_start(command: str, config: Namespace) -> None:
    """Check the checkpoint or weights that the command starts from."""
    has_weights = bool(config.ckpt_path) or config.model.weights not in (None, RANDOM)
    if not has_weights and command != "fit":
        raise ValueError(
            f"{command}: the weights would be random; give --ckpt_path, such as "
            "artifacts/runs/NAME/1/best.ckpt, or --model.weights"
        )
    if not has_weights:
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if config.trainer[name] == 0:
                raise ValueError(
                    f"trainer.{name}: 0 trains nothing; give 1 or more, or --model.weights"
                )

    checkpoint = Path(config.ckpt_path or "")
    if checkpoint.is_file() and not is_complete_checkpoint(checkpoint):
        raise ValueError(
            f"--ckpt_path {checkpoint}: not a checkpoint, or damaged; give best.ckpt or last.ckpt "
            "of a run (files of weights only are for --model.weights)"
        )


def _choose_mode(section: str, settings: Namespace, metrics: list[str | None]) -> str:
    """Return whether the monitored metric is better when lower (min) or higher (max)."""
    if settings.monitor not in metrics:
        known = ", ".join(name or "null" for name in metrics)
        raise ValueError(f"{section}.monitor: {settings.monitor!r} is not one of {known}")

    mode = METRICS.get(settings.monitor, "max")
    if settings.monitor and settings.mode not in ("auto", mode):
        raise ValueError(
            f"{section}.mode: {settings.mode} would prefer the worst {settings.monitor}; leave it "
            f"out or give {mode}"
        )
    return mode
