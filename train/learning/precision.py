"""bfloat16 only where it is fast."""

import sys
from functools import cache

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

MIXED = (
    "bf16-mixed",
    "bf16",
    "16-mixed",
    "16",
)  # as Lightning names them; on a CPU all of them mean bfloat16


def choose_precision(precision: str | int | None, accelerator: str) -> str | int | None:
    """The precision asked for, or another where the hardware would have to emulate bfloat16: a GPU before Ampere
    computes in float16, a CPU in float32.

    Emulated, it is slower by far, and cuDNN lacks some convolutions. Recipes ask for bf16-mixed, so that they are fast
    where they can be.
    """
    if accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available()):
        return "32-true" if str(precision) in MIXED and not has_bfloat16() else precision
    emulated = torch.cuda.is_available() and not gpu_has_bfloat16()
    return "16-mixed" if str(precision) in MIXED[:2] and emulated else precision


@cache
def gpu_has_bfloat16() -> bool:
    """Whether the GPU multiplies bfloat16 itself."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


class PrecisionNotice(Callback):
    """One line about a precision that is not the one asked for, once there is something to compute."""

    def __init__(self, asked: str | int | None, given: str | int | None):
        self.asked, self.given = asked, given

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            what = (
                "CPU has no bfloat16 instructions"
                if self.given == "32-true"
                else "GPU has no bfloat16 units"
            )
            print(
                f"train: this {what}: computing in {self.given} instead of {self.asked}",
                file=sys.stderr,
            )


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself."""
    if torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2", "DEFAULT"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # ARM
