"""The bare PyTorch loop that Lightning's is measured against, as a person would write it.

Importing this first also puts the repository on the path, so that a script beside it runs from anywhere.
"""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

from train.learning.system import Classifier  # noqa: E402


class Pace:
    """Images a second of wall time and of processor time, from its making to `stop`."""

    def __init__(self, device: torch.device):
        self.device, self.images = device, 0
        self.began = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()

    def stop(self) -> "Pace":
        self.seconds, self.cpu_seconds = (
            end - begin for begin, end in zip(self.began, self._now(), strict=True)
        )
        self.wall, self.cpu = self.images / self.seconds, self.images / self.cpu_seconds
        return self


def epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    loader: Iterable[tuple[Tensor, Tensor]],
    system: Classifier,
    bf16: bool,
) -> Pace:
    """One epoch; mean, deviation, layout and smoothing are those of `system`."""
    device, mean, std = system.device, system.mean, system.std
    network.train()
    pace = Pace(device)
    for pixels, labels in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = ((pixels - mean) / std).contiguous(memory_format=system.layout)
            loss = cross_entropy(network(x), labels, label_smoothing=system.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        pace.images += len(pixels)
    return pace.stop()


def keep(script: str, result: dict[str, Any], same: tuple[str, ...]) -> None:
    """Write a result into the JSON file beside the script, in place of an earlier one with the `same` values."""
    file = Path(script).with_suffix(".json")
    everything = json.loads(file.read_text()) if file.exists() else []
    everything = [old for old in everything if any(old[key] != result[key] for key in same)] + [
        result
    ]
    file.write_text(json.dumps(everything, indent=1) + "\n")


@torch.no_grad()
def accuracy(
    network: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], system: Classifier, bf16: bool
) -> float:
    network.eval()
    right, count = torch.zeros((), device=system.device), 0
    for pixels, labels in loader:
        with torch.autocast(system.device.type, torch.bfloat16, enabled=bf16):
            right += (network(system.normalize(pixels)).argmax(1) == labels).sum()
        count += len(labels)
    return float(right) / count
