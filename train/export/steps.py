"""The steps after the fit: their times, and a line and a bar for each of them on stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from train.data import ImageData
from train.export.config import ExportConfig
from train.learning.fit_config import MIXED_SHARES
from train.runs.progress_bar import ProgressBar, TimeLeftColumn, format_seconds

Advance = Callable[[int], None]
"""Reports that a step has processed this many more images."""

# Seconds of a step that do not depend on the number of images.
FIXED_SECONDS = {
    "test": 1.0,
    "calibrate": 1.0,
    "export": 5.0,
    "quantize": 4.0,
    "certify": 6.0,
    "gate": 2.0,
    "report": 2.0,
}
CERTIFIED_IMAGES = 300  # through both variants, in batches of several sizes
CPU_SLOWDOWN = 20  # of onnxruntime on the CPU, compared with a GPU


def ignore_progress(images: int) -> None:
    """Report to no one."""


def estimate_export_seconds(
    data: ImageData, config: ExportConfig, device: torch.device, seconds_per_image: float
) -> float:
    """Return a rough estimate of the time that all steps take; see `_estimate_seconds`."""
    return sum(_estimate_seconds(data, config, device, seconds_per_image).values())


def _estimate_seconds(
    data: ImageData,
    config: ExportConfig,
    device: torch.device,
    seconds_per_image: float,
    is_compared: bool = True,
) -> dict[str, float]:
    """Return a rough estimate of the seconds of each step, in their order.

    `is_compared`: whether there is a version to compare with.
    `seconds_per_image`: of an evaluation on `device`, on which the network is tested; the other
    steps run on the CPU.
    """
    cpu_slowdown = 1 if device.type == "cpu" else CPU_SLOWDOWN
    image_units = {
        "test": _count_images(data, config)["test"],
        "quantize": _count_images(data, config)["quantize"] + 2 * config.quantize.images,
        "certify": CERTIFIED_IMAGES,
        "gate": 2 * _count_images(data, config)["gate"],
    }
    skipped: set[str] = set()
    if not config.quantize.enabled:
        skipped.add("quantize")
    if not is_compared:
        skipped.add("gate")
    if not config.report:
        skipped.add("report")

    estimate: dict[str, float] = {}
    for step, seconds in FIXED_SECONDS.items():
        if step not in skipped:
            slowdown = 1 if step == "test" else cpu_slowdown
            estimate[step] = seconds + image_units.get(step, 0) * seconds_per_image * slowdown
    return estimate


def _count_images(data: ImageData, config: ExportConfig) -> dict[str, int]:
    """Return the images of the steps that report how many they have processed."""
    val_images = min(config.quantize.gate_images, data.counts["val"])
    test_images = min(config.quantize.gate_images, data.counts["test"])
    # With a probe, several networks are compared on the validation part.
    candidates = 0 if data.embeddings is None else len(MIXED_SHARES)
    return {
        "test": (1 + candidates) * data.counts["val"] + data.counts["test"],
        "quantize": 2 * val_images + test_images,  # for its accuracy, and for the calibration
        "gate": min(config.gate.images or data.counts["test"], data.counts["test"]),
    }


class ExportSteps:
    """Times the steps, prints a line when a step begins, and draws a bar while it runs.

    Where the output is not a terminal, it prints only the lines.
    """

    def __init__(
        self,
        progress: ProgressBar,
        data: ImageData,
        config: ExportConfig,
        device: torch.device,
        is_compared: bool,
    ):
        """`progress`: that of the fit, which knows the speed; `device`: that of the fit.

        `is_compared`: whether there is a version to compare with.
        """
        self.is_compared = is_compared
        self.seconds: dict[str, float] = {}
        self._console = progress.console
        self._images = _count_images(data, config)
        self._estimate = partial(_estimate_seconds, data, config, device, is_compared=is_compared)
        self._expected = self._estimate(progress.seconds_per_image)

    def add(self, step: str, seconds: float) -> None:
        """Record a step that was timed elsewhere."""
        self.seconds[step] = round(seconds, 3)

    @contextmanager
    def measure(self, step: str) -> Iterator[Advance]:
        """Show and time a step. Yields a function to call with the number of processed images."""
        started = time.monotonic()
        steps = list(self._expected)
        number = steps.index(step) + 1
        later_seconds = sum(self._expected[name] for name in steps[number:])

        def estimate_seconds_left() -> float:
            elapsed = time.monotonic() - started
            return max(0.0, self._expected[step] - elapsed) + later_seconds

        title = f"step {number}/{len(steps)}  {step}"
        left = format_seconds(estimate_seconds_left())
        self._console.print(f"{title}  left {left}", soft_wrap=True)
        with Progress(
            TextColumn(title),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeLeftColumn(estimate_seconds_left),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        ) as bar:
            task = bar.add_task(step, total=self._images.get(step))
            yield partial(bar.advance, task)

        self.add(step, time.monotonic() - started)
        if step == "test":
            seconds_per_image = self.seconds[step] / self._images[step]
            self._expected = self._estimate(seconds_per_image)
