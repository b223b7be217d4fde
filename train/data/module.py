"""The LightningDataModule: source -> split -> pixels in memory or a stream -> batches.

Each training process holds one `ImageData`. `setup` opens the source, decides where the pixels are
stored, decodes what is needed, splits the images and measures mean and standard deviation. The
dataloader methods then build the `BatchLoader` of a part.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from models.cpu_quota import available_cores
from models.image import MAX_PIXELS, ImageTooLarge, InputSpec, decode, read_header
from models.image.input_spec import SIXTEEN_BITS
from models.networks.pretrained import Preprocessing
from train.data.augment import Augmentation, Augmenter
from train.data.cache import DecodedImages, load_decoded_images
from train.data.corrections import apply_corrections, locate_corrections, read_corrections
from train.data.input_size import choose_input_spec, thumbnail_spec, training_spec
from train.data.loader import BatchLoader, MemoryBatchLoader, StreamBatchLoader
from train.data.memory import Memory, Storage, choose_storage, measure_free_memory
from train.data.pixels import read_pixels, to_image_bytes, to_pixels
from train.data.sampler import EpochOrder
from train.data.source import (
    CORRECTIONS_FILE,
    LIVE,
    PARTS,
    ArrayItems,
    DataError,
    LabelledImages,
    cache_home,
    expand_home,
    notify,
)
from train.data.sources import open_source
from train.data.sources.several import hide_all_secrets, join_sources, split_sources
from train.data.split import split
from train.data.statistics import channel_mean_std, data_digest

NO_AUGMENTATION = Augmentation()
CPU = torch.device("cpu")
STREAM_SAMPLE = 2048  # streamed images that mean and standard deviation are measured on
CHUNK = 1024  # images that mean and standard deviation are measured on at once
LISTED_FILES = 10  # unreadable files that a message names
LISTED_CLASSES = 10  # classes that a message names


class UnreadableImage(NamedTuple):
    """An image that is left out of all parts."""

    name: str
    problem: str


class SampleImage(NamedTuple):
    """A validation image as its source stores it."""

    name: str  # such as 03.jpg; the original name may not suit other disks or SHA256SUMS
    content: bytes
    label: int


class ImageData(L.LightningDataModule):
    """Labelled images as batches of (uint8 [B, C, H, W], int64 [B]) on the trainer's device.

    Args:
        source: digits, cifar10, cifar100, mnist, fashion-mnist; the path of a folder of class
            folders, or of train/ and test/ with class folders, or of a .csv file with the columns
            path, label and perhaps split; a .zip or .tar of these, on disk or at an https://,
            s3://, gs:// or az:// URL; the URL of class folders in a bucket;
            hf://datasets/owner/name; or litdata:, deeplake: or hf: and a path or URL; or kept: and
            the directory or bucket of images that the service kept. Several are separated by
            commas, or listed in a .txt file, one a line.
        root: directory of a torchvision data set on disk; nothing is downloaded then.
        size: side of the network's input in pixels; by default that of the weights which the
            network starts from; with random weights that of the images where all are squares of
            one small size, 224 otherwise.
        channels: 1 for gray, 3 for colour; by default as the images are.
        resize: how images of another shape are fitted to the input: crop, stretch or pad; by
            default as for the weights, else crop.
        short_side: for crop: the short side is resized to this before the centre is cut out;
            training crops at random positions. By default as for the weights, like size.
        batch_size: training images a step and process.
        eval_batch_size: images a step and process in validation and test; by default twice
            batch_size.
        val_fraction: share of the training part that is split off for validation, where the
            data has no validation part.
        test_fraction: share of the data that is split off for the test, where the data has no
            test part.
        seed: seed of the split, the batch order and the augmentation.
        sampling: uniform shows each image once an epoch; balanced draws all classes equally
            often.
        augment: augmentation of training images; other images are never augmented.
        memory: auto, memory (decode once, keep the pixels in memory) or stream (workers decode
            in each epoch).
        memory_share: share of the free memory for the pixels; larger data is streamed.
        workers: processes that decode; by default one for each core that this job may use,
            shared among its processes on the node.
        cache: directory that keeps fetched data, pixels and labels for the next run; by default
            ~/.cache/imago, empty for none.
        normalization: mean and standard deviation of each channel that are subtracted and divided
            by: pretrained, those of the weights which the network starts from; data, measured on
            the training part; auto, those of the weights where it starts from some.
        max_unreadable: share of images that may be unreadable; they are left out. More stop the
            run.
        max_pixels: pixels of one image; larger ones are unreadable. The service has a setting of
            the same name.
        significant_bits: bits that the samples of 16-bit images use, 8 to 16: 12 for many cameras
            and scanners; by default as few as hold the samples of the training images. The
            service reads images in the same way.
        corrections: file that keeps, relabels or leaves out single images, as the audit's page
            writes it; by default corrections.csv in the folder of the data, or
            photos.corrections.csv beside photos.csv; empty for none.
    """

    # `setup` sets these:
    classes: list[str]
    input: InputSpec  # what the network is fed
    storage: Storage  # where the pixels are
    decoded: DecodedImages  # all images at the input size, or thumbnails of streamed ones
    index: dict[str, np.ndarray]  # positions of each part's images, int64, ascending
    counts: dict[str, int]  # images of each part
    mean: list[float]  # of each channel, in 0..255, as `normalization` says
    std: list[float]
    live_positions: np.ndarray  # of the live test set, int64; no training uses them
    digest: str  # sha256 over images, labels and class names, in hex

    def __init__(
        self,
        source: str = "digits",
        root: str | None = None,
        size: int | None = None,
        channels: Literal[1, 3] | None = None,
        resize: Literal["crop", "stretch", "pad"] | None = None,
        short_side: int | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        sampling: Literal["uniform", "balanced"] = "uniform",
        augment: Augmentation = NO_AUGMENTATION,
        memory: Memory = "auto",
        memory_share: float = 0.5,
        workers: int | None = None,
        cache: str | None = None,
        normalization: Literal["auto", "pretrained", "data"] = "auto",
        max_unreadable: float = 0.05,
        max_pixels: int = MAX_PIXELS,
        significant_bits: int | None = None,
        corrections: str | None = None,
    ):
        super().__init__()
        _check_between("val_fraction", val_fraction)
        _check_between("test_fraction", test_fraction)
        _check_at_least("batch_size", batch_size, 1)
        _check_at_least("eval_batch_size", eval_batch_size, 1)
        _check_at_least("size", size, 1)
        _check_at_least("short_side", short_side, 1)
        _check_at_least("workers", workers, 0)
        _check_at_least("max_pixels", max_pixels, 1)
        _check_significant_bits(significant_bits)
        _check_share("max_unreadable", max_unreadable)
        _check_share("memory_share", memory_share)

        self.source = hide_all_secrets(source)  # for messages and manifests
        self._location = source
        self.root = root
        self.size = size
        self.channels = channels
        self.resize = resize
        self.short_side = short_side
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.sampling = sampling
        self.augment = augment
        self.memory = memory
        self.memory_share = memory_share
        self.cache = _cache_directory(cache)
        self.normalization = normalization
        self.max_unreadable = max_unreadable
        self.max_pixels = max_pixels
        self.significant_bits = significant_bits
        self.corrections = corrections

        self.unreadable: list[UnreadableImage] = []  # filled by `setup`, also where it fails
        self.audit_summary: list[str] | None = None  # findings in words; None without an audit
        self.embeddings: np.ndarray | None = None  # see `record_embeddings`
        self.embeddings_key = ""
        self.leaked_test_rows = np.zeros(0, np.int64)  # rows of index["test"]; see `record_audit`
        self._preprocessing: Preprocessing | None = None  # of the weights to start from
        self._workers = workers
        self._may_create_corrections = False
        self._ready = False
        self._tensors: dict[tuple[str, torch.device], Tensor] = {}  # moved to a device once

    # Given by the trainer

    @property
    def device(self) -> torch.device:
        """Device of the batches: the trainer's, or the CPU without a trainer."""
        return CPU if self.trainer is None else self.trainer.strategy.root_device

    @property
    def workers(self) -> int:
        """Decoding processes: as set, or this training process's share of the cores."""
        if self._workers is not None:
            return self._workers
        return max(1, available_cores() // self._processes_on_node)

    @property
    def _processes_on_node(self) -> int:
        return 1 if self.trainer is None else self.trainer.num_devices

    @property
    def _repeat_first_epoch(self) -> bool:
        """Whether Lightning's `overfit_batches` asks for the same images in each epoch.

        Lightning itself replaces samplers of torch's DataLoader only. Its connectors set the
        attribute on the trainer, so the class does not declare it.
        """
        return bool(getattr(self.trainer, "overfit_batches", 0))

    # Setup

    def prepare_data(self) -> None:
        """Download the data set where needed, in one process a node."""
        self.dataset  # noqa: B018  (reading the property opens and downloads it)

    @cached_property
    def dataset(self) -> LabelledImages:
        """The data set before the split, with its corrections. Raises DataError."""
        sources = split_sources(self._location)
        if len(sources) == 1:
            return self._open_source(sources[0])
        if self.corrections:
            raise DataError(
                "data.corrections: names one file, for one source; each of several sources has its "
                f"own {CORRECTIONS_FILE}"
            )
        return join_sources([self._open_source(source) for source in sources], sources)

    def _open_source(self, source: str) -> LabelledImages:
        """Open one source, with its corrections."""
        is_first_on_node = self.trainer is None or self.trainer.local_rank == 0
        dataset = open_source(source, self.root, self.cache, refresh=is_first_on_node)
        file = locate_corrections(dataset, self.corrections)
        if file is None:
            return dataset
        try:
            return apply_corrections(dataset, read_corrections(file), file)
        except FileNotFoundError as error:
            if self.corrections is None or self._may_create_corrections:
                return dataset
            raise DataError(
                f"data.corrections: {error}; the audit can create it: python -m train audit DATA "
                "--serve"
            ) from error

    @property
    def corrections_file(self) -> Path | None:
        """The file of the corrections, which may not exist yet; None where there can be none."""
        return locate_corrections(self.dataset, self.corrections)

    def setup(self, stage: str | None = None) -> None:
        """Decode, split and measure the images. Raises DataError where they can't be used."""
        if self._ready:
            return

        self.classes = self.dataset.classes
        if len(self.classes) < 2:
            raise DataError(
                f"{self.source}: one class, {self.classes[0]!r}; a classifier needs two or more"
            )
        self.input = choose_input_spec(
            self.dataset,
            self.size,
            self.channels,
            self.resize,
            self.short_side,
            self.significant_bits,
            self.max_pixels,
            self._preprocessing,
        )
        self.storage = self._choose_storage()

        streamed = self.storage == "stream"
        self.decoded = self._load_decoded(thumbnail_spec(self.input) if streamed else self.input)
        self.unreadable = self._list_unreadable()
        self._check_unreadable()

        usable = self.decoded.metadata["problem"] == ""
        self.live_positions = self.dataset.index(LIVE)[usable[self.dataset.index(LIVE)]]
        usable &= ~self._find_copies_of_live_images()
        self.index = split(
            self.dataset,
            self.decoded.metadata["sha256"],
            usable,
            self.val_fraction,
            self.test_fraction,
            self.seed,
        )
        self.counts = {part: len(self.index[part]) for part in PARTS}
        self._report_missing_classes()
        self.use_normalization(*self._choose_normalization())
        self.digest = data_digest(
            self.decoded.metadata["sha256"],
            self.dataset.labels,
            self.dataset.classes,
            self.dataset.excluded,
        )
        self._ready = True

    def _choose_storage(self) -> Storage:
        """Decide where the pixels are stored, and print the decision."""
        # Training may need a second size, with a margin to crop from.
        specs = {spec.model_dump_json(): spec for spec in (training_spec(self.input), self.input)}
        pixels_per_image = sum(spec.height * spec.width * spec.channels for spec in specs.values())
        count = len(self.dataset.items)

        # Processes of a node share the pixels in the cache; without a cache each holds a copy.
        copies = self._processes_on_node if self.cache is None else 1
        storage, reason = choose_storage(
            self.memory,
            count * pixels_per_image,
            self.memory_share,
            self.device,
            measure_free_memory(self.device),
            copies,
        )
        shape = f"{self.input.height}x{self.input.width}x{self.input.channels}"
        kept = "streamed by workers" if storage == "stream" else f"pixels kept on the {storage}"
        notify(f"{count:,} images of {shape}, {kept}: {reason}")
        return storage

    def _load_decoded(self, spec: InputSpec) -> DecodedImages:
        in_memory = isinstance(self.dataset.items, ArrayItems)
        cache = None if in_memory else self.cache
        title = f"Decoding {self.dataset.name}"
        return load_decoded_images(
            self.dataset.items, spec, cache, self.workers, title, self.max_pixels
        )

    def _list_unreadable(self) -> list[UnreadableImage]:
        problems = self.decoded.metadata["problem"]
        return [
            UnreadableImage(self.dataset.items.name(i), str(problems[i]))
            for i in self.unreadable_positions().tolist()
        ]

    def unreadable_positions(self) -> np.ndarray:
        """Return the positions of `unreadable`, int64: without those that corrections leave out."""
        is_unreadable = self.decoded.metadata["problem"] != ""
        return np.flatnonzero(is_unreadable & ~self.dataset.excluded)

    def _check_unreadable(self) -> None:
        """Print the unreadable images. Raises DataError where there are more than allowed."""
        count = len(self.unreadable)
        if count == 0:
            return

        total = len(self.dataset.items) - self.dataset.count_excluded()
        files = ", ".join(f"{name} ({problem})" for name, problem in self.unreadable[:LISTED_FILES])
        if count > LISTED_FILES:
            files += f" and {count - LISTED_FILES} more"
        if count > self.max_unreadable * total:
            raise DataError(
                f"{self.source}: {count} of {total} images can't be read, more than max_unreadable "
                f"{self.max_unreadable:.0%} allows: {files}"
            )
        notify(f"{count} of {total} images can't be read and are left out: {files}")

    def _find_copies_of_live_images(self) -> np.ndarray:
        """Return which images outside of the live test set are the same file as one in it."""
        digests = self.decoded.metadata["sha256"]
        live = {digests[i].tobytes() for i in self.live_positions.tolist()}
        is_copy = np.zeros(len(digests), bool)
        if not live:
            return is_copy
        for i in np.flatnonzero(self.dataset.parts != LIVE).tolist():
            is_copy[i] = digests[i].tobytes() in live
        if is_copy.any():
            notify(f"{int(is_copy.sum())} images are left out: copies of live test images")
        return is_copy

    def count_classes(self, part: str) -> np.ndarray:
        """Return the number of images of each class in a part, int64 [K]."""
        return np.bincount(self.dataset.labels[self.index[part]], minlength=len(self.classes))

    def _report_missing_classes(self) -> None:
        """Print the classes that validation or test can't measure."""
        for part in ("val", "test"):
            missing = np.flatnonzero(self.count_classes(part) == 0).tolist()
            if missing:
                listed = ", ".join(self.classes[k] for k in missing[:LISTED_CLASSES])
                if len(missing) > LISTED_CLASSES:
                    listed += f" and {len(missing) - LISTED_CLASSES} more"
                notify(
                    f"the {part} part has no image of {listed}; its metrics tell nothing about "
                    f"{'this class' if len(missing) == 1 else 'these classes'}"
                )

    def _choose_normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and deviation of each channel: those of the weights, or the data's."""
        weights = self._preprocessing
        if weights is None and self.normalization == "pretrained":
            raise DataError(
                "data.normalization: pretrained needs weights with a known mean and deviation; "
                "give --model.weights pretrained, or --data.normalization data"
            )
        if weights is None or self.normalization == "data":
            return channel_mean_std(self._training_chunks())
        if self.input.channels == len(weights.mean):
            return weights.mean, weights.std

        # The kernels of the three channels are summed for a gray image.
        mean = sum(weights.mean) / len(weights.mean)
        std = sum(weights.std) / len(weights.std)
        return [mean] * self.input.channels, [std] * self.input.channels

    def _training_chunks(self) -> Iterator[np.ndarray]:
        """Yield uint8 [M, H, W, C]: all training images, or a sample of streamed ones."""
        if self.storage == "stream":
            for image in self._iterate_training_images(STREAM_SAMPLE):
                yield image[None]
            return

        index = self.index["train"]
        for rows in np.array_split(index, -(-len(index) // CHUNK)):
            yield self.decoded.pixels[rows]

    # Changes that other modules ask for

    def attach_trainer(self, trainer: L.Trainer) -> None:
        """Follow a trainer's device and processes before its `fit` sets it."""
        self.trainer = trainer

    def use_batch_size(self, batch_size: int) -> None:
        """Use another training batch size from the next dataloader on."""
        self.batch_size = batch_size

    def use_preprocessing(self, preprocessing: Preprocessing | None) -> None:
        """Prepare the images in `setup` as for the weights that the network starts from."""
        self._preprocessing = preprocessing

    def allow_unreadable(self, share: float) -> None:
        """Accept this share of unreadable images, 0..1, in `setup`."""
        self.max_unreadable = share

    def allow_missing_corrections(self) -> None:
        """Accept that the file of the setting `corrections` does not exist yet."""
        self._may_create_corrections = True

    def use_normalization(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise with this mean and standard deviation of each channel, in 0..255.

        A resumed run keeps those of its first start: a sample of streamed images may differ.
        """
        self.mean = list(mean)
        self.std = list(std)

    def record_embeddings(self, embeddings: np.ndarray, key: str) -> None:
        """Keep embeddings of all images, float32 [N, D], by a pretrained network.

        `key` names the network, its weights and the preprocessing.
        """
        self.embeddings = embeddings
        self.embeddings_key = key

    def record_audit(self, leaked_test_positions: Sequence[int], summary: list[str]) -> None:
        """Keep the audit's result: test images with a duplicate in other parts, and its summary."""
        self.leaked_test_rows = np.searchsorted(self.index["test"], leaked_test_positions)
        self.audit_summary = summary

    # Batches

    def train_dataloader(self) -> BatchLoader:
        """Shuffled, augmented batches of the training part, this process's share."""
        return self._build_loader("train", training=True)

    def val_dataloader(self) -> BatchLoader:
        """Batches of the validation part, this process's share."""
        return self._build_loader("val")

    def test_dataloader(self) -> BatchLoader:
        """Batches of the test part, this process's share."""
        return self._build_loader("test")

    predict_dataloader = test_dataloader

    def unsharded_dataloader(self, part: str) -> BatchLoader:
        """All batches of a part for this process alone, in the order of `index`, not augmented."""
        return self._build_loader(part, sharded=False)

    def positions_dataloader(self, positions: np.ndarray) -> BatchLoader:
        """Batches of these positions [N] of the data set, in their order and not augmented."""
        order = EpochOrder(positions, batch_size=self.eval_batch_size or 2 * self.batch_size)
        return self._build_order_loader(order, self.input)

    def _build_loader(self, part: str, training: bool = False, sharded: bool = True) -> BatchLoader:
        order = self._build_order(part, training, sharded)
        augmenter = self._build_augmenter() if training else None
        spec = training_spec(self.input) if training else self.input
        return self._build_order_loader(order, spec, augmenter)

    def _build_order_loader(
        self, order: EpochOrder, spec: InputSpec, augmenter: Augmenter | None = None
    ) -> BatchLoader:
        """Build the loader of an order, from the stored pixels or a stream."""
        labels = self._labels_on_device()
        if self.storage == "stream":
            return StreamBatchLoader(
                self.dataset.items,
                spec,
                labels,
                order,
                self.device,
                augmenter,
                self.workers,
                self.max_pixels,
            )
        pixels = self._stored_pixels(spec)
        return MemoryBatchLoader(pixels, labels, order, self.device, augmenter)

    def _build_order(self, part: str, training: bool, sharded: bool) -> EpochOrder:
        """Build the order of one part's batches; only training shuffles, or draws by class."""
        rank = 0
        world_size = 1
        if sharded and self.trainer is not None:
            rank = self.trainer.global_rank
            world_size = self.trainer.world_size

        rows = self.index[part]
        if len(rows) < world_size:
            raise DataError(
                f"{self.source}: the {part} part has {len(rows)} images for {world_size} "
                "processes; use fewer processes"
            )
        balanced = training and self.sampling == "balanced"
        eval_batch_size = self.eval_batch_size or 2 * self.batch_size
        return EpochOrder(
            rows,
            batch_size=self.batch_size if training else eval_batch_size,
            shuffle=training,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            weights=self._sampling_weights(rows) if balanced else None,
            repeat_first_epoch=self._repeat_first_epoch,
        )

    def _sampling_weights(self, rows: np.ndarray) -> np.ndarray:
        """Return the probability of each image, float64 [N]; all classes have the same sum."""
        weights = self.class_weights.numpy()[self.dataset.labels[rows]].astype(np.float64)
        return weights / weights.sum()

    def _build_augmenter(self) -> Augmenter:
        return Augmenter(
            self.augment,
            self.input,
            self.mean,
            len(self.classes),
            len(self.dataset.items),
            self.seed,
        )

    def _labels_on_device(self) -> Tensor:
        """Return the labels, int64 [N], on the device."""
        key = ("labels", self.device)
        if key not in self._tensors:
            self._tensors[key] = torch.from_numpy(self.dataset.labels).to(self.device)
        return self._tensors[key]

    def _stored_pixels(self, spec: InputSpec) -> Tensor:
        """Return all pixels at `spec`, uint8 [N, H, W, C], on the device that stores them."""
        device = self.device if self.storage == "device" else CPU
        key = (spec.model_dump_json(), device)
        if key not in self._tensors:
            decoded = self.decoded if spec == self.input else self._load_decoded(spec)
            self._tensors[key] = torch.from_numpy(decoded.pixels).to(device)
        return self._tensors[key]

    # Read by training, evaluation and export

    @property
    def class_weights(self) -> Tensor:
        """float32 [K]: mean number of training images a class over the number in this class.

        0 for a class without training images.
        """
        labels = self.dataset.labels[self.index["train"]]
        counts = np.bincount(labels, minlength=len(self.classes))
        has_images = counts > 0
        weights = np.zeros(len(counts), np.float32)
        weights[has_images] = counts[has_images].mean() / counts[has_images]
        return torch.from_numpy(weights)

    def leaked_in_test_batch(self, step: int) -> Tensor | None:
        """Return which images of this process's test batch have a duplicate in other parts.

        bool [B] on the device, or None where no test image has one or no audit ran.
        """
        if len(self.leaked_test_rows) == 0:
            return None
        order = self._build_order("test", training=False, sharded=True)
        leaked_positions = self.index["test"][self.leaked_test_rows]
        leaked = np.isin(order.batches(0)[step], leaked_positions)
        return torch.from_numpy(leaked).to(self.device)

    def training_images(self, count: int) -> Tensor:
        """Return up to `count` training images, not augmented: uint8 [M, C, H, W] on the CPU."""
        images = np.stack(list(self._iterate_training_images(count)))
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def _iterate_training_images(self, count: int) -> Iterator[np.ndarray]:
        """Yield uint8 [H, W, C] of up to `count` training images, evenly spread over the part."""
        index = self.index["train"]
        count = min(count, len(index))
        positions = index[np.linspace(0, len(index) - 1, count, dtype=np.int64)].tolist()
        if self.storage == "stream":
            for i in positions:
                yield read_pixels(self.dataset.items, i, self.input, self.max_pixels)
        else:
            yield from self.decoded.pixels[positions]

    def validation_samples(self, count: int = 16) -> list[SampleImage]:
        """Return up to `count` validation images as stored, with the classes in turn.

        Images that only this run's `max_pixels` allows are reduced: a server checks the samples
        with its own limit.
        """
        index = self.index["val"]
        labels = self.dataset.labels[index]
        rank_in_class = np.zeros(len(index), np.int64)
        for k in np.unique(labels):
            rank_in_class[labels == k] = np.arange((labels == k).sum())
        positions = index[np.lexsort((labels, rank_in_class))[:count]].tolist()

        samples = []
        for j, i in enumerate(positions):
            content = self._read_sample(i)
            name = f"{j:02d}.{read_header(content).format}"
            samples.append(SampleImage(name, content, int(self.dataset.labels[i])))
        return samples

    def _read_sample(self, i: int) -> bytes:
        """Return an image file as stored, or its reduced pixels as PNG where it is very large."""
        content = to_image_bytes(self.dataset.items[i])
        if self.max_pixels <= MAX_PIXELS:
            return content
        try:
            decode(content, self.input)
        except ImageTooLarge:
            pixels = to_pixels(content, training_spec(self.input), self.max_pixels)
            return to_image_bytes(pixels)
        return content


def _check_between(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise DataError(f"{name}: {value} is not between 0 and 1")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise DataError(f"{name}: {value} is not in 0..1")


def _check_significant_bits(value: int | None) -> None:
    if value is not None and not 8 <= value <= SIXTEEN_BITS:
        raise DataError(f"significant_bits: {value} is not in 8..{SIXTEEN_BITS}")


def _check_at_least(name: str, value: int | None, minimum: int) -> None:
    if value is not None and value < minimum:
        raise DataError(f"{name}: {value} is less than {minimum}")


def _cache_directory(cache: str | None) -> Path | None:
    """The directory of the setting `cache`: None is the default one, an empty text is none.

    A user without a home directory has no default one, as in a container that runs as any user.
    """
    if cache is not None:
        return expand_home(cache) if cache else None
    try:
        return cache_home()
    except DataError as error:
        notify(f"decoded images are not cached: {error}")
        return None
