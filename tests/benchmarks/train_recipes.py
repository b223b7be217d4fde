"""Accuracy and time of a recipe over several seeds.

    python tests/benchmarks/train_recipes.py digits
    python tests/benchmarks/train_recipes.py cifar10-94 [--data DIR] [--root DIR] [--seeds 5]
        [--bare] [--keep] [flag …]

Prints one JSON line for each seed; --keep also writes the results into train_recipes.json in this
folder. --bare also trains a bare PyTorch loop with the same recipe, to compare the time with. It
refuses recipes with options that the loop does not have.

Seconds are those of training and validation. Everything up to the end of the first step (data,
set-up, compiling) counts as set-up, for the bare loop too. Where a machine is shared, processor
seconds are more reliable than wall time. The peak memory is that of all runs so far.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

import bare  # first: it puts the repository on the path
import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from results import write_result

from models import networks
from train.cli import main
from train.cli.command_line import CommandLine
from train.cli.recipes import RECIPES
from train.learning.ema import WeightAverage
from train.learning.optimizers import build_optimizer
from train.learning.system import PREPARE_IMAGES
from train.runs.early_stopping import EarlyStopping

Result = dict[str, Any]

timers: list["TrainingTimer"] = []  # of all runs so far


class TrainingTimer(Callback):
    """Times a run from the end of its first step."""

    def __init__(self) -> None:
        self.stopwatch: bare.Stopwatch | None = None
        timers.append(self)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.stopwatch is None:
            self.stopwatch = bare.Stopwatch(pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stopwatch.stop()


class BareLoopCheck(Callback):
    """Ends the program before the first step of a recipe that the bare loop can't follow."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        average = find_callback(trainer, WeightAverage)
        early_stopping = find_callback(trainer, EarlyStopping)
        is_used = {
            "ema.decay": average.decay > 0,
            "early_stopping.patience": early_stopping.patience < 10**9,
            "trainer.gradient_clip_val": bool(trainer.gradient_clip_val),
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches > 1,
            "model.weigh_classes": pl_module.class_weights is not None,
            "model.weights": bool(pl_module.weights),
        }
        names = [name for name, used in is_used.items() if used]
        if names:
            sys.exit(
                f"train_recipes: --bare: the bare loop has no {', '.join(names)}; turn it off by a "
                "flag, or omit --bare"
            )


def find_callback(trainer: L.Trainer, kind: type[Callback]) -> Any:
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def measure_seed(recipe: str, seed: int, options: argparse.Namespace, flags: list[str]) -> Result:
    """Train and test a recipe with one seed; with --bare the bare loop too."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as runs:
        arguments = [
            *["run", options.data or read_source(recipe), "--recipe", recipe],
            *["--seed_everything", str(seed), "--name", "recipe", "--export.enabled", "false"],
            *["--trainer.default_root_dir", runs],
            "--trainer.callbacks+=train_recipes.TrainingTimer",
            *flags,
        ]
        if options.bare:
            arguments.append("--trainer.callbacks+=train_recipes.BareLoopCheck")
        if options.root:
            arguments += ["--root", options.root]
        cli = main.run(arguments)
        stopwatch = timers[-1].stopwatch
        total_seconds = time.perf_counter() - started

        checkpoint = cli.trainer.checkpoint_callback
        best_path = checkpoint.best_model_path if checkpoint.monitor else None
        tested = cli.trainer.test(
            cli.model, datamodule=cli.datamodule, ckpt_path=best_path, verbose=False
        )[0]

    result = {
        "seed": seed,
        "accuracy": tested["test/accuracy"],
        "seconds": round(stopwatch.seconds, 2),
        "cpu_seconds": round(stopwatch.cpu_seconds, 1),
        "setup_seconds": round(total_seconds - stopwatch.seconds, 2),
    }
    if "test_tta/accuracy" in tested:
        result["accuracy_tta"] = tested["test_tta/accuracy"]
    if options.bare:
        result |= measure_bare_loop(cli)
    return result


def measure_bare_loop(cli: CommandLine) -> Result:
    """Train the same recipe in a bare loop and test it."""
    started = time.perf_counter()
    data = cli.datamodule
    system = cli.model
    trainer = cli.trainer
    bf16 = trainer.precision == "bf16-mixed"
    device = trainer.strategy.root_device
    loader = data.train_dataloader()

    network = networks.build(
        system.name, len(data.classes), data.input.channels, data.input.height, **system.options
    )
    if network.prepare:
        network.prepare(system.cpu().normalize(data.training_images(PREPARE_IMAGES)))
    system.to(device)
    network.to(device, memory_format=system.layout)
    if system.compile_mode != "off":
        network.compile(mode=system.compile_mode)
    optimizer = build_optimizer(network, system.optimizer)
    steps = len(loader) * trainer.max_epochs
    schedule = system.schedule.build_scheduler(optimizer, steps)
    warm_up(network, next(iter(loader)), system, bf16)
    setup_seconds = time.perf_counter() - started

    stopwatch = bare.Stopwatch(device)
    for epoch in range(trainer.max_epochs):
        loader.sampler.set_epoch(epoch)
        bare.train_epoch(network, optimizer, schedule, loader, system, bf16)
    stopwatch.stop()
    accuracy = bare.measure_accuracy(network, data.test_dataloader(), system, bf16)
    return {
        "bare_seconds": round(stopwatch.seconds, 2),
        "bare_cpu_seconds": round(stopwatch.cpu_seconds, 1),
        "bare_setup_seconds": round(setup_seconds, 2),
        "bare_accuracy": accuracy,
    }


def warm_up(
    network: networks.Network, batch: tuple[torch.Tensor, torch.Tensor], system: Any, bf16: bool
) -> None:
    """Run one step that changes no weight, so that compiling and kernel selection are not timed."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.autocast(system.device.type, torch.bfloat16, enabled=bf16):
        network(system.normalize(batch[0])).float().sum().backward()
    network.zero_grad()
    network.load_state_dict(state)


def read_source(recipe: str) -> str:
    """Return the data source of a recipe."""
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    return settings["data"]["source"]


def summarize(recipe: str, flags: list[str], note: str, runs: list[Result]) -> Result:
    """Return the runs so far with their mean, the device and the versions."""
    accuracies = [run["accuracy"] for run in runs]
    versions = {"python": platform.python_version()}
    for package in ("torch", "lightning"):
        versions[package] = version(package)
    return {
        "recipe": recipe,
        "flags": flags,
        "device": bare.describe_device(),
        "versions": versions,
        "mean_accuracy": statistics.mean(accuracies),
        "sd": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "peak_memory_mb": bare.peak_memory_mb(),
        "note": note,
        "runs": runs,
    }


def run_benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--data", help="data instead of the recipe's source")
    parser.add_argument("--root", help="directory of a torchvision data set")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bare", action="store_true", help="also train a bare PyTorch loop")
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    parser.add_argument("--note", default="", help="kept with the results, e.g. other load")
    options, flags = parser.parse_known_args()

    # The command line imports the callbacks under this name.
    sys.modules["train_recipes"] = sys.modules["__main__"]
    runs: list[Result] = []
    for seed in range(options.seeds):
        runs.append(measure_seed(options.recipe, seed, options, flags))
        print(json.dumps(runs[-1]), flush=True)
        summary = summarize(options.recipe, flags, options.note, runs)
        if options.keep:  # after each seed, as the next one may take hours
            write_result(__file__, summary, ("recipe", "flags", "device"))
    print(
        f"{options.recipe}: {summary['mean_accuracy']:.4f} ± {summary['sd'] or 0:.4f} "
        f"over {len(runs)} seeds"
    )


if __name__ == "__main__":
    run_benchmark()
