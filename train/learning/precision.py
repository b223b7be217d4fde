"""Which precision to compute in: bfloat16 only where the hardware is fast at it.

Recipes ask for bf16-mixed. The command line replaces it before the trainer is made, and Muon asks
whether the GPU has bfloat16 units.
"""

import sys
from dataclasses import dataclass
from functools import cache

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

Precision = str | int | None  # as Lightning takes it

BFLOAT16_MIXED = ("bf16-mixed", "bf16")
MIXED = (*BFLOAT16_MIXED, "16-mixed", "16")  # on a CPU all of them mean bfloat16


@dataclass(frozen=True)
class Bfloat16Support:
    """Which processors multiply bfloat16 in hardware."""

    cpu: bool
    gpu: bool | None  # None without an NVIDIA GPU
    has_accelerator: bool  # an NVIDIA GPU, or another processor than the CPU


def choose_precision(
    requested: Precision, accelerator: str, support: Bfloat16Support | None = None
) -> Precision:
    """Return the requested precision, or another where the hardware would emulate bfloat16.

    A GPU older than Ampere then computes in float16, and a CPU in float32. Emulated bfloat16 is
    much slower, and cuDNN lacks some convolutions for it. `support`: this machine's by default.
    """
    support = support or detect_bfloat16()
    is_cpu = accelerator == "cpu" or (accelerator == "auto" and not support.has_accelerator)
    if is_cpu:
        is_emulated = str(requested) in MIXED and not support.cpu
        return "32-true" if is_emulated else requested
    if support.gpu is False and str(requested) in BFLOAT16_MIXED:
        return "16-mixed"
    return requested


def detect_bfloat16() -> Bfloat16Support:
    """Return the support of this machine."""
    return Bfloat16Support(
        cpu=has_bfloat16(),
        gpu=gpu_has_bfloat16() if torch.cuda.is_available() else None,
        has_accelerator=torch.accelerator.is_available(),
    )


@cache
def gpu_has_bfloat16() -> bool:
    """Whether the GPU multiplies bfloat16 in hardware."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2", "DEFAULT"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # ARM


class PrecisionNotice(Callback):
    """Prints one line when the precision in use is not the requested one."""

    def __init__(self, requested: Precision, used: Precision):
        self.requested = requested
        self.used = used

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the line, in the first process."""
        if not trainer.is_global_zero:
            return
        reason = "GPU has no bfloat16 units"
        if self.used == "32-true":
            reason = "CPU has no bfloat16 instructions"
        print(
            f"train: this {reason}: computing in {self.used} instead of {self.requested}",
            file=sys.stderr,
        )
