"""The command line: Lightning's, with our classes, one line an error, and a bundle after `fit`."""

import csv
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from models.store import Store
from train.cli import validate_config
from train.cli.audit_command import look
from train.cli.tuner import find_batch_size, find_lr
from train.data import ImageData
from train.export.config import ExportConfig
from train.export.pipeline import export_bundle
from train.failures import Diverged, OutOfMemory, is_out_of_memory
from train.learning import lightning_speed
from train.learning.ema import WeightAverage
from train.learning.precision import PrecisionNotice, choose_precision
from train.learning.system import Classifier
from train.learning.trainer import ours
from train.runs import distributed, loggers, run_directory
from train.runs.audit_callback import Audit
from train.runs.callbacks import EarlyStopping, ProgressBar, SamplePredictions
from train.runs.history import History
from train.runs.monitor import Monitor
from train.runs.preemption import NOTICE
from train.runs.resume import Resume
from train.runs.trainer import ImageTrainer

RECIPES = Path(__file__).parents[1] / "recipes"
RUNS = "artifacts/runs"
FINDERS: dict[str, Any] = {"audit": look, "find-lr": find_lr, "find-batch-size": find_batch_size}
COMMANDS = ("run", *FINDERS, "fit", "validate", "test", "predict")
FAILURE = 1  # exit status for what went wrong in a run that was set up right
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
USAGE = 2  # exit status for what the user can put right


class UsageError(ValueError):
    """What was asked for can't be done; the message is one line that says why and what to do."""


class Parser(LightningArgumentParser):
    """Says what is wrong in one line, and raises it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(" ".join(str(message).split())) from ex


class CLI(LightningCLI):
    """`fit`, `validate`, `test` and `predict` over one system and one data module."""

    trainer: ImageTrainer

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="weights, split, order and augmentation all follow from it",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--store", default="artifacts/store", help="where the bundle goes")
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="the model's name in the store; by default that of the data",
        )
        parser.add_argument(
            "--logger",
            default="tensorboard",
            help="tensorboard, csv, wandb, mlflow or none; several with commas between",
        )
        parser.add_argument(
            "--fresh", action="store_true", help="begin anew where an unfinished run could go on"
        )
        parser.add_class_arguments(ExportConfig, "export")
        parser.add_lightning_class_args(ProgressBar, "progress")
        parser.add_lightning_class_args(SamplePredictions, "samples")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(
            WeightAverage, "ema"
        )  # after what looks at the average in a validation
        parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
        parser.add_lightning_class_args(History, "history")
        parser.add_lightning_class_args(Audit, "audit")
        parser.add_lightning_class_args(Monitor, "monitor")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Resume, "resume")
        parser.link_arguments("seed_everything", "data.seed")
        parser.set_defaults(
            {
                "lr_monitor.logging_interval": "epoch",
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "auto",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
                "checkpoint.auto_insert_metric_name": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:  # type: ignore[override]
        # Lightning takes more kinds of arguments; `run` gives this one
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        validate_config.check(self.config.subcommand, config)
        if config.weights_only is None:
            config.weights_only = True  # Lightning would run whatever code a checkpoint holds

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.name = config.name or model_name(config.data.source)
        if config.trainer.logger is None:
            config.trainer.logger = (
                False  # `logger` names them, and the run's directory is not known yet
            )
        if (
            config.trainer.enable_progress_bar is False
        ):  # which Lightning takes for a word about ours, and refuses it
            config.trainer.enable_progress_bar, config.progress.quiet = None, True
        distributed.follow_launcher(config.trainer)
        self.asked = config.trainer.precision
        config.trainer.precision = choose_precision(self.asked, config.trainer.accelerator)

    def after_instantiate_classes(self) -> None:
        given = self.config[self.subcommand].trainer.precision
        if given != self.asked:
            ours(self.trainer).callbacks.append(PrecisionNotice(self.asked, given))
        distributed.own_signals(self.trainer)

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning's whole command, the bundle included, with words for errors that torch tells in a traceback."""
        if self.config_init[subcommand].ckpt_path:
            self.model.weights = None  # the checkpoint's take their place
        try:
            super()._run_subcommand(subcommand)
        except (RuntimeError, MemoryError) as error:
            if "Error(s) in loading state_dict" in str(error):
                raise UsageError(
                    f"--ckpt_path {self.config_init[subcommand].ckpt_path}: of another network or another "
                    "number of classes; give the settings that it was trained with"
                ) from error
            if not is_out_of_memory(error) or isinstance(
                error, OutOfMemory
            ):  # which says already what it came from
                raise
            # Lightning has reset its stage by now, but not the mode of the network
            evaluating = (
                subcommand != "fit" or self.trainer.state.finished or not self.model.training
            )
            data = self.datamodule
            size = data.eval_batch_size or 2 * data.batch_size if evaluating else data.batch_size
            raise OutOfMemory(size, self.trainer.strategy.root_device, evaluating) from error

    def before_fit(self) -> None:
        us, config = ours(self.trainer), self.config_init.fit
        if not us.fast_dev_run:
            if (
                config.export.enabled and self.trainer.is_global_zero
            ):  # only that process needs to reach the store
                Store(config.store).ensure_writable(
                    self.name
                )  # hours before a bundle is written: else it is refused only then
            self.begin_run(config)
        if not self.trainer.loggers:
            us.callbacks = [c for c in us.callbacks if not isinstance(c, LearningRateMonitor)]

    def begin_run(self, config: Namespace) -> None:
        """Take up the run of this command where it stands, or start a new one; log it."""
        self.run = run_directory.begin(
            self.trainer,
            Path(config.trainer.default_root_dir or RUNS),
            self.name,
            self.plain_config(asked=True),
            config.fresh,
        )
        config.monitor.start(self.trainer)
        self.trainer.loggers = [*self.trainer.loggers, *loggers.make(config.logger, self.run)]
        if self.run.checkpoint:
            config.ckpt_path, config.weights_only = str(self.run.checkpoint), True
            self.model.weights = None

    def fit(self, **arguments: Any) -> None:
        lightning_speed.trim(self.trainer, self.model)
        if self.trainer.strategy.root_device.type == "cpu":
            lightning_speed.keep_memory()
        self.trainer.fit(**arguments)

    def after_fit(self) -> None:
        """Test the best weights, write the bundle, say where it is."""
        if not ours(self.trainer).fast_dev_run:
            distributed.wait_for(
                self.trainer, self._publish
            )  # a node that is lost now would leave nothing behind

    def _publish(self) -> None:
        export = self.config_init.fit.export
        if export.enabled:
            export_bundle(
                self.trainer,
                self.model,
                self.datamodule,
                export,
                self.config_init.fit.store,
                self.name,
                recipe=self.plain_config(),
            )
        self.run.finish()

    def predict(self, **arguments: Any) -> None:
        """Print what the checkpoint makes of the test part, as CSV: image, predicted class, its probability."""
        found = chain.from_iterable(self.trainer.predict(**arguments) or [])
        data, answers = self.datamodule, []
        mine = data.index["test"][self.trainer.global_rank :: self.trainer.world_size]
        for i, probabilities in zip(
            mine.tolist(), found, strict=False
        ):  # limit_predict_batches may end it sooner
            confidence, index = probabilities.max(0)
            answers.append((i, data.found.items.name(i), data.classes[index], f"{confidence:.4f}"))
        answers = sorted(distributed.gather(self.trainer, answers))
        if self.trainer.is_global_zero:
            csv.writer(sys.stdout).writerows(
                [("image", "label", "confidence"), *(row[1:] for row in answers)]
            )

    def plain_config(self, asked: bool = False) -> dict[str, Any]:
        """All knobs as plain values, as the manifest keeps them; or with the precision `asked` for, which a run keeps:
        the node that goes on with it may compute in another."""
        plain = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))[
            self.subcommand
        ]
        if asked:
            plain["trainer"]["precision"] = self.asked
        return plain


class Finder(CLI):
    """Takes what `fit` takes and tries something out in its place."""

    def __init__(
        self,
        finder: Callable[[dict[str, Any], Classifier, ImageData], None],
        *settings: Any,
        **more: Any,
    ):
        self.finder = finder
        super().__init__(*settings, **more)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:  # type: ignore[override]
        super().parse_arguments(parser, args)
        if self.config.fit.ckpt_path:
            raise UsageError(
                "ckpt_path: what looks for something trains from --model.weights, or from random ones"
            )

    def before_fit(self) -> None:
        pass

    def fit(self, **arguments: Any) -> None:
        self.finder(self.config_init.fit.trainer, self.model, self.datamodule)

    def after_fit(self) -> None:
        pass


def model_name(source: str) -> str:
    """A name fit for the store from that of the data: the last part of a path, lower case."""
    name = (
        Path(source).expanduser().resolve().name
        if "/" in source or source in (".", "..")
        else source
    )
    name = "".join(
        c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name.lower()
    ).strip("._-")
    return name[:63] or "model"


def front_door(command: str, *argv: str) -> list[str]:
    """`run DATA [--recipe R] [--root DIR] [fit flags]` as the arguments of `fit`. Raises UsageError."""
    if argv[:1] in (("-h",), ("--help",)):
        return ["fit", "--help"]
    if not argv or argv[0].startswith("-"):
        raise UsageError(
            f"{command}: name the data first, e.g. python -m train {command} digits, or a folder of class "
            "folders"
        )
    data, rest = argv[0], list(argv[1:])
    recipe, rest = _take(rest, "--recipe")
    root, rest = _take(rest, "--root")
    if recipe is None:
        named = RECIPES / f"{data}.yaml"
        recipe = str(named if named.is_file() else RECIPES / "folder.yaml")
    elif not Path(recipe).is_file():
        named = RECIPES / f"{recipe.removesuffix('.yaml')}.yaml"
        if not named.is_file():
            there = ", ".join(
                sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
            )
            raise UsageError(f"--recipe {recipe}: no such recipe or file; there are {there}")
        recipe = str(named)
    return [
        "fit",
        "--config",
        recipe,
        "--data.source",
        data,
        *(["--data.root", root] if root else []),
        *rest,
    ]


def _take(argv: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Take `flag VALUE` or `flag=VALUE` out of the arguments."""
    for i, word in enumerate(argv):
        if word == flag:
            if i + 1 == len(argv):
                raise UsageError(f"{flag}: needs a value")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith(flag + "="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
    return None, argv


def run(argv: list[str]) -> CLI:
    """One command. Raises ValueError with one line for what the user can put right."""
    command = argv[0] if argv else ""
    if command not in COMMANDS and not command.startswith("-"):
        problem = f"{command!r} is no command" if command else "no command is given"
        raise UsageError(f"{problem}; there are {', '.join(COMMANDS)}")
    if command == "run":
        argv = front_door(*argv)
    kind: Any = CLI
    if command in FINDERS:
        finder = FINDERS[command]
        if finder is look:
            out, argv = _take(argv, "--out")
            finder = partial(look, out=out)
        kind = partial(Finder, finder)
        argv = ["fit", *argv[1:]] if argv[1:2] and argv[1].startswith("-") else front_door(*argv)
    return kind(
        Classifier,
        ImageData,
        args=argv,
        trainer_class=ImageTrainer,
        parser_class=Parser,
        auto_configure_optimizers=False,
        save_config_callback=None,
        trainer_defaults={
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            "max_epochs": 10,
        },
        parser_kwargs={
            "prog": "python -m train",
            "description": (
                "run DATA takes the recipe named for the data and does what fit does with it; audit DATA [--out DIR] "
                "looks for broken, duplicate and leaked images in the same split; find-lr DATA and find-batch-size DATA "
                "try some. The commands below are Lightning's, each with all its flags."
            ),
        },
    )


def main(argv: list[str] | None = None) -> int:
    """The exit status. An error is one line; with IMAGO_TRACEBACK=1 its traceback comes before it, as what looks like a
    wrong setting may be a defect of ours."""
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # torch's own use and Lightning's
    for message in (
        "Checkpoint directory .* exists and is not empty",  # our run's own files
        "The number of training batches .* is smaller than the logging interval",  # epochs are logged too
        "It is recommended to use `self.log.*sync_dist",  # what is logged is summed over all before
        "Grad strides do not match bucket view strides",
    ):
        warnings.filterwarnings("ignore", message=message)
    NOTICE.listen()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError, MisconfigurationException, Diverged, OutOfMemory) as error:
        if os.environ.get("IMAGO_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"train: {' '.join(str(error).split())}", file=sys.stderr)
        broken = isinstance(error, Diverged | OutOfMemory) or getattr(error, "errno", None) in DISK
        return FAILURE if broken else USAGE
    except RuntimeError:
        if (
            NOTICE.signum
        ):  # a notice to each process there is: the workers that decode were first to go
            return 128 + NOTICE.signum
        raise
    return 0
