"""The data audit on data with planted faults: as a function, a command and a part of training."""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from support import RANDOM_CONVNET
from support.sample_images import CLASSES, make_pixels, make_png, write_image_folder
from train import audit
from train.audit.duplicates import SearchLimits, find_near_duplicates
from train.data import Augmentation, ImageData

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def audit_source(
    source: Path | str, out: Path | None = None, **settings: Any
) -> tuple[ImageData, audit.Findings]:
    """Audit a source with settings of the data module; nothing is cached by default."""
    data = ImageData(str(source), cache=settings.pop("cache", ""), workers=0, **settings)
    data.setup()
    return data, audit.run_audit(data, out)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """60 + 24 images with planted faults.

    In the test part: an exact copy and two near copies (a brighter JPEG and a crop). In training:
    an exact copy with another label, a truncated file, an unusual size, a gray picture, and a class
    with few images.
    """
    root = tmp_path_factory.mktemp("faulty") / "photos"
    write_image_folder(root / "train", 20)
    write_image_folder(root / "test", 8, first=100)
    train = root / "train"
    test = root / "test"
    (test / "red" / "copy.png").write_bytes((train / "red" / "003.png").read_bytes())
    brighter = cv2.convertScaleAbs(make_pixels(1, 4), alpha=0.8, beta=30)
    cv2.imwrite(str(test / "green" / "brighter.jpg"), brighter, [cv2.IMWRITE_JPEG_QUALITY, 70])
    cropped = cv2.resize(make_pixels(0, 5)[2:-2, 2:-2], (32, 32))
    cv2.imwrite(str(test / "blue" / "cropped.png"), cropped)
    (train / "blue" / "relabelled.png").write_bytes((train / "green" / "007.png").read_bytes())
    (train / "red" / "short.png").write_bytes(make_png(2, 50)[:300])
    cv2.imwrite(str(train / "red" / "wide.png"), cv2.resize(make_pixels(2, 51), (320, 32)))
    cv2.imwrite(
        str(train / "red" / "gray.png"), cv2.cvtColor(make_pixels(2, 52), cv2.COLOR_BGR2GRAY)
    )
    (train / "rare").mkdir()
    for i in range(3):
        (train / "rare" / f"{i}.png").write_bytes(make_png(0, 60 + i))
    return root


@pytest.fixture(scope="module")
def audited(faulty, tmp_path_factory) -> tuple[ImageData, dict, Path]:
    out = tmp_path_factory.mktemp("audit")
    return *audit_source(faulty, out, size=32), out


def test_images_whose_header_pillow_refuses_are_audited(tmp_path):
    """Pillow refuses a wrong checksum of a text, which decoding does not need."""
    root = write_image_folder(tmp_path / "photos", 8)
    text = b"\0\0\0\5tEXta\0bcd" + b"\0\0\0\0"
    for file in root.rglob("*.png"):
        png = file.read_bytes()
        file.write_bytes(png[:33] + text + png[33:])  # after the first chunk

    data, findings = audit_source(root)

    assert data.unreadable == []
    assert findings["odd"]["sizes"] == {"32x32": 24}
    assert findings["odd"]["modes"] == {"unknown": 24}
    assert findings["odd"]["count"] == 0


def test_exact_copies_are_found_within_and_across_parts(audited):
    _, findings, _ = audited
    exact = [
        {pair["first"]["file"], pair["second"]["file"]}
        for pair in findings["exact_duplicates"]["pairs"]
    ]
    assert {"train/red/003.png", "test/red/copy.png"} in exact
    assert {"train/green/007.png", "train/blue/relabelled.png"} in exact
    assert findings["exact_duplicates"]["count"] == 2
    assert findings["exact_duplicates"]["across_parts"] == 1
    assert findings["exact_duplicates"]["other_label"] == 1


@pytest.mark.parametrize("count", [1, 2])
def test_lines_of_the_summary_agree_with_their_number(audited, count):
    _, findings, _ = audited
    findings = copy.deepcopy(findings)
    findings["labels"] |= {"count": count, "accuracy": 0.9, "checked": True}
    findings["odd"]["count"] = count
    findings["leakage"]["test"]["count"] = count
    findings["near_duplicates"]["count"] = count

    text = "\n".join(audit.summarize(findings))

    ending = "" if count == 1 else "s"
    verb = "has" if count == 1 else "have"
    assert f"{count} suspicious label{ending} to check, by" in text
    assert f"{count} image{ending} of unusual size" in text
    assert re.search(rf"{count} test image{ending} \(\S+\) {verb} an exact", text)
    assert f"{count} near duplicate{ending}, " in text


def test_only_brighter_and_cropped_copies_are_near_duplicates(audited):
    _, findings, _ = audited
    near = [
        {pair["first"]["file"], pair["second"]["file"]}
        for pair in findings["near_duplicates"]["pairs"]
    ]
    assert sorted(map(sorted, near)) == [
        ["test/blue/cropped.png", "train/blue/005.png"],
        ["test/green/brighter.jpg", "train/green/004.png"],
    ]


def test_leaked_test_images_are_marked_in_each_batch(audited):
    data, findings, _ = audited
    names = [data.dataset.items.name(i) for i in data.index["test"][data.leaked_test_rows]]
    assert sorted(names) == [
        "test/blue/cropped.png",
        "test/green/brighter.jpg",
        "test/red/copy.png",
    ]
    assert findings["leakage"]["test"]["count"] == 3
    marked = [
        data.leaked_in_test_batch(step).numpy() for step in range(len(data.test_dataloader()))
    ]
    assert np.flatnonzero(np.concatenate(marked)).tolist() == data.leaked_test_rows.tolist()


def test_leaked_validation_images_are_reported(tmp_path):
    for part, first in (("train", 0), ("val", 100), ("test", 200)):
        write_image_folder(tmp_path / "photos" / part, 8, first=first)
    (tmp_path / "photos/val/red/copy.png").write_bytes(
        (tmp_path / "photos/train/red/003.png").read_bytes()
    )
    _, findings = audit_source(tmp_path / "photos", tmp_path / "out", size=32)
    (line,) = [line for line in audit.summarize(findings) if "WARNING" in line]
    assert line.startswith(
        "WARNING: 1 validation image (4.0%) has an exact or near duplicate in the training part"
    )
    assert "1 validation image (4.00%)" in (tmp_path / "out" / "index.html").read_text()


def test_unreadable_unusual_and_rare_are_listed(audited):
    _, findings, _ = audited
    assert [file["file"] for file in findings["unreadable"]] == ["train/red/short.png"]
    assert findings["unreadable"][0]["problem"].startswith("cut short")
    unusual = {image["file"]: image["why"] for image in findings["odd"]["images"]}
    assert unusual == {"train/red/wide.png": "size 320x32", "train/red/gray.png": "mode L"}
    assert {row["label"] for row in findings["class_counts"] if row["note"]} == {"rare"}


def test_the_page_loads_nothing_from_elsewhere(audited):
    _, findings, out = audited
    text = (out / "index.html").read_text()
    assert json.loads((out / "audit.json").read_text()) == findings
    assert not re.search(r"(src|href)=\"(?!data:|#|label\")", text)
    assert "3 test images" in text
    assert text.count("<img") >= 2 * (
        findings["exact_duplicates"]["count"] + findings["near_duplicates"]["count"]
    )


def test_file_names_are_escaped_in_the_page(tmp_path):
    source = write_image_folder(tmp_path / "photos")
    (source / "red" / "<script>alert(1)<&.png").write_bytes(
        (source / "red" / "003.png").read_bytes()
    )
    audit_source(source, tmp_path / "out")
    assert "<script>" not in (tmp_path / "out" / "index.html").read_text()


def test_wrong_labels_are_listed_first(tmp_path):
    digits = load_digits()
    wrong = np.random.default_rng(0).choice(len(digits.target), 20, replace=False)
    label = digits.target.copy()
    label[wrong] = (label[wrong] + 3) % 10
    for i, (image, k) in enumerate(zip(digits.images, label, strict=True)):
        directory = tmp_path / "photos" / str(k)
        directory.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(directory / f"{i:04d}.png"), (image * 15).astype(np.uint8))
    _, findings = audit_source(tmp_path / "photos")
    assert findings["labels"]["accuracy"] > 0.9
    first = [int(Path(image["file"]).stem) for image in findings["labels"]["suspects"][:20]]
    assert len(set(first) & set(wrong.tolist())) >= 16
    right = [
        int(image["suggested"]) == digits.target[int(Path(image["file"]).stem)]
        for image in findings["labels"]["suspects"][:20]
    ]
    assert np.mean(right) > 0.8


@pytest.fixture(scope="module")
def digits_findings() -> audit.Findings:
    """The findings in digits. Read only."""
    _, findings = audit_source("digits")
    return findings


def test_clean_data_causes_no_warning(digits_findings):
    findings = digits_findings
    assert findings["leakage"]["test"]["count"] == 0
    assert not any("WARNING" in line for line in audit.summarize(findings))


@pytest.mark.parametrize(("size", "looked_for"), [(23, False), (24, True)])
def test_images_too_small_for_near_duplicates_are_reported(tmp_path, size, looked_for):
    source = write_image_folder(tmp_path / "photos", 20)
    cv2.imwrite(
        str(source / "red/brighter.png"), cv2.convertScaleAbs(make_pixels(2, 3), alpha=0.9, beta=20)
    )
    _, findings = audit_source(source, tmp_path / "out", size=size)
    assert findings["near_duplicates"]["count"] == looked_for
    assert findings["near_duplicates"]["looked_for"] == looked_for
    lines = audit.summarize(findings)
    assert any("near duplicates are not searched" in line for line in lines) != looked_for
    page = (tmp_path / "out/index.html").read_text()
    assert ("Not searched: that needs images of 24 pixels" in page) != looked_for


def test_findings_are_cached_for_the_same_data_and_split(faulty, tmp_path):
    cache = str(tmp_path / "cache")
    first, findings = audit_source(faulty, cache=cache, size=32)
    (cached,) = (tmp_path / "cache" / "audit").glob("*.json")
    cached.write_text(json.dumps(findings | {"digest": "read from the cache"}))

    again, same = audit_source(faulty, cache=cache, size=32)

    assert same == findings | {"digest": "read from the cache"}
    assert again.leaked_test_rows.tolist() == first.leaked_test_rows.tolist()


def test_renamed_files_are_audited_again(tmp_path):
    source = write_image_folder(tmp_path / "photos")
    cache = str(tmp_path / "cache")
    (source / "red" / "011.png").write_bytes((source / "red" / "003.png").read_bytes())
    audit_source(source, cache=cache)
    (source / "red" / "011.png").rename(source / "red" / "renamed.png")
    _, findings = audit_source(source, cache=cache)
    assert findings["exact_duplicates"]["pairs"][0]["second"]["file"] == "red/renamed.png"


def darker_noisy_copy(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    copy = pixels * (1 - 0.4 * rng.random()) + 10 * rng.standard_normal(pixels.shape)
    return np.clip(copy, 0, 255).astype(np.uint8)


def test_a_leak_of_many_copies_is_found(tmp_path):
    """Images that were multiplied, darker and noisier, before they were split."""
    rng = np.random.default_rng(0)
    originals = 60
    copies = 4
    for part, numbers in (("train", range(1)), ("test", range(1, copies + 1))):
        for label, name in enumerate(CLASSES):
            directory = tmp_path / "photos" / part / name
            directory.mkdir(parents=True)
            for i, k in itertools.product(range(originals // 3), numbers):
                copy = darker_noisy_copy(make_pixels(label, i), rng)
                cv2.imwrite(str(directory / f"{i}-{k}.png"), copy)

    _, findings = audit_source(tmp_path / "photos", size=32)

    assert findings["leakage"]["test"]["count"] > 0.95 * originals * copies
    assert findings["near_duplicates"]["complete"]


def test_a_search_that_leaves_out_candidates_is_reported(digits_findings):
    rng = np.random.default_rng(0)
    pixels = [darker_noisy_copy(make_pixels(i % 3, i), rng) for i in range(60) for _ in range(5)]
    few = SearchLimits(min_pairs=100)

    pairs = find_near_duplicates(
        np.stack(pixels), np.ones(len(pixels), bool), torch.device("cpu"), limits=few
    )

    assert not pairs.complete
    findings = copy.deepcopy(digits_findings)
    findings["near_duplicates"]["complete"] = False
    lines = audit.summarize(findings)
    assert any("only the closest pairs were compared" in line for line in lines)


def test_mirror_images_are_duplicates_where_training_flips(tmp_path):
    write_image_folder(tmp_path / "photos/train", 20)
    write_image_folder(tmp_path / "photos/test", 8, first=100)
    file = tmp_path / "photos/test/green/mirrored.jpg"
    cv2.imwrite(str(file), cv2.flip(make_pixels(1, 4), 1), [cv2.IMWRITE_JPEG_QUALITY, 80])
    _, findings = audit_source(tmp_path / "photos", size=32, cache=str(tmp_path / "cache"))
    assert findings["near_duplicates"]["count"] == 0
    flipped = Augmentation(flip="alternating")
    data, findings = audit_source(
        tmp_path / "photos", size=32, cache=str(tmp_path / "cache"), augment=flipped
    )
    (pair,) = findings["near_duplicates"]["pairs"]
    assert [pair[side]["file"] for side in ("first", "second")] == [
        "test/green/mirrored.jpg",
        "train/green/004.png",
    ]
    assert (
        data.dataset.items.name(data.index["test"][data.leaked_test_rows[0]])
        == "test/green/mirrored.jpg"
    )


def test_many_images_are_searched_by_cells():
    rng = np.random.default_rng(0)
    originals = np.stack([make_pixels(i % 3, i) for i in range(400)])
    noise = rng.integers(-6, 7, originals[:30].shape)
    copies = np.clip(originals[:30].astype(int) + noise, 0, 255).astype(np.uint8)
    pixels = np.concatenate([originals, copies])
    usable = np.ones(len(pixels), bool)
    cpu = torch.device("cpu")

    exhaustive = find_near_duplicates(pixels, usable, cpu)
    cells = SearchLimits(max_exhaustive=100, cell_size=50)
    approximate = find_near_duplicates(pixels, usable, cpu, limits=cells)

    pairs = set(zip(exhaustive.first.tolist(), exhaustive.second.tolist(), strict=True))
    assert pairs == {(i, 400 + i) for i in range(30)}
    assert len(approximate.first) >= 28


def test_mirror_images_are_searched_by_cells():
    originals = np.stack([make_pixels(i % 3, i) for i in range(200)])
    pixels = np.concatenate([originals, originals[:20, :, ::-1]])
    cells = SearchLimits(max_exhaustive=100, cell_size=50)

    result = find_near_duplicates(
        pixels, np.ones(len(pixels), bool), torch.device("cpu"), mirrored=True, limits=cells
    )

    pairs = set(zip(result.first.tolist(), result.second.tolist(), strict=True))
    assert pairs <= {(i, 200 + i) for i in range(20)}
    assert len(pairs) >= 18


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(RANDOM_CONVNET, id="small network"),
        pytest.param((), id="pretrained network", marks=pytest.mark.slow),
    ],
)
def test_the_command_writes_the_report_and_warns(commands, faulty, tmp_path, network):
    flags = ("--out", tmp_path / "report", "--data.size", "32", *network)
    done = commands.run("audit", faulty, *flags)
    assert "WARNING: 3 test images" in done.text
    assert (tmp_path / "report" / "index.html").is_file()
    assert json.loads((tmp_path / "report" / "audit.json").read_text())["classes"] == sorted(
        [*CLASSES, "rare"]
    )


@pytest.mark.parametrize(
    "flags",
    [(), ("--recipe", "digits"), ("--data.val_fraction", "0.3", "--seed_everything", "1")],
    ids=["the folder's recipe", "another recipe", "flags"],
)
def test_the_command_audits_what_training_uses(commands, tmp_path, flags):
    source = write_image_folder(tmp_path / "photos", 20)
    # A duplicate under the folder's recipe, which flips images, and under no other.
    mirrored = cv2.flip(make_pixels(1, 4), 1)
    cv2.imwrite(str(source / "green/mirrored.jpg"), mirrored, [cv2.IMWRITE_JPEG_QUALITY, 80])
    commands.run("audit", source, *flags, *RANDOM_CONVNET, "--out", tmp_path / "report")
    commands.run(
        "run",
        source,
        *flags,
        *RANDOM_CONVNET,
        "--trainer.max_steps",
        1,
        "--export.enabled",
        "false",
        "--trainer.default_root_dir",
        tmp_path / "runs",
        "--progress.quiet",
        "true",
    )
    by_command, by_training = (
        json.loads(file.read_text())
        for file in (tmp_path / "report/audit.json", tmp_path / "runs/photos/1/audit/audit.json")
    )
    assert by_command == by_training
    assert by_command["near_duplicates"]["count"] == ("--recipe" not in flags)


def test_the_command_reports_a_missing_source_in_one_line(commands, tmp_path):
    done = commands.start("audit", tmp_path / "nowhere", *RANDOM_CONVNET)
    assert done.status() == 2
    assert len(done.text.strip().splitlines()) == 1
    assert "no such folder" in done.text


def test_the_report_lists_what_cannot_be_read_where_that_is_a_whole_class(commands, tmp_path):
    source = write_image_folder(tmp_path / "photos", 8)
    for file in (source / "red").iterdir():
        file.write_bytes(b"no image")
    done = commands.start("audit", source, "--out", tmp_path / "report", *RANDOM_CONVNET)
    assert done.status() == 2
    assert "class 'red' has 0 images" in done.text.splitlines()[-1]
    files = [
        file["file"]
        for file in json.loads((tmp_path / "report/audit.json").read_text())["unreadable"]
    ]
    assert files == [f"red/{i:03d}.png" for i in range(8)]
    assert all(file in (tmp_path / "report/index.html").read_text() for file in files)


@pytest.mark.slow
def test_out_of_memory_in_the_audit_does_not_blame_the_batch_size(commands, tmp_path):
    """The images fit into memory, but not a batch of the audit in float32."""
    photos = write_image_folder(tmp_path / "photos", 100)
    command = commands.start(
        "audit",
        photos,
        *["--data.size", 1024, "--data.cache=", "--data.memory", "memory"],
        *["--trainer.accelerator", "cpu"],
        cwd=tmp_path,
        limits={"RLIMIT_AS": 6 << 30},
    )
    assert command.status() == 1
    assert command.text.splitlines()[-1].startswith(
        "train: out of memory on cpu in the data audit; try a smaller --data.size"
    )


def test_training_audits_first_and_reports_metrics_without_leaked_images(
    commands, faulty, tmp_path
):
    done = commands.run(
        "run",
        faulty,
        "--recipe",
        "digits",
        "--data.size",
        "32",
        "--trainer.max_epochs",
        "1",
        "--export.quantize.enabled",
        "false",
        "--store",
        tmp_path / "store",
        "--trainer.default_root_dir",
        tmp_path / "runs",
    )
    assert "WARNING: 3 test images" in done.text
    assert list((tmp_path / "runs").rglob("audit/index.html"))
    bundle = tmp_path / "store/photos/1"
    manifest = json.loads((bundle / "manifest.json").read_text())
    metrics = manifest["metrics"]
    assert metrics["test"]["images"] == 27
    assert metrics["test_unleaked"]["images"] == 24

    accuracy = metrics["test_unleaked"]["accuracy"]
    assert manifest["variants"]["fp32"]["accuracy"] == accuracy
    last_line = done.text.splitlines()[-1]
    assert f"test accuracy {accuracy:.4f} " in last_line
    assert "on 24 images, without 3 that have a duplicate in another part;" in last_line
    card = (bundle / "README.md").read_text()
    assert f"value: {accuracy:.4f}" in card
    assert f"| test accuracy | {100 * accuracy:.2f} % on 24 images that have no duplicate" in card
    report = (bundle / "report.html").read_text()
    assert f"<b>{100 * accuracy:.2f} %</b>test accuracy<small>24 images" in report
