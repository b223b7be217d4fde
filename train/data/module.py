"""The one LightningDataModule, for every source."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import lightning as L
import numpy as np
import torch

from models.cpu_quota import available_cores
from models.image import InputSpec, read_header
from train.data.augment import Augmentation, Augmenter
from train.data.cache import Known, known
from train.data.input_size import input_spec, kept_spec, thumbnail_spec
from train.data.loader import Batches, MemoryBatches, StreamBatches
from train.data.memory import Memory, choose
from train.data.pixels import encoded, pixels_of
from train.data.sampler import Order
from train.data.source import PARTS, Arrays, DataError, Source, cache_home, say
from train.data.sources import open_source
from train.data.split import split

UNCHANGED = Augmentation()
SAMPLED = 2048  # images that mean and standard deviation are taken from when the data is streamed


class ImageData(L.LightningDataModule):
    """Labelled images as batches of (uint8 [B, C, H, W], int64 [B]) on the trainer's device.

    After `setup`: `classes`; `input`, what the network is fed; `mean` and `std` of each channel of the training part in
    0..255; `counts` of images by part; `digest`; `class_weights`; `unreadable`, files that are left out, and why.
    """

    def __init__(
        self,
        source: str = "digits",
        root: str | None = None,
        size: int | None = None,
        channels: Literal[1, 3] | None = None,
        resize: Literal["crop", "stretch", "pad"] = "crop",
        short_side: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        sampling: Literal["uniform", "balanced"] = "uniform",
        augment: Augmentation = UNCHANGED,
        memory: Memory = "auto",
        memory_share: float = 0.5,
        workers: int | None = None,
        cache: str | None = None,
        max_unreadable: float = 0.05,
    ):
        """
        Args:
            source: digits, cifar10, cifar100, mnist, fashion-mnist; the path of a folder of class folders, or of a .csv
                file of path,label[,split]; or litdata:, deeplake: or hf: and a path or URL.
            root: where a torchvision data set lies on disk; then nothing is downloaded.
            size: side of what the network sees, in pixels; by default the images' own where they are small and alike.
            channels: 1 for gray, 3 for colour; by default as the images are.
            resize: crop, stretch or pad: how images of another shape are made to fit.
            short_side: for crop: the short side becomes this before the centre is cut out; training crops anywhere.
            batch_size: images a step and process, in training.
            eval_batch_size: the same in validation and test; by default twice batch_size.
            val_fraction: share of the training part that is split off to validate, where the data has no such part.
            test_fraction: share of all that is split off to test, where the data has no such part.
            seed: of the split, the order and the augmentation.
            sampling: uniform: each image once an epoch; balanced: drawn so that each class comes equally often.
            augment: what is done to training images; never to others.
            memory: auto, memory (decoded once, kept in memory) or stream (decoded anew for each epoch by workers).
            memory_share: the share of free memory that the pixels may take before they are streamed.
            workers: processes that decode; by default one for each core that this job may use, shared among its
                processes on the node.
            cache: where pixels and labels are kept for the next run; by default ~/.cache/imago, empty for nowhere.
            max_unreadable: the share of images that may be unreadable and are left out; more stop the run.
        """
        super().__init__()
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < value < 1:
                raise DataError(f"{name}: {value} is not between 0 and 1")
        for name, count, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("size", size, 1),
            ("short_side", short_side, 1),
            ("workers", workers, 0),
        ):
            if count is not None and count < least:
                raise DataError(f"{name}: {count} is less than {least}")
        for name, share in (("max_unreadable", max_unreadable), ("memory_share", memory_share)):
            if not 0 <= share <= 1:
                raise DataError(f"{name}: {share} is not in 0..1")
        self.source, self.root, self.size, self.channels = source, root, size, channels
        self.resize, self.short_side = resize, short_side
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_fraction, self.test_fraction, self.seed = val_fraction, test_fraction, seed
        self.sampling, self.augment = sampling, augment
        self.memory, self.memory_share = memory, memory_share
        self._workers = workers
        self.cache = cache_home() if cache is None else Path(cache).expanduser() if cache else None
        self.max_unreadable = max_unreadable
        self._tensors: dict[tuple, torch.Tensor] = {}

    @property
    def workers(self) -> int:
        """Processes that decode for this one: as asked for, or this process's share of the cores."""
        if self._workers is not None:
            return self._workers
        return max(1, available_cores() // (self.trainer.num_devices if self.trainer else 1))

    def prepare_data(self) -> None:
        """Download what has to be, in one process a node."""
        self.found  # noqa: B018

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "index"):
            return
        self.classes = self.found.classes
        if len(self.classes) < 2:
            raise DataError(
                f"{self.source}: one class, {self.classes[0]!r}; a classifier needs two or more"
            )
        self.input = input_spec(self.found, self.size, self.channels, self.resize, self.short_side)
        kept = kept_spec(self.input)
        size = sum(
            len(self.found.items) * s.height * s.width * s.channels
            for s in {
                kept.model_dump_json(): kept,
                self.input.model_dump_json(): self.input,
            }.values()
        )
        # Pixels in the cache are one file for all processes of the node; without one each holds its own.
        holders = self.trainer.num_devices if self.trainer and self.cache is None else 1
        self.place, why = choose(self.memory, size, self.memory_share, self._device(), holders)
        say(
            f"{len(self.found.items):,} images of {self.input.height}x{self.input.width}x{self.input.channels}, "
            + (
                "streamed by workers"
                if self.place == "stream"
                else f"pixels kept on the {self.place}"
            )
            + f": {why}"
        )
        self.known = self._known(
            thumbnail_spec(self.input) if self.place == "stream" else self.input
        )
        self.index = split(
            self.found, self._usable(), self.val_fraction, self.test_fraction, self.seed
        )
        self.counts = {part: len(self.index[part]) for part in PARTS}
        self.mean, self.std = _moments(self._training_chunks())
        self.digest = _digest(self.known, self.found)
        self.findings: dict | None = None  # of the audit
        self.leaked_test = np.zeros(
            0, np.int64
        )  # rows of the test part with a duplicate in the others; by the audit

    @cached_property
    def found(self) -> Source:
        """The data set as it is, before the split."""
        return open_source(self.source, self.root, self.cache)

    def _known(self, spec: InputSpec) -> Known:
        cache = None if isinstance(self.found.items, Arrays) else self.cache
        return known(self.found.items, spec, cache, self.workers, f"Decoding {self.found.name}")

    def _usable(self) -> np.ndarray:
        """bool [N]; says what is left out. Raises DataError where that is more than `max_unreadable`."""
        problems = self.known.facts["problem"]
        bad = np.flatnonzero(problems != "")
        self.unreadable = [(self.found.items.name(i), str(problems[i])) for i in bad.tolist()]
        if not self.unreadable:
            return problems == ""
        names = ", ".join(f"{name} ({problem})" for name, problem in self.unreadable[:10])
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        total = len(problems)
        if len(bad) > self.max_unreadable * total:
            raise DataError(
                f"{self.source}: {len(bad)} of {total} images can't be read, more than max_unreadable "
                f"{self.max_unreadable:.0%} allows: {names}{more}"
            )
        say(f"{len(bad)} of {total} images can't be read and are left out: {names}{more}")
        return problems == ""

    def _training_chunks(self) -> Iterator[np.ndarray]:
        """uint8 [M, H, W, C] each: all training images, or some of those that are streamed."""
        if self.place == "stream":
            yield from (image[None] for image in self._examples(SAMPLED))
        else:
            index = self.index["train"]
            yield from (
                self.known.pixels[some] for some in np.array_split(index, -(-len(index) // 1024))
            )

    def _examples(self, count: int) -> Iterator[np.ndarray]:
        """uint8 [H, W, C] each: so many training images at most, from all over the part."""
        index = self.index["train"]
        some = index[
            np.linspace(0, len(index) - 1, min(count, len(index)), dtype=np.int64)
        ].tolist()
        if self.place == "stream":
            yield from (pixels_of(self.found.items, i, self.input) for i in some)
        else:
            yield from self.known.pixels[some]

    def examples(self, count: int) -> torch.Tensor:
        """Training images as they are, not augmented: uint8 [M, C, H, W] on the CPU, `count` of them or all."""
        return torch.from_numpy(np.stack(list(self._examples(count)))).permute(0, 3, 1, 2)

    def _device(self) -> torch.device:
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def _batches(self, part: str, training: bool = False, alone: bool = False) -> Batches:
        """The loader of one part; only a training one shuffles and augments. `alone`: this process reads all of it."""
        here = None if alone else self.trainer
        rank, world = (here.global_rank, here.world_size) if here else (0, 1)
        rows = self.index[part]
        if len(rows) < world:
            raise DataError(
                f"{self.source}: the {part} part has {len(rows)} images for {world} processes; use fewer"
            )
        weights = None
        if training and self.sampling == "balanced":
            weights = self.class_weights.numpy()[self.found.labels[rows]].astype(np.float64)
            weights /= weights.sum()
        size = self.batch_size if training else self.eval_batch_size or 2 * self.batch_size
        # With Lightning's overfit_batches each epoch has the same images; its own switch knows no loaders but torch's.
        still = bool(getattr(here, "overfit_batches", 0))  # Lightning does not declare it
        order = Order(rows, size, training, self.seed, rank, world, weights, still)
        augment = (
            Augmenter(
                self.augment,
                self.input,
                self.mean,
                len(self.classes),
                len(self.found.items),
                self.seed,
            )
            if training
            else None
        )
        spec, device = kept_spec(self.input) if training else self.input, self._device()
        labels = self._tensor("labels", lambda: torch.from_numpy(self.found.labels), device)
        if self.place == "stream":
            return StreamBatches(
                self.found.items,
                np.arange(len(self.found.items)),
                spec,
                labels,
                order,
                device,
                augment,
                self.workers,
            )
        where = device if self.place == "device" else torch.device("cpu")
        pixels = self._tensor(
            spec.model_dump_json(), lambda: torch.from_numpy(self._pixels(spec)), where
        )
        return MemoryBatches(pixels, labels, order, device, augment)

    def _pixels(self, spec: InputSpec) -> np.ndarray:
        return self.known.pixels if spec == self.input else self._known(spec).pixels

    def _tensor(
        self, name: str, make: Callable[[], torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """A tensor on the device, moved there once."""
        if (name, device) not in self._tensors:
            self._tensors[name, device] = make().to(device)
        return self._tensors[name, device]

    def train_dataloader(self) -> Batches:
        return self._batches("train", training=True)

    def val_dataloader(self) -> Batches:
        return self._batches("val")

    def test_dataloader(self) -> Batches:
        return self._batches("test")

    predict_dataloader = test_dataloader

    def whole(self, part: str) -> Batches:
        """All images of a part in the order of `index`, without augmentation, for this process alone."""
        return self._batches(part, alone=True)

    def leaked(self, step: int) -> torch.Tensor | None:
        """bool [B] on the device: which images of this process's test batch have a duplicate in the other parts, or
        None where no test image has. It takes an audit to know."""
        if not len(self.leaked_test):
            return None
        order = self._batches("test").order
        positions = self.index["test"][self.leaked_test]
        return torch.from_numpy(np.isin(order.epoch(0)[step], positions)).to(self._device())

    def use_normalization(self, mean: list[float], std: list[float]) -> None:
        """Normalize with these values of each channel, in 0..255, instead of those measured in `setup`."""
        self.mean = mean
        self.std = std

    def attach_trainer(self, trainer: L.Trainer) -> None:
        """Follow a trainer's device and processes before its `fit` does so."""
        self.trainer = trainer

    def allow_unreadable(self, share: float) -> None:
        """Accept this share of unreadable images, 0..1, in `setup`."""
        self.max_unreadable = share

    def use_batch_size(self, batch_size: int) -> None:
        """Train with batches of this size from the next data loader on."""
        self.batch_size = batch_size

    def set_audit_findings(self, findings: dict, leaked_test_rows: np.ndarray) -> None:
        """Keep what the audit found, for the report; `leaked_test_rows`, int64 [N], are rows of the test part that
        have a duplicate in another part."""
        self.findings = findings
        self.leaked_test = leaked_test_rows

    @property
    def class_weights(self) -> torch.Tensor:
        """float32 [K]: images a class on average, over images of the class, in the training part."""
        counts = np.bincount(self.found.labels[self.index["train"]], minlength=len(self.classes))
        return torch.from_numpy((counts.mean() / counts).astype(np.float32))

    def samples(self, n: int = 16) -> list[tuple[str, bytes, int]]:
        """(file name, image file, label) of validation images, the classes in turn. Files are as they were found, under
        plain names: what they are called may be fit for no other disk, or for no SHA256SUMS."""
        index = self.index["val"]
        labels = self.found.labels[index]
        turn = np.zeros(len(index), np.int64)  # how many of its class come before each image
        for k in np.unique(labels):
            turn[labels == k] = np.arange((labels == k).sum())
        chosen = index[np.lexsort((labels, turn))[:n]].tolist()
        files = [encoded(self.found.items[i]) for i in chosen]
        return [
            (f"{j:02d}.{read_header(file).format}", file, int(self.found.labels[i]))
            for j, (i, file) in enumerate(zip(chosen, files, strict=True))
        ]


def _digest(facts: Known, found: Source) -> str:
    """sha256 over the digest of each image, the labels and the class names."""
    whole = hashlib.sha256(facts.facts["sha256"].tobytes())
    whole.update(found.labels.tobytes())
    whole.update("\0".join(found.classes).encode())
    return whole.hexdigest()


def _moments(chunks: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 [M, H, W, C] chunks, in 0..255.

    A channel that is the same everywhere gets the deviation 1, so that it can be divided by.
    """
    counts = sum(
        (
            np.stack(
                [
                    np.bincount(plane.reshape(-1), minlength=256)
                    for plane in np.moveaxis(chunk, 3, 0)
                ]
            )
            for chunk in chunks
        ),
        np.zeros((1, 256), np.int64),
    )
    levels, total = np.arange(256.0), counts[0].sum()
    mean = counts @ levels / total
    variance = counts @ levels**2 / total - mean**2
    constant = (counts > 0).sum(
        1
    ) == 1  # told by the counts: the variance is off by a rounding error
    return mean.tolist(), np.where(constant, 1.0, np.sqrt(variance.clip(0))).tolist()
