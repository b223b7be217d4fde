"""What was asked for and can't be done or helps nobody, said before anything is begun."""

from pathlib import Path

from jsonargparse import Namespace

from train.learning.system import METRICS
from train.runs import checkpoints


def check(subcommand: str, config: Namespace) -> None:
    """Raise ValueError, in one line that says what to do, for settings of one subcommand that can't be or don't go
    together; fill in the modes that follow from what is monitored."""
    model, trainer, keeper = config.model, config.trainer, config.checkpoint
    # Where the best weights are kept, after a validation, the metrics of training are those of the epoch before.
    keeper.mode = _mode("checkpoint", keeper, ["val/loss", "val/accuracy", None])
    config.early_stopping.mode = _mode("early_stopping", config.early_stopping, [*METRICS])
    if keeper.save_top_k not in (0, 1):
        raise ValueError(
            f"checkpoint.save_top_k: {keeper.save_top_k} is neither 1, for best.ckpt, nor 0, for none; a "
            "run keeps the weights of one epoch"
        )
    if model.weigh_classes and config.data.sampling == "balanced":
        raise ValueError(
            "model.weigh_classes and data.sampling: balanced each make up for rare classes, and both do "
            "it twice; choose one"
        )
    if trainer.accumulate_grad_batches > 1 and model.compile in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            f"model.compile: {model.compile} replays a recorded step, in which gradients can't add up "
            "over trainer.accumulate_grad_batches; choose default"
        )
    if not config.ckpt_path and not model.weights:
        if subcommand != "fit":
            raise ValueError(
                f"{subcommand}: the weights would be random ones; give --ckpt_path, such as "
                "artifacts/runs/NAME/1/best.ckpt, or --model.weights"
            )
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if trainer[name] == 0:
                raise ValueError(
                    f"trainer.{name}: 0 trains nothing; give 1 or more, or --model.weights"
                )
    if (
        config.ckpt_path
        and Path(config.ckpt_path).is_file()
        and not checkpoints.whole(Path(config.ckpt_path))
    ):
        raise ValueError(
            f"--ckpt_path {config.ckpt_path}: no checkpoint, or a damaged one; a run keeps best.ckpt and "
            "last.ckpt in its directory (--model.weights takes files of weights only)"
        )


def _mode(owner: str, settings: Namespace, choices: list[str | None]) -> str:
    """min or max, as the metric that is monitored wants it."""
    if settings.monitor not in choices:
        there = ", ".join(name or "null" for name in choices)
        raise ValueError(f"{owner}.monitor: {settings.monitor!r} is none of {there}")
    wanted = METRICS.get(settings.monitor, "max")
    if settings.monitor and settings.mode not in ("auto", wanted):
        raise ValueError(
            f"{owner}.mode: {settings.mode} would take the worst {settings.monitor} for the best; leave "
            f"it out or give {wanted}"
        )
    return wanted
