"""Images a second of `fit`, as a share of a bare PyTorch loop.

    python tests/benchmarks/train_speed.py [--case speednet] [--epochs 5] [--data DIR] [--keep]

Network, data and augmentation are the same in both. Before each epoch of the real command, with
progress bar, metrics, logger and checkpoints, the bare loop trains a copy of the network for an
epoch in the same process, so that both see the same machine. The result is the median of the
ratios. On a CPU that others use as well, the ratio by processor time (`cpu_ratio`) is more
reliable.

Prints one JSON line for each case: device, images/s of both, ratios, and the peak memory of the
command alone, in a separate process. --keep also writes them into train_speed.json in this
folder. The images are random, 32x32 in color, unless DIR is given. The case `fine-tune` is the
recipe for photographs, from pretrained weights at 224 pixels and with the average of the weights,
which the bare loop lacks; it takes about two minutes on two cores. With MALLOC_ARENA_MAX or a
similar variable in the environment, the memory settings of models.allocator stay
off; the difference is what they gain.
"""

import argparse
import copy
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bare  # first: it puts the repository on the path
import cv2
import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from results import spread, write_result

from train.cli import main
from train.learning.optimizers import build_optimizer

CLASSES = 10
SIDE = 32

AUGMENT = ["--data.augment.flip", "alternating", "--data.augment.crop_padding", "2"]
# The recipe's network, and how it is fed.
CASES = {
    "lenet": ["--recipe", "seeds/lenet-cifar10", "--data.batch_size", "32", *AUGMENT],
    "lenet-256": ["--recipe", "seeds/lenet-cifar10", "--data.batch_size", "256", *AUGMENT],
    "speednet": ["--recipe", "cifar10", "--data.batch_size", "500", *AUGMENT],
    "resnet18": [
        *["--recipe", "folder", "--data.size", "32"],
        *["--model.network", "resnet18", "--model.weights", "none"],
        *["--data.augment.random_resized_crop", "0", "--ema.decay", "0", *AUGMENT],
    ],
    "fine-tune": ["--recipe", "folder", "--fit.mode", "plain", "--audit.enabled", "false"],
}
RANDOM_IMAGES = 4000
FINE_TUNE_IMAGES = 320  # of them, 70 % are for training

# Of the epochs of the current case: the bare loop's and the command's.
epoch_pairs: list[tuple[bare.Stopwatch, bare.Stopwatch]] = []


class BareLoop(Callback):
    """Runs the bare loop before each epoch and times both."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.network = copy.deepcopy(pl_module.network)
        self.optimizer = build_optimizer(self.network, pl_module.optimizer)
        self.schedule = pl_module.schedule.build_scheduler(
            self.optimizer, int(trainer.estimated_stepping_batches)
        )
        self.loader = trainer.datamodule.train_dataloader()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.loader.sampler.set_epoch(trainer.current_epoch)
        self.bare_epoch = bare.train_epoch(
            self.network,
            self.optimizer,
            self.schedule,
            self.loader,
            pl_module,
            trainer.precision == "bf16-mixed",
        )
        self.stopwatch = bare.Stopwatch(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.stopwatch.images += len(batch[0])
        if trainer.is_last_batch:
            epoch_pairs.append((self.bare_epoch, self.stopwatch.stop()))


def write_random_images(root: Path, count: int) -> None:
    """Write a folder of ten classes of random images."""
    rng = np.random.default_rng(0)
    for i in range(count):
        class_directory = root / f"class{i % CLASSES}"
        class_directory.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        cv2.imwrite(str(class_directory / f"{i:05d}.jpg"), pixels)


def fit(case: str, data: str, epochs: int, *flags: str) -> None:
    """Run the real command."""
    with tempfile.TemporaryDirectory() as runs:
        main.run(
            [
                *["run", data, *CASES[case]],
                *["--name", "speed", "--export.enabled", "false"],
                *["--trainer.default_root_dir", runs, "--trainer.max_epochs", str(epochs)],
                *flags,
            ]
        )


def measure_memory(case: str, data: str, threads: int) -> int:
    """Return the peak memory of the command in MB. Needs a process that has run nothing else."""
    torch.set_num_threads(threads)
    fit(case, data, 2, "--progress.quiet", "true")
    return bare.peak_memory_mb()


def measure(case: str, data: str, epochs: int) -> dict[str, Any]:
    """Run one case; its first epoch is a warm-up."""
    epoch_pairs.clear()
    fit(case, data, epochs + 1, "--trainer.callbacks+=train_speed.BareLoop")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        memory = executor.submit(measure_memory, case, data, torch.get_num_threads()).result()

    bare_speeds: list[float] = []
    fit_speeds: list[float] = []
    ratios: list[float] = []
    cpu_ratios: list[float] = []
    for bare_epoch, fit_epoch in epoch_pairs[1:]:
        bare_speeds.append(bare_epoch.images_per_second)
        fit_speeds.append(fit_epoch.images_per_second)
        ratios.append(fit_epoch.images_per_second / bare_epoch.images_per_second)
        cpu_ratios.append(fit_epoch.images_per_cpu_second / bare_epoch.images_per_cpu_second)

    return {
        "case": case,
        "device": bare.describe_device(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "epochs": len(ratios),
        "bare_images_per_s": round(statistics.median(bare_speeds), 1),
        "fit_images_per_s": round(statistics.median(fit_speeds), 1),
        "spread": {"ratio": spread(ratios), "cpu_ratio": spread(cpu_ratios)},
        "ratio": round(statistics.median(ratios), 3),
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
        "peak_memory_mb": memory,
    }


def run_benchmark() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument(
        "--images",
        type=int,
        help=f"random images; default: {RANDOM_IMAGES}, for fine-tune {FINE_TUNE_IMAGES}",
    )
    parser.add_argument("--data", help="a folder of class folders instead of random images")
    parser.add_argument("--keep", action="store_true", help="write the results to a file as well")
    options = parser.parse_args()

    # The command line imports the callback under this name.
    sys.modules["train_speed"] = sys.modules["__main__"]
    for case in options.case or CASES:
        with tempfile.TemporaryDirectory() as random_images:
            data = options.data or random_images
            if not options.data:
                default = FINE_TUNE_IMAGES if case == "fine-tune" else RANDOM_IMAGES
                write_random_images(Path(random_images), options.images or default)
            result = measure(case, data, options.epochs)
        print(json.dumps(result), flush=True)
        if options.keep:
            write_result(__file__, result, ("case", "device"))


if __name__ == "__main__":
    run_benchmark()
