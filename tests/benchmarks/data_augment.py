"""Time of each augmentation, compared with torchvision's transforms on one image at a time.

    python tests/benchmarks/data_augment.py [--device cuda] [--threads 2]

Prints milliseconds for a batch of 512 images of 32x32x3, and how many times as fast that is.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bare  # noqa: F401  (first: it puts the repository on the path)
import numpy as np
import torch

import models.networks  # noqa: F401  (before torchvision)
from models.image import InputSpec
from train.data import Augmentation
from train.data.augment import Augmenter

from torchvision.transforms import v2  # isort: skip

BATCH_SIZE = 512
SIDE = 32
CLASSES = 10
WARM_UP_REPEATS = 3
REPEATS = 30
TORCHVISION_REPEATS = 5

Settings = dict[str, Any]  # of Augmentation
Transforms = list[v2.Transform]  # the per-image transforms of torchvision that do the same

JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
CASES: dict[str, tuple[Settings, Transforms]] = {
    "flip": ({"flip": "random"}, [v2.RandomHorizontalFlip()]),
    "alternating flip": ({"flip": "alternating"}, [v2.RandomHorizontalFlip()]),
    "padded crop": ({"crop_padding": 4}, [v2.RandomCrop(SIDE, 4, padding_mode="reflect")]),
    "rotation": ({"rotation": 15}, [v2.RandomRotation(15, v2.InterpolationMode.BILINEAR)]),
    "random-resized crop": (
        {"random_resized_crop": 0.35},
        [v2.RandomResizedCrop(SIDE, (0.35, 1.0), antialias=False)],
    ),
    "random erasing": ({"erasing": 0.5}, [v2.RandomErasing(0.5)]),
    "colour jitter": (JITTER, [v2.ColorJitter(**JITTER)]),
    "flip, crop, erasing": (
        {"flip": "random", "crop_padding": 4, "erasing": 0.5},
        [
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(SIDE, 4, padding_mode="reflect"),
            v2.RandomErasing(0.5),
        ],
    ),
    "cutout": ({"cutout": 8}, []),
    "mixup": ({"mixup": 0.2}, []),
    "cutmix": ({"cutmix": 1.0}, []),
}


def measure_ms(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the median milliseconds of a call, after some to warm up."""
    times: list[float] = []
    for _ in range(repeats + WARM_UP_REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[WARM_UP_REPEATS:])


def augment_batch(
    augment: Augmenter, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor
) -> None:
    augment(images, labels, rows, 0, np.random.default_rng(0))


def transform_each(transform: v2.Compose, images: list[torch.Tensor]) -> None:
    for image in images:
        transform(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    device = options.device
    torch.set_num_threads(options.threads)

    shape = (BATCH_SIZE, SIDE, SIDE, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    images = pixels.permute(0, 3, 1, 2)
    labels = torch.randint(0, CLASSES, (BATCH_SIZE,), device=device)
    rows = torch.arange(BATCH_SIZE, device=device)
    single_images = [image.contiguous() for image in images.cpu()]
    spec = InputSpec(height=SIDE, width=SIDE)

    print(f"{device}, {options.threads} threads")
    print(f"{'':24}{'ms':>8}  times as fast as torchvision, image by image")
    for name, (settings, transforms) in CASES.items():
        augment = Augmenter(Augmentation(**settings), spec, [128.0] * 3, CLASSES, BATCH_SIZE, 0)
        batch_ms = measure_ms(partial(augment_batch, augment, images, labels, rows), device)
        ratio = ""
        if transforms:
            work = partial(transform_each, v2.Compose(transforms), single_images)
            ratio = f"{measure_ms(work, device, TORCHVISION_REPEATS) / batch_ms:8.0f}"
        print(f"{name:24}{batch_ms:8.2f}{ratio}")


if __name__ == "__main__":
    main()
