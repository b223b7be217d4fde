"""Images a second of `fit`, as a share of a bare PyTorch loop over the same network, data and augmentation.

    python tests/benchmarks/train_speed.py [--case speednet] [--epochs 5] [--data DIR] [--keep]

Before each epoch of the real command (progress, metrics, logger, checkpoints and all), the bare loop trains a twin of
the network for an epoch in the same process, so both see the same machine. The median of the ratios counts. On a CPU
that others use as well, the ratio by processor time (`cpu_ratio`) is the better witness. Prints one JSON line a case:
device, images/s of both, ratios, and the peak memory of the command alone, in a process of its own. --keep writes them
into train_speed.json beside this script as well. The data is made up, 32x32 in colour, unless DIR is given.
With MALLOC_ARENA_MAX or its like in the environment the C library is left as it is: that shows what train.learning.lightning_speed gains.
"""

import argparse
import copy
import json
import multiprocessing
import platform
import resource
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

from train.cli import main
from train.learning.optimizers import build_optimizer

AUGMENT = ["--data.augment.flip", "alternating", "--data.augment.crop_padding", "2"]
CASES = {  # the recipe's network and how it is fed
    "lenet": ["--recipe", "seeds/lenet-cifar10", "--data.batch_size", "32"],
    "lenet-256": ["--recipe", "seeds/lenet-cifar10", "--data.batch_size", "256"],
    "speednet": ["--recipe", "cifar10", "--data.batch_size", "500"],
    "resnet18": [
        "--recipe",
        "folder",
        "--data.size",
        "32",
        "--data.augment.random_resized_crop",
        "0",
        "--ema.decay",
        "0",
    ],
}
pairs: list[tuple[bare.Pace, bare.Pace]] = []  # bare, fit


class Twin(Callback):
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
        self.bare = bare.epoch(
            self.network,
            self.optimizer,
            self.schedule,
            self.loader,
            pl_module,
            trainer.precision == "bf16-mixed",
        )
        self.pace = bare.Pace(pl_module.device)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.pace.images += len(batch[0])
        if trainer.is_last_batch:
            pairs.append((self.bare, self.pace.stop()))


def make(root: Path, count: int) -> None:
    """A folder of ten classes of random 32x32 pictures."""
    rng = np.random.default_rng(0)
    for i in range(count):
        place = root / f"class{i % 10}"
        place.mkdir(exist_ok=True)
        cv2.imwrite(str(place / f"{i:05d}.jpg"), rng.integers(0, 256, (32, 32, 3), np.uint8))


def fit(case: str, data: str, epochs: int, *flags: str) -> None:
    with tempfile.TemporaryDirectory() as runs:
        main.run(
            [
                "run",
                data,
                *CASES[case],
                *AUGMENT,
                "--name",
                "speed",
                "--export.enabled",
                "false",
                "--trainer.default_root_dir",
                runs,
                "--trainer.max_epochs",
                str(epochs),
                *flags,
            ]
        )


def peak(case: str, data: str, threads: int) -> int:
    """Megabytes at most, of the GPU or else of this process, which must be a fresh one: no twin, no other case."""
    torch.set_num_threads(threads)
    fit(case, data, 2, "--progress.quiet", "true")
    return round(
        (
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        / 1e6
    )


def measure(case: str, data: str, epochs: int) -> dict[str, Any]:
    pairs.clear()
    fit(case, data, epochs + 1, "--trainer.callbacks+=train_speed.Twin")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        memory = fresh.submit(peak, case, data, torch.get_num_threads()).result()
    kept = pairs[1:]  # the first epoch warms up
    cuda = torch.cuda.is_available()
    return {
        "case": case,
        "device": torch.cuda.get_device_name()
        if cuda
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "epochs": len(kept),
        "bare_images_per_s": round(statistics.median(loop.wall for loop, _ in kept), 1),
        "fit_images_per_s": round(statistics.median(ours.wall for _, ours in kept), 1),
        "ratio": round(statistics.median(ours.wall / loop.wall for loop, ours in kept), 3),
        "cpu_ratio": round(statistics.median(ours.cpu / loop.cpu for loop, ours in kept), 3),
        "peak_memory_mb": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--data", help="a folder of class folders")
    parser.add_argument(
        "--keep", action="store_true", help="write the results beside this script, too"
    )
    asked = parser.parse_args()
    sys.modules["train_speed"] = sys.modules[
        "__main__"
    ]  # the command line imports the callback by this name
    with tempfile.TemporaryDirectory() as made:
        if not asked.data:
            make(Path(made), asked.images)
        for case in asked.case or CASES:
            result = measure(case, asked.data or made, asked.epochs)
            print(json.dumps(result), flush=True)
            if asked.keep:
                bare.keep(__file__, result, ("case", "device"))


if __name__ == "__main__":
    main()
