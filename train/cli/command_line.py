"""The command line of fit, validate, test and predict: parsing, and building of the objects.

LightningCLI, of lightning 2.6, adds the arguments of the trainer, the system, the data module and
the callbacks, reads recipes and creates the objects. `CommandLine` runs nothing: run.py and the
other modules of the commands call the steps in their order.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from train.cli.recipes import UsageError, default_model_name
from train.cli.run import TrainingJob
from train.cli.validate_config import validate_config
from train.data import ImageData
from train.data.sources.several import hide_all_secrets
from train.export.config import ExportConfig
from train.export.embedder import embed_data
from train.failures import EXIT_STATUS_HELP
from train.learning.ema import WeightAverage
from train.learning.fit_config import FIT_MODE_HELP, TIME_BUDGET_HELP, FitConfig, FitMode
from train.learning.lightning_speed import NoProfiler
from train.learning.precision import Precision, PrecisionNotice, choose_precision
from train.learning.system import Classifier
from train.runs.checkpoints import AtomicCheckpointIO
from train.runs.data_audit import Audit
from train.runs.distributed import follow_launcher, take_over_signals
from train.runs.early_stopping import EarlyStopping
from train.runs.history import History
from train.runs.model_checkpoint import ModelCheckpoint
from train.runs.monitor import Monitor
from train.runs.progress_bar import ProgressBar
from train.runs.resume import ResumeCheckpoint
from train.runs.sample_predictions import SamplePredictions
from train.runs.trainer import ImageTrainer

RUNS = Path("artifacts/runs")
DESCRIPTION = (
    "run DATA trains with the recipe named like the data, as fit does, and publishes a bundle. "
    "audit DATA [--out DIR] reports broken, duplicate, leaked and mislabelled images; with "
    "--serve [--port 8010] its page saves corrections beside the data. find-lr DATA and "
    "find-batch-size DATA suggest a learning rate and a batch size. launch runs several processes, "
    "as torchrun does. The commands below are Lightning's, each with all flags."
)
PARSER_SETTINGS: dict[str, Any] = {
    "prog": "python -m train",
    "description": f"{DESCRIPTION} {EXIT_STATUS_HELP}",
}
COMMAND_DESCRIPTIONS = {
    "fit": "Train a model and publish it as a bundle; resume an interrupted run. "
    + EXIT_STATUS_HELP,
    "validate": "Evaluate a checkpoint on the validation part.",
    "test": "Evaluate a checkpoint on the test part.",
    "predict": "Print a checkpoint's predictions for the test part as CSV.",
}


class CommandLineParser(LightningArgumentParser):
    """Raises errors in the arguments as one line, instead of printing the usage and exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise UsageError, with the message in one line."""
        raise UsageError(" ".join(str(message).split())) from ex


class CommandLine(LightningCLI):
    """Parses the arguments of one command and builds its trainer, system and data module."""

    trainer: ImageTrainer
    model: Classifier
    datamodule: ImageData
    subcommand: str

    def __init__(self, arguments: list[str]):
        """`arguments`: the command, one of fit, validate, test and predict, and its flags.

        Raises UsageError, ValueError or OSError with a one-line message for what the user can
        correct.
        """
        self._started = time.monotonic()
        self._arguments = [_expand_time_budget(argument) for argument in arguments]
        parser_settings = dict(PARSER_SETTINGS)
        for name in self.subcommands():
            parser_settings[name] = {"description": COMMAND_DESCRIPTIONS[name]}

        super().__init__(
            Classifier,
            ImageData,
            args=self._arguments,
            trainer_class=ImageTrainer,
            parser_class=CommandLineParser,
            auto_configure_optimizers=False,
            save_config_callback=None,
            trainer_defaults={
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                "max_epochs": 10,
            },
            parser_kwargs=parser_settings,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning
        """Return the commands to add to the parser: the one that is given, or all for --help.

        The arguments of one command take about as long to add as an import of torch.
        """
        commands = LightningCLI.subcommands()
        given = [word for word in self._arguments[:1] if word in commands]
        return {name: commands[name] for name in given or commands}

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing. Lightning 2.6 calls this private method at the end of its constructor."""

    @property
    def settings(self) -> Namespace:
        """The settings of the command, with objects in place of the sections that describe one."""
        settings: Namespace = self.config_init[self.subcommand]
        return settings

    # Arguments

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="seed of weights, split, batch order and augmentation",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what Lightning lacks: store, name, loggers, export and callbacks."""
        parser.add_argument(
            "--store",
            default="artifacts/store",
            help="store of the bundle: a directory or an object-store URL",
        )
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="name of the model in the store; by default that of the data",
        )
        parser.add_argument(
            "--logger",
            default="tensorboard",
            help="tensorboard, csv, wandb, mlflow or none; several are separated by commas",
        )
        parser.add_argument(
            "--fresh",
            action="store_true",
            help="start a new run where an unfinished one could be resumed",
        )
        # Not as the group of a class: Lightning has a group of this name in the command fit.
        parser.add_argument("--fit.mode", type=FitMode, default="plain", help=FIT_MODE_HELP)
        parser.add_argument(
            "--fit.time_budget", type=str | None, default=None, help=TIME_BUDGET_HELP
        )
        parser.add_class_arguments(ExportConfig, "export")
        self._add_callbacks(parser)
        parser.link_arguments("seed_everything", "data.seed")

    def _add_callbacks(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks in the order in which Lightning calls them."""
        parser.add_lightning_class_args(ProgressBar, "progress")
        parser.add_lightning_class_args(SamplePredictions, "samples")
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        # After SamplePredictions, which needs the averaged weights at the end of a validation.
        parser.add_lightning_class_args(WeightAverage, "ema")
        parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
        parser.add_lightning_class_args(History, "history")
        parser.add_lightning_class_args(Audit, "audit")
        parser.add_lightning_class_args(Monitor, "monitor")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ResumeCheckpoint, "resume")
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
        """Parse and check the settings."""
        # Lightning declares more types of `args` than the list that the constructor passes.
        self.config = parser.parse_args(args)
        config = self.config[self.config.subcommand]
        validate_config(self.config.subcommand, config)
        if config.weights_only is None:
            # By default, Lightning would load a checkpoint with pickle, which runs its code.
            config.weights_only = True

    # Objects

    def before_instantiate_classes(self) -> None:
        """Fill in the settings that follow from the machine, the launcher and the data."""
        config = self.config[self.subcommand]
        self.model_name = config.name or default_model_name(config.data.source)

        if config.trainer.logger is None:
            # `--logger` names the loggers, and the directory of the run is not known yet.
            config.trainer.logger = False
        if config.trainer.enable_progress_bar is False:
            # Lightning refuses False where a progress bar is among the callbacks.
            config.trainer.enable_progress_bar = None
            config.progress.quiet = True
        follow_launcher(config.trainer)

        self.requested_precision: Precision = config.trainer.precision
        precision = choose_precision(self.requested_precision, config.trainer.accelerator)
        config.trainer.precision = precision
        if precision != self.requested_precision:
            notice = PrecisionNotice(self.requested_precision, precision)
            self.trainer_defaults["callbacks"] = [notice]

    def instantiate_trainer(self, **kwargs: Any) -> ImageTrainer:
        """Build the trainer, with atomic checkpoints and preemption.py's signal handling."""
        settings = self.settings.trainer
        trainer = super().instantiate_trainer(
            plugins=_add_checkpoint_io(settings.plugins),
            profiler=settings.profiler or NoProfiler(),
            **kwargs,
        )
        assert isinstance(trainer, ImageTrainer)  # the constructor names the class
        take_over_signals(trainer)
        return trainer

    def find_weights(self) -> None:
        """Find the weights to start from, and prepare the data as theirs was prepared."""
        self.datamodule.use_preprocessing(self.model.find_weights(self.settings.store))

    def embedder(self) -> Callable[[], None] | None:
        """Return a function that embeds the data; None where the fit would have no probe."""
        if not self._fit_config().uses_probe(bool(self.model.weights)):
            return None

        def embed() -> None:
            self.model.build_network(self.trainer, self.datamodule)
            embed_data(self.model, self.datamodule, self.trainer.strategy.root_device)

        return embed

    def _fit_config(self) -> FitConfig:
        return FitConfig(self.settings.fit.mode, self.settings.fit.time_budget)

    def training_job(self) -> TrainingJob:
        """Return what `run_training` needs."""
        settings = self.settings
        recipe = self._plain_settings()
        return TrainingJob(
            trainer=self.trainer,
            system=self.model,
            data=self.datamodule,
            name=self.model_name,
            store=settings.store,
            runs=Path(settings.trainer.default_root_dir or RUNS),
            is_fresh=settings.fresh,
            loggers=settings.logger,
            start_checkpoint=settings.ckpt_path,
            weights_only=settings.weights_only,
            started=self._started,
            fit=self._fit_config(),
            audit=settings.audit,
            history=settings.history,
            monitor=settings.monitor,
            progress=settings.progress,
            model_checkpoint=settings.checkpoint,
            resume_checkpoint=settings.resume,
            export=settings.export,
            recipe=recipe,
            requested_recipe=self._requested_recipe(recipe),
        )

    def _plain_settings(self) -> dict[str, Any]:
        """Return all settings as plain values, as the manifest records them, without secrets."""
        text = self.parser.dump(self.config, skip_none=False, format="yaml")
        settings: dict[str, Any] = yaml.safe_load(text)[self.subcommand]
        settings["data"]["source"] = hide_all_secrets(settings["data"]["source"])
        return settings

    def _requested_recipe(self, recipe: dict[str, Any]) -> dict[str, Any]:
        """Return the recipe with the requested precision, as a run directory records it.

        Another node may resume the run and compute in another precision.
        """
        trainer = {**recipe["trainer"], "precision": self.requested_precision}
        return {**recipe, "trainer": trainer}


def _expand_time_budget(argument: str) -> str:
    """Return the whole name of the flag --time-budget; any other argument as it is."""
    flag, equals, value = argument.partition("=")
    return f"--fit.time_budget{equals}{value}" if flag == "--time-budget" else argument


def _add_checkpoint_io(plugins: Any) -> list[Any]:
    """Return the trainer's plugins with one that writes checkpoints atomically."""
    if plugins is None:
        plugins = []
    if not isinstance(plugins, list):
        plugins = [plugins]
    if any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        return plugins
    return [*plugins, AtomicCheckpointIO()]
