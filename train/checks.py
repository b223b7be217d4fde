"""What was asked for and can't be done or helps nobody, said before anything is begun."""
from pathlib import Path

from jsonargparse import Namespace

from train import checkpoints


def check(subcommand: str, config: Namespace) -> None:
    """Raise ValueError, in one line that says what to do, for settings of one subcommand that don't go together."""
    model, trainer = config.model, config.trainer
    if model.weigh_classes and config.data.sampling == "balanced":
        raise ValueError("model.weigh_classes and data.sampling: balanced each make up for rare classes, and both do "
                         "it twice; choose one")
    if not config.ckpt_path and not model.weights:
        if subcommand != "fit":
            raise ValueError(f"{subcommand}: the weights would be random ones; give --ckpt_path, such as "
                             "artifacts/runs/NAME/1/best.ckpt, or --model.weights")
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if trainer[name] == 0:
                raise ValueError(f"trainer.{name}: 0 trains nothing; give 1 or more, or --model.weights")
    if config.ckpt_path and Path(config.ckpt_path).is_file() and not checkpoints.whole(Path(config.ckpt_path)):
        raise ValueError(f"--ckpt_path {config.ckpt_path}: no checkpoint, or a damaged one; a run keeps best.ckpt and "
                         "last.ckpt in its directory (--model.weights takes files of weights only)")
