"""Augmentation, mostly through the batches of training."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.image import InputSpec
from support.sample_images import write_image_folder
from train.data import Augmentation, ImageData
from train.data.augment import Augmenter
from train.data.color_jitter import jitter
from train.data.geometric import random_resized_crop_and_rotate
from train.data.input_size import training_spec
from train.data.pixels import read_pixels
from train.data.sampler import keyed_rng

EVERYTHING = {
    "flip": "random",
    "crop_padding": 3,
    "rotation": 10.0,
    "random_resized_crop": 0.5,
    "brightness": 0.2,
    "contrast": 0.2,
    "saturation": 0.2,
    "hue": 0.1,
    "cutout": 6,
    "erasing": 0.5,
    "mixup": 0.2,
    "cutmix": 1.0,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("augment") / "photos")


class Epochs:
    """Images and labels of whole epochs in the order of the files, uint8 [N, C, H, W]."""

    def __init__(self, source: Path, **settings: Any):
        self.data = ImageData(
            str(source), cache="", workers=0, batch_size=64, augment=Augmentation(**settings)
        )
        self.data.setup()

    def __call__(self, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
        loader = self.data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        ((images, labels),) = loader
        order = np.argsort(loader.order.batches(epoch)[0])
        return images.numpy()[order], labels.numpy()[order]

    def plain(self) -> np.ndarray:
        return self.data.decoded.pixels[self.data.index["train"]].transpose(0, 3, 1, 2)


def test_augmented_batches_keep_shape_and_type_and_are_deterministic(photos):
    epochs = Epochs(photos, **EVERYTHING)
    again = Epochs(photos, **EVERYTHING)
    images, labels = epochs(1)
    assert images.dtype == np.uint8
    assert images.shape == epochs.plain().shape
    assert labels.shape == (len(images), 3)
    assert np.array_equal(images, again(1)[0])
    assert not np.array_equal(images, again(2)[0])


def test_images_are_unchanged_by_default(photos):
    epochs = Epochs(photos)
    assert np.array_equal(epochs()[0], epochs.plain())


@pytest.mark.parametrize(("name", "value"), list(EVERYTHING.items()))
def test_each_augmentation_changes_images(photos, name, value):
    epochs = Epochs(photos, **{name: value})
    assert not np.array_equal(epochs()[0], epochs.plain())


def test_random_flips_mirror_about_half(photos):
    epochs = Epochs(photos, flip="random")
    plain = epochs.plain()
    shares = []
    for epoch in range(20):
        images = epochs(epoch)[0]
        mirrored = (images == plain[..., ::-1]).all((1, 2, 3))
        assert (mirrored | (images == plain).all((1, 2, 3))).all()
        shares.append(mirrored.mean())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.1)


def test_alternating_flips_show_both_sides_in_two_epochs(photos):
    epochs = Epochs(photos, flip="alternating")
    plain = epochs.plain()
    sides = [(epochs(epoch)[0] == plain[..., ::-1]).all((1, 2, 3)) for epoch in range(4)]
    assert 0 < sides[0].mean() < 1
    assert all((one != two).all() for one, two in pairwise(sides))


def test_first_sides_of_alternating_flips_are_independent():
    def sides(seed: int) -> np.ndarray:
        augment = Augmenter(
            Augmentation(flip="alternating"), InputSpec(height=4, width=4), [0.0] * 3, 2, 4000, seed
        )
        images = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4).expand(4000, -1, -1, -1)
        rows = torch.arange(4000)
        result, _ = augment(images, torch.zeros_like(rows), rows, 0, np.random.default_rng(0))
        return (result != images).any(3).any(2).any(1).numpy() * 2.0 - 1

    one = sides(0)
    other = sides(1)
    assert np.array_equal(one, sides(0))
    assert abs(one.mean()) < 0.06  # four standard errors
    for lag in range(1, 20):
        assert abs((one[lag:] * one[:-lag]).mean()) < 0.065, lag
        assert abs((one[lag:] * other[:-lag]).mean()) < 0.065, lag
        assert abs((other[lag:] * one[:-lag]).mean()) < 0.065, lag
    assert abs((one * other).mean()) < 0.065


@pytest.mark.parametrize("border", ["reflect", "zero"])
def test_padded_crops_are_windows_of_the_padded_image(photos, border):
    epochs = Epochs(photos, crop_padding=2, border=border)
    padded = np.pad(
        epochs.plain(),
        ((0, 0), (0, 0), (2, 2), (2, 2)),
        "reflect" if border == "reflect" else "constant",
    )
    offsets = set()
    for image, wide in zip(epochs()[0], padded, strict=True):
        matches = []
        for y, x in product(range(5), range(5)):
            if np.array_equal(image, wide[:, y : y + 32, x : x + 32]):
                matches.append((y, x))
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) > 8


def test_rotations_are_about_the_centre(photos):
    barely_rotated = Epochs(photos, rotation=1e-4)()[0].astype(int)
    assert np.abs(barely_rotated - Epochs(photos).plain()).max() <= 1

    square = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)

    class Right:  # always the upper end of the range
        uniform = staticmethod(lambda low, high, count: np.full(count, high))

    rotated = random_resized_crop_and_rotate(square, (8, 8), 0, 90.0, "zero", Right())
    assert torch.equal(rotated, square.rot90(-1, (2, 3)))


def test_rotation_keeps_scale_and_the_crop_from_a_margin(tmp_path):
    source = write_image_folder(tmp_path / "photos", size=48)
    settings = {"cache": "", "workers": 0, "batch_size": 64, "size": 32, "short_side": 40}
    turned = ImageData(str(source), augment=Augmentation(rotation=1e-4), **settings)
    turned.setup()
    spec = training_spec(turned.input)
    kept = np.stack([read_pixels(turned.dataset.items, i, spec) for i in range(36)])
    kept = kept.transpose(0, 3, 1, 2).astype(int)
    loader = turned.train_dataloader()
    ((images, _),) = loader
    offsets = set()
    for row, image in zip(loader.order.batches(0)[0], images.numpy().astype(int), strict=True):
        matches = []
        for y, x in product(range(9), range(9)):
            if np.abs(image - kept[row][:, y : y + 32, x : x + 32]).max() <= 1:
                matches.append((y, x))
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) > 8


def test_cutout_fills_with_the_mean_colour(photos):
    epochs = Epochs(photos, cutout=8)
    mean = np.round(epochs.data.mean).astype(np.uint8).reshape(3, 1, 1)
    images = epochs()[0]
    plain = epochs.plain()
    changed = (images != plain).any(1)
    assert ((images == mean).all(1) | ~changed).all()
    assert 16 <= changed.sum((1, 2)).max() <= 64


def test_erasing_changes_the_set_share_of_images(photos):
    epochs = Epochs(photos, erasing=0.25)
    changed = [(epochs(epoch)[0] != epochs.plain()).any((1, 2, 3)).mean() for epoch in range(20)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_labels_match_the_pixels(photos, name):
    images, labels = Epochs(photos, **{name: 1.0})()
    assert labels.sum(1) == pytest.approx(1)
    assert ((labels > 0.05).sum(1) > 1).any()
    colour = images.mean((2, 3))[:, ::-1].astype(float)  # the three classes are blue, green, red
    colour -= colour.mean(1, keepdims=True)
    assert np.corrcoef(colour.ravel(), (labels - labels.mean(1, keepdims=True)).ravel())[0, 1] > 0.9


def test_colour_jitter_of_gray_stays_gray_and_full_saturation_loss_makes_gray(photos):
    rng = np.random.default_rng(0)
    gray = torch.from_numpy(rng.integers(0, 256, (4, 1, 8, 8), np.uint8)).expand(-1, 3, -1, -1)
    turned = jitter(gray, 0, 0, 0.5, 0.5, rng).int()
    assert (turned - gray.int()).abs().max() <= 2

    class Low:  # always the lower end of the range
        uniform = staticmethod(lambda low, high, count: np.full(count, low))

    coloured = torch.from_numpy(rng.integers(0, 256, (4, 3, 8, 8), np.uint8))
    faded = jitter(coloured, 0, 0, 1.0, 0, Low()).int()
    assert (faded.amax(1) - faded.amin(1)).max() <= 1
    assert jitter(coloured, 1.0, 0, 0, 0, Low()).max() == 0


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"augment\.hue: 0\.7 is not between 0 and 0\.5"):
        Augmentation(hue=0.7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives(photos):
    data = Epochs(photos).data
    augment = Augmenter(
        Augmentation(**EVERYTHING), data.input, data.mean, 3, len(data.dataset.items), 0
    )
    images = torch.from_numpy(data.decoded.pixels).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.dataset.labels)
    rows = torch.arange(len(images))

    on_cpu, labels_on_cpu = augment(images, labels, rows, 0, keyed_rng("test", 0))
    on_gpu, labels_on_gpu = augment(
        images.cuda(), labels.cuda(), rows.cuda(), 0, keyed_rng("test", 0)
    )

    assert (on_cpu.int() - on_gpu.cpu().int()).abs().max() <= 2
    assert torch.allclose(labels_on_cpu, labels_on_gpu.cpu(), atol=1e-3)


@pytest.mark.parametrize("min_area", [0.35, 0.9])
def test_random_resized_crops_have_the_documented_size_and_shape(min_area):
    # The two channels of a pixel are 4 times its x and its y.
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8)
    across = ramp.view(1, 64).expand(64, 64)
    down = ramp.view(64, 1).expand(64, 64)
    images = torch.stack([across, down]).expand(500, 2, 64, 64)
    augment = Augmenter(
        Augmentation(random_resized_crop=min_area),
        InputSpec(height=64, width=64),
        [0.0] * 2,
        2,
        500,
        0,
    )
    crops, _ = augment(
        images, torch.zeros(500, dtype=torch.int64), torch.arange(500), 0, np.random.default_rng(0)
    )

    positions = crops.double().flatten(2)
    width, height = ((positions.amax(2) - positions.amin(2)) / 252).T
    area = width * height
    aspect_ratio = width / height
    assert min_area - 0.01 < area.min() < min_area + 0.05
    assert 0.95 < area.max() < 1.01
    assert aspect_ratio.min() > 3 / 4 - 0.01
    assert aspect_ratio.max() < 4 / 3 + 0.01
    assert positions[:, 0].mean(1).std() > 4 * (1 - min_area)  # not always the middle
