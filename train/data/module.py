"""The one LightningDataModule, for every source."""
import hashlib

import lightning as L
import numpy as np
import torch

from models.image import InputSpec
from train.data import pixels as decoding
from train.data.augment import Augmentation
from train.data.loader import MemoryLoader
from train.data.order import Order
from train.data.source import DataError, Source
from train.data.sources import open_source
from train.data.split import split


class ImageData(L.LightningDataModule):
    """Labelled images as batches of (uint8 [B, C, H, W], int64 [B]) on the trainer's device.

    After `setup`: `classes`, `input` (what the network is fed), `mean` and `std` of each channel of the training part
    in 0..255, `counts` of images by part, `digest`, `source`.
    """

    def __init__(self, source: str = "digits", root: str | None = None, size: int | None = None,
                 channels: int | None = None, resize: str = "crop", short_side: int | None = None,
                 batch_size: int = 64, eval_batch_size: int | None = None, val_fraction: float = 0.1,
                 test_fraction: float = 0.2, seed: int = 0, augment: Augmentation | None = None):
        """
        Args:
            source: digits, cifar10, cifar100, mnist, fashion-mnist, or the path of a folder of class folders.
            root: where a torchvision data set lies on disk; then nothing is downloaded.
            size: side of what the network sees, in pixels; by default the images' own where they are all alike.
            channels: 1 for gray, 3 for colour; by default as the images are.
            resize: crop, stretch or pad: how images of another shape are made to fit.
            short_side: for crop: the short side becomes this before the centre is cut out.
            batch_size: images a step and process, in training.
            eval_batch_size: the same in validation and test; by default twice batch_size.
            val_fraction: share of the training part that is split off to validate, where the data has no such part.
            test_fraction: share of all that is split off to test, where the data has no such part.
            seed: of the split, the order and the augmentation.
            augment: what is done to training images; never to others.
        """
        super().__init__()
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < value < 1:
                raise DataError(f"{name}: {value} is not between 0 and 1")
        if batch_size < 1:
            raise DataError(f"batch_size: {batch_size} is less than 1")
        self.source, self.root, self.size, self.channels = source, root, size, channels
        self.resize, self.short_side = resize, short_side
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 2 * batch_size
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed
        self.augment = augment or Augmentation()
        self._ready = False

    def prepare_data(self) -> None:
        open_source(self.source, self.root)  # downloads, in one process a node

    def setup(self, stage: str | None = None) -> None:
        if self._ready:
            return
        found = open_source(self.source, self.root)
        self._items, self.classes = found.items, found.classes
        if len(self.classes) < 2:
            raise DataError(f"{self.source}: one class, {self.classes[0]!r}; a classifier needs two or more")
        self.input = self._input_spec(found)
        self.index = split(found, self.val_fraction, self.test_fraction, self.seed)
        decoded = decoding.decode_all(found.items, self.input)
        if decoded.unreadable:
            where, why = next(iter(decoded.unreadable.items()))
            raise DataError(f"{found.items.name(where)}: {why}")
        self.pixels, self.labels = torch.from_numpy(decoded.pixels), torch.from_numpy(found.labels)
        self.counts = {part: len(index) for part, index in self.index.items()}
        self.mean, self.std = _moments(decoded.pixels, self.index["train"])
        self.digest = hashlib.sha256(decoded.pixels.tobytes() + found.labels.tobytes()).hexdigest()
        self._ready = True

    def _input_spec(self, found: Source) -> InputSpec:
        array = getattr(found.items, "array", None)
        size, channels = self.size, self.channels
        if array is not None:
            size, channels = size or array.shape[1], channels or array.shape[3]
        return InputSpec(height=size or 224, width=size or 224, channels=channels or 3, resize=self.resize,
                         short_side=self.short_side)

    def _loader(self, part: str, augment: Augmentation | None = None) -> MemoryLoader:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)
        training = augment is not None
        rank, world = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        order = Order(self.index[part], self.batch_size if training else self.eval_batch_size, training, self.seed,
                      rank, world)
        return MemoryLoader(self.pixels, self.labels, order, augment)

    def train_dataloader(self) -> MemoryLoader:
        return self._loader("train", self.augment)

    def val_dataloader(self) -> MemoryLoader:
        return self._loader("val")

    def test_dataloader(self) -> MemoryLoader:
        return self._loader("test")

    def predict_dataloader(self) -> MemoryLoader:
        return self._loader("test")

    def samples(self, n: int = 16) -> list[tuple[str, bytes, int]]:
        """(file name, image file, label) of validation images, one class after the other, spread over the part."""
        index = self.index["val"]
        labels = self.labels[torch.from_numpy(index)].cpu().numpy()
        rank = np.empty(len(index), np.int64)  # how many of its class come before each image
        for k in np.unique(labels):
            rank[labels == k] = np.arange((labels == k).sum())
        chosen = index[np.lexsort((labels, rank))[:n]]
        return [(f"{j:02d}-{self._items.name(i).rpartition('/')[2]}", decoding.encoded(self._items[i]),
                 int(self.labels[i])) for j, i in enumerate(chosen)]


def _moments(pixels: np.ndarray, index: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over the given images, in 0..255."""
    total, squares, count = 0.0, 0.0, 0
    for chunk in np.array_split(index, -(-len(index) // 4096)):
        values = pixels[chunk].reshape(-1, pixels.shape[3])
        histogram = np.stack([np.bincount(values[:, c], minlength=256) for c in range(values.shape[1])])
        total = total + histogram @ np.arange(256.0)
        squares = squares + histogram @ np.arange(256.0) ** 2
        count += len(values)
    mean = total / count
    return mean.tolist(), np.sqrt(np.maximum(squares / count - mean**2, 1e-12)).tolist()
