"""Runs a recipe over several seeds.

    python tests/benchmarks/train_recipes.py digits
    python tests/benchmarks/train_recipes.py cifar10-94 [--data DIR] [--root DIR] [--seeds 5] [--twin] [--keep] [flag …]

Prints one JSON line a seed; --keep writes what came out into train_recipes.json beside this script as well.
--twin also trains a bare PyTorch loop by the same recipe afterwards, to compare the wall time with; it refuses recipes
with options that the loop has not. Seconds are those of training, validation included; all up to the end of the first
step (data, set-up, compiling) is counted apart, for the twin as well. Processor seconds tell more than wall time where
a machine is shared. The peak of memory is that of all seeds up to then, and of their twins.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Any

import bare  # first: it puts the repository on the path
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from models import networks
from train.cli import main
from train.learning.optimizers import build_optimizer
from train.learning.system import PREPARE_IMAGES

clocks: list["Clock"] = []


class Clock(Callback):
    """Times the run from the end of its first step."""

    def __init__(self):
        self.pace: bare.Pace | None = None
        clocks.append(self)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.pace is None:
            self.pace = bare.Pace(pl_module.device)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pace.stop()


class Mirrored(Callback):
    """Ends the program before the first step of a recipe that `twin` would not follow."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        averages, stops = (
            next(c for c in trainer.callbacks if isinstance(c, kind))
            for kind in (main.WeightAverage, main.EarlyStopping)
        )
        asked = {
            "ema.decay": averages.decay,
            "early_stopping.patience": stops.patience < 10**9,
            "trainer.gradient_clip_val": trainer.gradient_clip_val,
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches > 1,
            "model.weigh_classes": pl_module.weigh_classes,
            "model.weights": pl_module.weights,
        }
        if names := ", ".join(name for name, value in asked.items() if value):
            sys.exit(
                f"train_recipes: --twin: the bare loop has no {names}; turn it off by a flag, or leave out --twin"
            )


def one(recipe: str, seed: int, asked: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """One run and its test; with --twin the bare loop after it."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as runs:
        words = [
            "run",
            asked.data or recipe_source(recipe),
            "--recipe",
            recipe,
            "--seed_everything",
            str(seed),
            "--name",
            "recipe",
            "--export.enabled",
            "false",
            "--trainer.default_root_dir",
            runs,
            "--trainer.callbacks+=train_recipes.Clock",
            *flags,
        ]
        if asked.twin:
            words.append("--trainer.callbacks+=train_recipes.Mirrored")
        found = main.run(words + (["--root", asked.root] if asked.root else []))
        pace = clocks[-1].pace
        total = time.perf_counter() - began
        kept = found.trainer.checkpoint_callback
        best = kept.best_model_path if kept.monitor else None
        tested = found.trainer.test(
            found.model, datamodule=found.datamodule, ckpt_path=best, verbose=False
        )[0]
    result = {
        "seed": seed,
        "accuracy": tested["test/accuracy"],
        "seconds": round(pace.seconds, 2),
        "cpu_seconds": round(pace.cpu_seconds, 1),
        "setup_seconds": round(total - pace.seconds, 2),
    }
    if "test_tta/accuracy" in tested:
        result["accuracy_tta"] = tested["test_tta/accuracy"]
    return result | (twin(found) if asked.twin else {})


def twin(found: main.CLI) -> dict[str, Any]:
    """The same recipe in a bare loop: its accuracy, and its seconds after set-up and compiling, which stand apart."""
    began = time.perf_counter()
    data, system, trainer = found.datamodule, found.model, found.trainer
    bf16 = trainer.precision == "bf16-mixed"
    loader = data.train_dataloader()
    network = networks.build(
        system.name, len(data.classes), data.input.channels, data.input.height, **system.options
    )
    if network.prepare:
        network.prepare(system.cpu().normalize(data.examples(PREPARE_IMAGES)))
    device = trainer.strategy.root_device
    system.to(device)
    network.to(device, memory_format=system.layout)
    if system.compile_mode != "off":
        network.compile(mode=system.compile_mode)
    optimizer = build_optimizer(network, system.optimizer)
    schedule = system.schedule.build_scheduler(optimizer, len(loader) * trainer.max_epochs)
    warm_up(network, next(iter(loader)), system, bf16)
    setup = time.perf_counter() - began
    whole = bare.Pace(device)
    for epoch in range(trainer.max_epochs):
        loader.sampler.set_epoch(epoch)
        bare.epoch(network, optimizer, schedule, loader, system, bf16)
    whole.stop()
    return {
        "twin_seconds": round(whole.seconds, 2),
        "twin_cpu_seconds": round(whole.cpu_seconds, 1),
        "twin_setup_seconds": round(setup, 2),
        "twin_accuracy": bare.accuracy(network, data.test_dataloader(), system, bf16),
    }


def warm_up(
    network: networks.Network, batch: tuple[torch.Tensor, torch.Tensor], system: Any, bf16: bool
) -> None:
    """Forward and backward once, so that compiling and the choice of kernels are not counted; changes no weight."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.autocast(system.device.type, torch.bfloat16, enabled=bf16):
        network(system.normalize(batch[0])).float().sum().backward()
    network.zero_grad()
    network.load_state_dict(state)


def recipe_source(recipe: str) -> str:
    import yaml

    return yaml.safe_load((main.RECIPES / f"{recipe}.yaml").read_text())["data"]["source"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--data", help="in place of the recipe's source")
    parser.add_argument("--root", help="where a data set of torchvision lies")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--twin", action="store_true")
    parser.add_argument(
        "--keep", action="store_true", help="write the results beside this script, too"
    )
    parser.add_argument(
        "--note", default="", help="kept beside the figures, e.g. what else the machine did"
    )
    asked, flags = parser.parse_known_args()
    sys.modules["train_recipes"] = sys.modules[
        "__main__"
    ]  # the command line imports the callback by this name
    runs: list[dict[str, Any]] = []
    for seed in range(asked.seeds):
        runs.append(one(asked.recipe, seed, asked, flags))
        print(json.dumps(runs[-1]), flush=True)
        result = summary(asked.recipe, flags, asked.note, runs)
        if asked.keep:  # after each seed: the next one may take hours
            bare.keep(__file__, result, ("recipe", "flags", "device"))
    print(
        f"{asked.recipe}: {result['mean_accuracy']:.4f} ± {result['sd'] or 0:.4f} over {len(runs)} seeds"
    )


def summary(recipe: str, flags: list[str], note: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs so far, and on what."""
    accuracies = [run["accuracy"] for run in runs]
    cuda = torch.cuda.is_available()
    return {
        "recipe": recipe,
        "flags": flags,
        "device": torch.cuda.get_device_name()
        if cuda
        else f"cpu, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "lightning")},
        "mean_accuracy": statistics.mean(accuracies),
        "sd": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "peak_memory_mb": round(
            (
                torch.cuda.max_memory_allocated()
                if cuda
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            )
            / 1e6
        ),
        "note": note,
        "runs": runs,
    }


if __name__ == "__main__":
    main()
