"""The data module: split, order of batches, storage of pixels, unreadable files."""

import itertools
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from models.image import ImageTooLarge, InputSpec, decode
from support.sample_images import (
    CLASSES,
    classify_by_colour,
    make_pixels,
    make_png,
    write_image_folder,
)
from train.audit.findings import collect_findings
from train.audit.summary import summarize
from train.data import Augmentation, DataError, ImageData
from train.data.sampler import EpochOrder

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def ready(source: Path | str, cache: str, **settings: Any) -> ImageData:
    data = ImageData(str(source), cache=cache, workers=settings.pop("workers", 0), **settings)
    data.setup()
    return data


def test_digits_need_nothing_and_stay_gray():
    data = ready("digits", "")
    assert sum(data.counts.values()) == 1797
    assert (data.input.height, data.input.channels, len(data.classes)) == (8, 1, 10)
    images, labels = next(iter(data.train_dataloader()))
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (1, 8, 8)
    assert labels.dtype == torch.int64
    assert images.max() == 255


def test_the_split_is_stratified_disjoint_and_follows_the_seed(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos", count=20)
    data = ready(source, cache, seed=1)
    same = ready(source, cache, seed=1)
    other = ready(source, cache, seed=2)
    parts = [set(data.index[part].tolist()) for part in ("train", "val", "test")]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 60
    for part, count in (("test", 4), ("val", 2), ("train", 14)):
        assert np.bincount(data.dataset.labels[data.index[part]]).tolist() == [count] * 3
        assert data.index[part].tolist() == same.index[part].tolist()
    assert data.index["test"].tolist() != other.index["test"].tolist()


def test_images_stay_in_their_parts_where_others_are_added(tmp_path, cache):
    """A class is added before the others, then each of these grows by a tenth."""
    source = write_image_folder(tmp_path / "photos", count=40)
    test = list_part(ready(source, cache), "test")
    (source / "amber").mkdir()
    for i in range(10):
        (source / "amber" / f"{i}.png").write_bytes(make_png(0, 500 + i))
    with_class = list_part(ready(source, cache), "test")
    assert {name for name in with_class if not name.startswith("amber")} == test
    assert len(with_class) == len(test) + 2

    for label, name in enumerate(CLASSES):
        for i in range(4):
            (source / name / f"more-{i}.png").write_bytes(make_png(label, 600 + i))
    grown = list_part(ready(source, cache), "test")
    assert len(test) == 24
    assert len(test & grown) >= 15


def list_part(data: ImageData, part: str) -> set[str]:
    return {data.dataset.items.name(i) for i in data.index[part].tolist()}


def test_parts_of_the_source_are_kept(tmp_path, cache):
    for part, count in (("train", 8), ("valid", 3), ("test", 2)):
        write_image_folder(tmp_path / "photos" / part, count)
    (tmp_path / "photos" / ".hidden").mkdir()
    (tmp_path / "photos" / "train" / "red" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "photos" / "train" / "red" / "deeper").mkdir()
    (tmp_path / "photos" / "train" / "red" / "deeper" / "one.png").write_bytes(make_png(2, 99))
    data = ready(tmp_path / "photos", cache)
    assert data.counts == {"train": 25, "val": 9, "test": 6}
    assert data.classes == CLASSES


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (("Training", "dev", "Testing"), {"train": 24, "val": 9, "test": 6}),
        (("train", "Validation", "Evaluation"), {"train": 24, "val": 9, "test": 6}),
        (("TRAIN", "eval", "TEST"), {"train": 24, "val": 9, "test": 6}),
    ],
)
def test_parts_are_recognized_by_common_names(tmp_path, cache, names, counts):
    for part, count in zip(names, (8, 3, 2), strict=True):
        write_image_folder(tmp_path / "photos" / part, count)
    data = ready(tmp_path / "photos", cache)
    assert (data.counts, data.classes) == (counts, CLASSES)


def test_parts_with_unknown_names_are_refused(tmp_path, cache):
    for part in ("first", "second"):
        write_image_folder(tmp_path / "photos" / part, 2)
    with pytest.raises(
        DataError, match=r"first, second hold .*\(blue, green, red\).*rename them to train"
    ):
        ready(tmp_path / "photos", cache)


def test_a_class_may_have_the_name_of_a_part(tmp_path, cache):
    source = write_image_folder(tmp_path / "vehicles")
    for name, vehicle in (("blue", "train"), ("green", "test"), ("red", "car")):
        (source / name).rename(source / vehicle)
    assert ready(source, cache).classes == ["car", "test", "train"]
    (source / "car").rename(source / "val")
    with pytest.raises(DataError, match="train/ and test/ with class folders"):
        ready(source, cache)


@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        (
            {"training_set/training_set": 8, "test_set/test_set": 2},
            {"train": 21, "val": 3, "test": 6},
        ),
        ({"seg_train/seg_train": 8, "seg_test/seg_test": 2}, {"train": 21, "val": 3, "test": 6}),
        ({"TrainingSet": 8, "ValidationSet": 3, "TestSet": 2}, {"train": 24, "val": 9, "test": 6}),
        ({"photos_train": 8, "photos_val": 3}, {"train": 18, "val": 9, "test": 6}),
    ],
    ids=str,
)
def test_parts_are_recognized_in_the_shapes_of_downloads(tmp_path, cache, shape, counts):
    for folder, count in shape.items():
        write_image_folder(tmp_path / "photos" / folder, count)
    (tmp_path / "photos" / "__MACOSX" / "photos").mkdir(parents=True)
    data = ready(tmp_path / "photos", cache)
    assert (data.classes, data.counts) == (CLASSES, counts)


def test_images_in_no_part_and_in_no_class_are_counted(tmp_path, cache, capsys):
    photos = tmp_path / "photos"
    write_image_folder(photos / "seg_train/seg_train", 8)
    write_images(photos / "seg_test/seg_test", 4)
    write_images(photos / "seg_pred/seg_pred", 5)
    write_images(photos / "seg_train/seg_train", 1)
    data = ready(photos, cache)
    assert data.counts == {"train": 15, "val": 3, "test": 6}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    for text in (
        "seg_test/seg_test 4 images without class folders",
        "seg_pred 5 images in no part",
        "seg_train/seg_train 1 image outside the class folders",
    ):
        assert text in line


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(make_png(0, 500 + i))


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["deep/photos/*"], "its only folder is photos, .*blue, green, red.*; give .*deep/photos"),
        (["train/images/*"], r"train: its only folder is images, .*move them from .*train/images"),
        (["train", "test"], r"train holds 2 images, but no class folders"),
        (["train_images", "test_images"], "train_images holds 2 images, but no class folders"),
        (["train/train", "test/*"], "train/train holds 2 images, but no class folders"),
        (["val/*", "test/*"], "test, val but no training part"),
        (["first/*", "second/blue", "second/red"], "first, second hold the same folders"),
        (["first/*", "second/blue", "second/red", "more"], "first, second hold the same folders"),
        (["*", "copy/*"], r"copy: holds folders of the same names as its neighbours"),
    ],
    ids=str,
)
def test_an_unclear_shape_is_refused(tmp_path, cache, folders, message):
    root = tmp_path / "deep" if folders[0].startswith("deep/") else tmp_path / "photos"
    for folder in folders:
        path = tmp_path / folder if folder.startswith("deep/") else root / folder
        if path.name == "*":
            write_image_folder(path.parent, 2)
        else:
            write_images(path, 2)
    with pytest.raises(DataError, match=message) as caught:
        ready(root, cache)
    assert "\n" not in str(caught.value)


def test_classes_may_be_sorted_by_date(tmp_path, cache):
    for name in CLASSES:
        for year in ("2023", "2024-05"):
            write_images(tmp_path / "photos" / name / year, 4)
    data = ready(tmp_path / "photos", cache)
    assert (data.classes, sum(data.counts.values())) == (CLASSES, 24)


def test_the_content_decides_what_an_image_is(tmp_path, cache, capsys):
    photos = write_image_folder(tmp_path / "photos")
    for i, name in enumerate(("a.jfif", "b", "c.PNG", "d.backup")):
        (photos / "red" / name).write_bytes(make_png(2, 50 + i))
    (photos / "blue" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    (photos / "blue" / "notes.txt").write_text("blue")
    (photos / "blue" / "empty").touch()
    (photos / "yellow").mkdir()
    (photos / ".net").mkdir()
    (photos / ".net" / "0.png").write_bytes(make_png(2, 1))
    data = ready(photos, cache)
    assert (data.classes, sum(data.counts.values())) == (CLASSES, 40)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert "blue 3 files not JPEG" in line
    assert ".heic" in line
    assert "yellow 0 images" in line
    assert ".net 1 image in a hidden folder" in line


def test_each_real_file_is_read_once(tmp_path, cache, capsys):
    photos = write_image_folder(tmp_path / "photos")
    (photos / "blue" / "above").symlink_to("../..")
    (photos / "blue" / "same.png").symlink_to("000.png")
    (photos / "blue" / "of red.png").symlink_to("../red/000.png")
    (photos / "azure").symlink_to("blue")
    pair = [tmp_path / "one", tmp_path / "two"]
    for folder, other in zip(pair, reversed(pair), strict=True):
        folder.mkdir()
        (folder / "link").symlink_to(other)
    write_images(pair[0], 3)
    (photos / "green" / "more").symlink_to(pair[0])
    os.mkfifo(photos / "green" / "pipe.png")
    data = ready(photos, cache)
    assert (data.classes, sum(data.counts.values())) == (CLASSES, 39)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    for text in (
        "azure 1 read already",
        "blue 1 linked to a folder above",
        "blue 2 read already under another name",
        "green 1 neither file nor folder",
    ):
        assert text in line


def test_class_folders_are_sorted_as_numbers(tmp_path, cache):
    for number in range(12):
        write_images(tmp_path / "photos" / str(number), 4)
    assert ready(tmp_path / "photos", cache).classes == [str(number) for number in range(12)]


def test_both_unicode_forms_of_a_name_are_one_class(tmp_path, cache):
    for part, name in (("train", "caf\u00e9"), ("test", "cafe\u0301")):
        write_images(tmp_path / "photos" / part / name, 6)
        write_images(tmp_path / "photos" / part / "tea", 6)
    data = ready(tmp_path / "photos", cache)
    assert data.classes == ["caf\u00e9", "tea"]
    assert data.counts["test"] == 12


def test_a_part_that_lacks_a_class_is_reported(tmp_path, cache, capsys):
    write_image_folder(tmp_path / "photos/train", 8)
    write_images(tmp_path / "photos/test/red", 3)
    ready(tmp_path / "photos", cache)
    assert "the test part has no image of blue, green; its metrics" in capsys.readouterr().err


def test_pixels_labels_and_statistics_agree(tmp_path, cache):
    data = ready(write_image_folder(tmp_path / "photos"), cache, batch_size=5)
    seen = []
    for images, labels in data.train_dataloader():
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert classify_by_colour(images.numpy()).tolist() == labels.tolist()
        seen.append(images)
    images = torch.cat(seen).double()
    assert len(images) == data.counts["train"]
    assert data.mean == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert data.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist())


def test_a_constant_channel_has_a_standard_deviation_of_one(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos")
    for path in source.rglob("*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path)) * np.uint8([0, 1, 1]))
    data = ready(source, cache)
    assert data.std[2] == 1
    assert min(data.std[:2]) > 10


def test_samples_are_the_stored_files(tmp_path, cache):
    data = ready(write_image_folder(tmp_path / "photos"), cache, val_fraction=0.3)
    samples = data.validation_samples(6)
    files = {path.read_bytes() for path in (tmp_path / "photos").rglob("*.png")}
    assert [label for _, _, label in samples] == [0, 1, 2, 0, 1, 2]
    assert all(content in files for _, content, _ in samples)
    assert len({name for name, _, _ in samples}) == 6


@pytest.mark.parametrize("memory", ["memory", "stream"])
def test_an_epoch_resumes_at_any_step(tmp_path, cache, memory):
    settings = {"memory": memory, "batch_size": 4, "seed": 3}
    source = write_image_folder(tmp_path / "photos")
    loader = ready(source, cache, **settings).train_dataloader()
    loader.sampler.set_epoch(2)
    whole = list(loader)
    assert loader.state_dict() == {"epoch": 2, "step": len(loader)}
    resumed = ready(source, cache, **settings).train_dataloader()
    resumed.load_state_dict({"epoch": 2, "step": 3})
    resumed.sampler.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == len(whole) - 3
    for (images, labels), (again, same) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, same)
    resumed.sampler.set_epoch(3)
    assert len(list(resumed)) == len(whole)
    assert not torch.equal(next(iter(resumed))[0], whole[0][0])


def test_a_stream_gives_what_memory_gives(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos", size=48)
    for part in ("train_dataloader", "test_dataloader"):
        kept = getattr(ready(source, cache, memory="memory", size=32), part)()
        streamed = getattr(ready(source, cache, memory="stream", workers=2, size=32), part)()
        for (images, labels), (same, truth) in zip(kept, streamed, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(labels, truth)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_disappears_from_a_stream_is_named_in_one_line(tmp_path, cache, workers):
    source = write_image_folder(tmp_path / "photos")
    data = ready(source, cache, memory="stream", workers=workers)
    (source / data.dataset.items.name(int(data.index["train"][3]))).unlink()
    with pytest.raises(
        DataError, match=r"^\w+/\d+\.png: can't be read any more: No such file or directory$"
    ):
        list(data.train_dataloader())


def test_data_larger_than_the_memory_share_is_streamed(tmp_path, cache, capsys):
    data = ready(write_image_folder(tmp_path / "photos"), cache, memory_share=1e-9)
    assert data.storage == "stream"
    assert "streamed by workers" in capsys.readouterr().err
    assert sum(len(labels) for _, labels in data.train_dataloader()) == data.counts["train"]


def test_only_training_crops_at_random_from_the_margin_of_short_side(tmp_path, cache):
    data = ready(
        write_image_folder(tmp_path / "photos", size=64),
        cache,
        size=32,
        short_side=40,
        batch_size=64,
    )
    first = data.train_dataloader()
    second = data.train_dataloader()
    second.sampler.set_epoch(1)
    assert next(iter(first))[0].shape[1:] == (3, 32, 32)
    assert not torch.equal(next(iter(first))[0].sum((0, 1)), next(iter(second))[0].sum((0, 1)))
    assert all(
        torch.equal(a, b)
        for (a, _), (b, _) in zip(data.val_dataloader(), data.val_dataloader(), strict=True)
    )


def test_validation_and_test_are_never_augmented(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos")
    strong = Augmentation(flip="random", crop_padding=8, cutout=16, brightness=0.5, mixup=1.0)
    plain = ready(source, cache)
    augmented = ready(source, cache, augment=strong)
    for part in ("val_dataloader", "test_dataloader"):
        for (images, labels), (same, truth) in zip(
            getattr(plain, part)(), getattr(augmented, part)(), strict=True
        ):
            assert torch.equal(images, same)
            assert torch.equal(labels, truth)
    assert not torch.equal(
        next(iter(plain.train_dataloader()))[0], next(iter(augmented.train_dataloader()))[0]
    )


@pytest.mark.parametrize(
    ("images", "world", "batch"),
    [
        (100, 1, 16),
        (100, 2, 16),
        (97, 4, 8),
        (33, 2, 16),
        (5, 4, 8),
        (102, 1, 101),
        (34, 2, 16),
        (35, 2, 16),
        (3, 1, 1),
    ],
)
def test_every_image_is_seen_once_an_epoch_by_processes_in_step(images, world, batch):
    orders = [EpochOrder(np.arange(images), batch, True, 7, rank, world) for rank in range(world)]
    epochs = [order.batches(3) for order in orders]
    assert {len(epoch) for epoch in epochs} == {orders[0].steps}
    steps = list(itertools.chain.from_iterable(epochs))
    assert sorted(np.concatenate(steps).tolist()) == list(range(images))
    sizes = [len(step) for step in steps]
    assert batch == 1 or images == 5 or min(sizes) > 1  # for batch norm
    assert orders[0].steps == 1 or min(sizes) >= batch // 2
    assert max(sizes) <= batch + 2
    together = EpochOrder(np.arange(images), batch * world, True, 7).batches(3)
    for step, batches in enumerate(zip(*epochs, strict=True)):
        if step < len(together) - 2 and step < orders[0].steps - 2:
            assert sorted(np.concatenate(batches).tolist()) == sorted(together[step].tolist())


def test_balanced_sampling_and_class_weights_compensate_imbalance(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos", count=40)
    for path in sorted((source / "red").iterdir())[8:]:
        path.unlink()
    data = ready(source, cache, sampling="balanced", batch_size=16)
    counts = np.bincount(data.dataset.labels[data.index["train"]])
    assert data.class_weights.numpy() * counts == pytest.approx(counts.mean())
    drawn = np.zeros(3)
    for epoch in range(20):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        drawn += np.bincount(torch.cat([labels for _, labels in loader]).numpy(), minlength=3)
    assert drawn / drawn.sum() == pytest.approx([1 / 3] * 3, abs=0.05)


def test_few_unreadable_files_are_left_out_and_listed(tmp_path, cache, capsys):
    source = write_image_folder(tmp_path / "photos", count=40)
    (source / "red" / "000.png").write_bytes(b"this is no image")
    (source / "blue" / "001.png").write_bytes(make_png(0, 1)[:200])
    data = ready(source, cache)
    assert sum(data.counts.values()) == 118
    assert dict(data.unreadable).keys() == {"red/000.png", "blue/001.png"}
    assert dict(data.unreadable)["blue/001.png"].startswith("cut short")
    printed = capsys.readouterr().err
    assert "2 of 120" in printed
    assert "red/000.png" in printed


def test_a_jpeg_that_lacks_a_part_of_its_pixels_is_left_out(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos", count=40)
    jpeg = cv2.imencode(".jpg", make_pixels(2, 0, 200))[1].tobytes()
    (source / "red" / "whole.jpg").write_bytes(jpeg)
    (source / "red" / "half.jpg").write_bytes(jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9")
    unreadable = dict(ready(source, cache).unreadable)
    assert unreadable.keys() == {"red/half.jpg"}
    assert "cut short" in unreadable["red/half.jpg"]


def write_twelve_bit_folder(root: Path) -> Path:
    """Write gray PNG files of 16 bits a sample, of which 12 are used."""
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(12):
            gray = cv2.cvtColor(make_pixels(label, i, 64), cv2.COLOR_BGR2GRAY)
            gray[0, 0] = 255
            cv2.imwrite(str(root / name / f"{i}.png"), gray.astype(np.uint16) << 4)
    return root


@pytest.mark.parametrize("memory", ["memory", "stream"])
def test_images_of_twelve_bits_use_the_whole_range_in_training_as_in_serving(
    tmp_path, cache, memory
):
    source = write_twelve_bit_folder(tmp_path / "scans")
    data = ready(source, cache, memory=memory)
    manifest_input = InputSpec.model_validate_json(data.input.model_dump_json())
    assert manifest_input.significant_bits == 12

    images = data.training_images(100).permute(0, 2, 3, 1).numpy()
    positions = data.index["train"].tolist()
    assert images.max() >= 254
    for image, i in zip(images, positions, strict=True):
        served = decode((source / data.dataset.items.name(i)).read_bytes(), manifest_input)
        assert np.array_equal(image, served)


@pytest.mark.parametrize(
    ("significant_bits", "words"),
    [
        (None, "36 images with 16 bits a sample, of which 12 are read: 4095 is white"),
        (10, "36 of 36 images with 16 bits a sample have samples above 1023"),
        (16, "use only 12 of them and are dark; set data.significant_bits: 12"),
    ],
)
def test_the_audit_says_which_bits_of_sixteen_are_read(tmp_path, significant_bits, words):
    source = write_twelve_bit_folder(tmp_path / "scans")
    data = ready(source, "", significant_bits=significant_bits)
    assert any(words in line for line in summarize(collect_findings(data)))


@pytest.mark.parametrize("memory", ["memory", "stream"])
def test_the_largest_image_is_a_setting(tmp_path, cache, memory):
    source = write_image_folder(tmp_path / "photos", count=40)
    (source / "red" / "large.png").write_bytes(make_png(2, 0, 64))
    data = ready(source, cache, memory=memory, max_pixels=2000)
    assert dict(data.unreadable).keys() == {"red/large.png"}
    assert "64x64 pixels are more than the 2000 allowed" in data.unreadable[0].problem
    assert not ready(source, cache, memory=memory).unreadable


def test_a_sample_larger_than_servers_allow_is_reduced(tmp_path):
    """50 megapixels are the default of a server that checks the samples of a bundle."""
    source = tmp_path / "photos"
    for part in ("train", "val", "test"):
        write_image_folder(source / part, count=2)
    white = Image.new("1", (8000, 6400), 1)
    white.save(source / "val" / "red" / "large.png")
    with pytest.raises(ImageTooLarge):
        decode((source / "val" / "red" / "large.png").read_bytes(), InputSpec(height=32, width=32))

    data = ready(source, "", max_pixels=60_000_000)
    assert not data.unreadable
    samples = [decode(sample.content, data.input) for sample in data.validation_samples()]
    assert len(samples) == 7
    assert any((pixels == 255).all() for pixels in samples)


def test_more_unreadable_files_than_allowed_stop_the_run(tmp_path, cache):
    source = write_image_folder(tmp_path / "photos", count=10)
    for name in ("000.png", "001.png", "002.png"):
        (source / "red" / name).write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"3 of 30 images can't be read, more than max_unreadable 5%.*red/000\.png"
    ):
        ready(source, cache)
    assert sum(ready(source, cache, max_unreadable=0.2).counts.values()) == 27


def test_sizes_and_colours_follow_the_images(tmp_path, cache):
    source = tmp_path / "photos"
    for label, name in enumerate(CLASSES):
        (source / name).mkdir(parents=True)
        for i in range(6):
            gray = cv2.cvtColor(make_pixels(label, i), cv2.COLOR_BGR2GRAY)
            cv2.imwrite(str(source / name / f"{i}.png"), gray)
    assert ready(source, cache).input.model_dump(include={"height", "channels"}) == {
        "height": 32,
        "channels": 1,
    }
    cv2.imwrite(str(source / "red" / "large.png"), make_pixels(2, 9, 300))
    assert ready(source, cache).input.model_dump(include={"height", "channels"}) == {
        "height": 224,
        "channels": 3,
    }


def test_a_wrong_folder_is_refused_in_one_line(tmp_path, cache):
    def assert_refused(source: Path | str, message: str, **settings: Any) -> None:
        with pytest.raises(DataError, match=message) as caught:
            ready(source, cache, **settings)
        assert "\n" not in str(caught.value)

    assert_refused(tmp_path / "nowhere", "no such folder, and none")
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "no images")
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "a.png").write_bytes(make_png(0, 0))
    assert_refused(loose, "no class folders")
    write_image_folder(tmp_path / "single", count=1)
    assert_refused(tmp_path / "single", "'blue' has 1 image, too few")
    one = tmp_path / "one"
    (one / "red").mkdir(parents=True)
    for i in range(5):
        (one / "red" / f"{i}.png").write_bytes(make_png(2, i))
    assert_refused(one, "one class, 'red'")
    extra_class = write_image_folder(tmp_path / "extra class" / "train").parent
    (extra_class / "test" / "yellow").mkdir(parents=True)
    (extra_class / "test" / "yellow" / "0.png").write_bytes(make_png(0, 0))
    assert_refused(extra_class, "'yellow' is not in the training part")
    broken = tmp_path / "broken"
    for name in CLASSES:
        (broken / name).mkdir(parents=True)
        for i in range(4):
            (broken / name / f"{i}.jpg").write_bytes(b"text")
    assert_refused(broken, r"not one of .* could be read; the last: red/3\.jpg")
    assert_refused("digits", "val_fraction: 0 is not", val_fraction=0)
    assert_refused("digits", "short_side: 6 is less", short_side=6)


def test_a_data_set_missing_at_root_names_the_expected_folder(tmp_path, cache):
    with pytest.raises(DataError, match=r"no cifar10 there.*cifar-10-batches-py"):
        ready("cifar10", cache, root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_unreadable", 1.5),
        ("max_unreadable", -0.1),
        ("memory_share", 7.0),
        ("memory_share", -1.0),
        ("size", 0),
        ("short_side", 0),
        ("max_pixels", 0),
        ("significant_bits", 7),
        ("workers", -1),
        ("batch_size", 0),
    ],
)
def test_an_invalid_setting_is_named(name, value):
    with pytest.raises(DataError, match=f"^{name}: {value} is "):
        ImageData("digits", **{name: value})
