"""Images for training: sources, split, pixels in memory or a stream, augmentation."""

import models.networks  # noqa: F401  (first: declares operators torchvision needs on a CPU torch)
from train.data.augment import Augmentation
from train.data.module import ImageData
from train.data.source import DataError

__all__ = ["Augmentation", "DataError", "ImageData"]
