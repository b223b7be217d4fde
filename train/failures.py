"""Exit statuses of the training commands, and failures of a run whose settings are valid.

Errors in settings and input are ValueError or OSError. train/cli/main.py maps each error to an exit
status.
"""

from enum import IntEnum
from pathlib import Path

import torch


class ExitStatus(IntEnum):
    """How a training command ends. Kubernetes decides by it whether to start the job again."""

    DONE = 0
    FAILED = 1  # the loss diverged, memory was too small, the disk is full, a download broke off
    INVALID = 2  # a setting or the input is wrong; the same command fails again
    REFUSED = 3  # the new version is published, but worse than the latest one, which stays
    INTERRUPTED = 130  # by Ctrl-C; the same command resumes
    TERMINATED = 143  # by SIGTERM; the same command resumes


EXIT_STATUS_HELP = (
    "Exit status: 0 done; 1 the run failed (the loss diverged, memory was too small, the disk is "
    "full, a download broke off); 2 invalid setting or input; 3 the new version is published, but "
    "worse than the latest one, which stays; 143 or 130 interrupted by SIGTERM or Ctrl-C, run the "
    "same command again to resume."
)


class GateRefused(Exception):
    """The new version is published, but worse than the latest one, which stays."""

    def __init__(self, path: Path, reasons: str):
        super().__init__(reasons)
        self.path = path


class DownloadFailed(RuntimeError):
    """The connection to a server broke again and again; the next run continues the download."""


class Diverged(RuntimeError):
    """The loss is not a finite number. `subject` names the loss and where it diverged."""

    def __init__(self, subject: str, learning_rate: float):
        super().__init__(
            f"{subject} is not finite: the training diverged; try a lower --model.optimizer.lr (it "
            f"is {learning_rate:g}), a longer --model.schedule.warmup, or "
            "--trainer.gradient_clip_val 1"
        )


class OutOfMemory(RuntimeError):
    """The memory of the device, or of the host, is too small."""


class BatchOutOfMemory(OutOfMemory):
    """A batch is too large for the memory."""

    def __init__(self, batch_size: int, device: torch.device, is_evaluation: bool):
        part = "validation and test" if is_evaluation else "training"
        advice = _smaller_batch_advice(batch_size, is_evaluation)
        super().__init__(
            f"out of memory on {device} with batches of {batch_size} in {part}; {advice}"
        )


class AuditOutOfMemory(OutOfMemory):
    """The data is too large for the audit, which does not depend on the batch size."""

    def __init__(self, device: torch.device):
        super().__init__(
            f"out of memory on {device} in the data audit; try a smaller --data.size, or train "
            "without it: --audit.enabled false"
        )


def _smaller_batch_advice(batch_size: int, is_evaluation: bool) -> str:
    if batch_size == 1:
        return "try a smaller --data.size or another --model.network"
    if is_evaluation:
        return f"try --data.eval_batch_size {batch_size // 2}"
    return (
        f"try --data.batch_size {batch_size // 2}, with --trainer.accumulate_grad_batches 2 for "
        "the same steps, or ask python -m train find-batch-size"
    )


OUT_OF_MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "out of memory",
    # CUDA's libraries raise these where too little memory is free.
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this",
    "Unable to find a valid cuDNN algorithm",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether too little memory caused an error; torch raises a plain RuntimeError on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    return any(text in message for text in OUT_OF_MEMORY_TEXTS)
