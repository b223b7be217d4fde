"""The LightningModule, its optimizers and schedules, weight averaging and precision."""

import models.networks  # noqa: F401  (first: declares operators torchvision needs on a CPU torch)
