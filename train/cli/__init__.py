"""The commands of `python -m train`; run.py spells out a training run."""

import models.networks  # noqa: F401  (first: declares operators torchvision needs on a CPU torch)
