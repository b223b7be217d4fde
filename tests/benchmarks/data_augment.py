"""Milliseconds that each augmentation takes for a batch of 512 images of 32x32x3, and how many times as fast that is as
torchvision's transforms on one image after the other.

    python tests/benchmarks/data_augment.py [--device cuda] [--threads 2]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import bare  # noqa: F401  (first: it puts the repository on the path)
import numpy as np
import torch

import models.networks  # noqa: F401  (before torchvision)
from models.image import InputSpec
from train.data import Augmentation
from train.data.augment import Augmenter

from torchvision.transforms import v2  # isort: skip

JITTER = {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.1}
CASES = {  # what is measured, and the per-image transforms of torchvision that do the same
    "flip": ({"flip": "random"}, [v2.RandomHorizontalFlip()]),
    "alternating flip": ({"flip": "alternating"}, [v2.RandomHorizontalFlip()]),
    "padded crop": ({"crop_padding": 4}, [v2.RandomCrop(32, 4, padding_mode="reflect")]),
    "rotation": ({"rotation": 15}, [v2.RandomRotation(15, v2.InterpolationMode.BILINEAR)]),
    "random-resized crop": (
        {"random_resized_crop": 0.35},
        [v2.RandomResizedCrop(32, (0.35, 1.0), antialias=False)],
    ),
    "random erasing": ({"erasing": 0.5}, [v2.RandomErasing(0.5)]),
    "colour jitter": (JITTER, [v2.ColorJitter(**JITTER)]),
    "flip, crop, erasing": (
        {"flip": "random", "crop_padding": 4, "erasing": 0.5},
        [
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(32, 4, padding_mode="reflect"),
            v2.RandomErasing(0.5),
        ],
    ),
    "cutout": ({"cutout": 8}, None),
    "mixup": ({"mixup": 0.2}, None),
    "cutmix": ({"cutmix": 1.0}, None),
}


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int = 30) -> float:
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pixels = torch.randint(0, 256, (512, 32, 32, 3), dtype=torch.uint8, device=options.device)
    images, labels = pixels.permute(0, 3, 1, 2), torch.randint(0, 10, (512,), device=options.device)
    rows = torch.arange(512, device=options.device)
    spec = InputSpec(height=32, width=32)
    single = [image.contiguous() for image in images.cpu()]
    print(f"{options.device}, {options.threads} threads")
    print(f"{'':24}{'ms':>8}  times as fast as torchvision, image by image")
    for name, (chosen, transforms) in CASES.items():
        augment = Augmenter(Augmentation(**chosen), spec, [128.0] * 3, 10, 512, 0)
        spent = milliseconds(partial(run, augment, images, labels, rows), options.device)
        ratio = ""
        if transforms:
            each = v2.Compose(transforms)
            ratio = f"{milliseconds(lambda: [each(image) for image in single], options.device, 5) / spent:8.0f}"  # noqa: B023
        print(f"{name:24}{spent:8.2f}{ratio}")


def run(augment: Augmenter, images: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> None:
    augment(images, labels, rows, 0, np.random.default_rng(0))


if __name__ == "__main__":
    main()
