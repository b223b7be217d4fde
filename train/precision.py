"""bfloat16 only where it is fast."""
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

MIXED = ("bf16-mixed", "bf16", "16-mixed", "16")  # as Lightning names them; on a CPU all of them mean bfloat16


def affordable(precision: str | int | None, accelerator: str) -> str | int | None:
    """The precision asked for, save that a CPU which would have to emulate bfloat16 computes in float32.

    Emulated, it is slower than float32 by far. Recipes ask for bf16-mixed, so that they are fast where they can be.
    """
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    return "32-true" if str(precision) in MIXED and on_cpu and not has_bfloat16() else precision


class SaysSo(Callback):
    """One line about a precision that is not the one asked for, once there is something to compute."""

    def __init__(self, asked: str | int | None):
        self.asked = asked

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            print(f"train: this CPU has no bfloat16 instructions: computing in float32 instead of {self.asked}",
                  file=sys.stderr)


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2", "DEFAULT"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # ARM
