"""A run: its directory, checkpoints, resume, preemption, processes, loggers and progress."""

import models.networks  # noqa: F401  (first: declares operators torchvision needs on a CPU torch)
