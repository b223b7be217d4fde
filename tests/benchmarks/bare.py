"""A bare PyTorch loop to compare Lightning's with, and what the training benchmarks share.

Importing this first also puts the repository on the path, so that a script in this folder runs from
any directory.
"""

import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from train.learning.system import Classifier  # noqa: E402

Batches = Iterable[tuple[Tensor, Tensor]]


class Stopwatch:
    """Wall time, processor time and images, from its creation to `stop`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.images = 0
        self.seconds = 0.0  # of wall time
        self.cpu_seconds = 0.0  # of processor time, of this process
        self._wall_start, self._cpu_start = self._read_clocks()

    @property
    def images_per_second(self) -> float:
        """Images a second of wall time."""
        return self.images / self.seconds

    @property
    def images_per_cpu_second(self) -> float:
        """Images a second of processor time."""
        return self.images / self.cpu_seconds

    def stop(self) -> "Stopwatch":
        """Set `seconds` and `cpu_seconds`; return the stopwatch."""
        wall, cpu = self._read_clocks()
        self.seconds = wall - self._wall_start
        self.cpu_seconds = cpu - self._cpu_start
        return self

    def _read_clocks(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loader: Batches,
    system: Classifier,
    bf16: bool,
) -> Stopwatch:
    """Train one epoch; mean, deviation, memory layout and label smoothing are those of `system`.

    So are the batch norms that keep their statistics.
    """
    device = system.device
    mean = system.mean
    std = system.std
    system.train()
    for module, original in zip(network.modules(), system.network.modules(), strict=True):
        module.training = original.training
    stopwatch = Stopwatch(device)
    for pixels, labels in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = ((pixels - mean) / std).contiguous(memory_format=system.layout)
            loss = cross_entropy(network(x), labels, label_smoothing=system.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        stopwatch.images += len(pixels)
    return stopwatch.stop()


@torch.no_grad()
def measure_accuracy(network: nn.Module, loader: Batches, system: Classifier, bf16: bool) -> float:
    """Return the share of images that are classified correctly."""
    network.eval()
    correct = torch.zeros((), device=system.device)
    images = 0
    for pixels, labels in loader:
        with torch.autocast(system.device.type, torch.bfloat16, enabled=bf16):
            correct += (network(system.normalize(pixels)).argmax(1) == labels).sum()
        images += len(labels)
    return float(correct) / images


def describe_device() -> str:
    """Return the GPU's name, or the number of CPU threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {torch.get_num_threads()} threads"


def peak_memory_mb() -> int:
    """Return the peak memory in MB so far, of the GPU or else of this process."""
    if torch.cuda.is_available():
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(peak_bytes / 1e6)
