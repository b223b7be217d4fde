"""What can go wrong in a run that is set up right, in words that say what to try."""

import torch


class Diverged(RuntimeError):
    """The loss is no number any more."""

    def __init__(self, where: str, rate: float):
        super().__init__(
            f"{where} is not finite: the training diverged; try a lower --model.optimizer.lr (it is "
            f"{rate:g}), a longer --model.schedule.warmup, or --trainer.gradient_clip_val 1"
        )


class OutOfMemory(RuntimeError):
    """A batch was too large for the memory."""

    def __init__(self, batch_size: int, device: torch.device, evaluating: bool):
        flag = "--data.eval_batch_size" if evaluating else "--data.batch_size"
        where = "validation and test" if evaluating else "training"
        if batch_size > 1:
            advice = f"try {flag} {batch_size // 2}"
            advice += (
                ""
                if evaluating
                else (
                    ", with --trainer.accumulate_grad_batches 2 for the same steps, or ask "
                    "python -m train find-batch-size"
                )
            )
        else:
            advice = "try a smaller --data.size or another --model.network"
        super().__init__(
            f"out of memory on {device} with batches of {batch_size} in {where}; {advice}"
        )


class AuditOutOfMemory(OutOfMemory):
    """The data is too much for the audit, whatever the batches."""

    def __init__(self, device: torch.device):
        RuntimeError.__init__(
            self,
            f"out of memory on {device} in the data audit; try a smaller --data.size, or train "
            "without it: --audit.enabled false",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Also torch's on the CPU, which is a plain RuntimeError."""
    words = (
        "DefaultCPUAllocator: can't allocate memory",
        "not enough memory",
        "out of memory",
        # What is left is too little for the library, which does not always say so.
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "unable to find an engine to execute this",
        "Unable to find a valid cuDNN algorithm",
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
