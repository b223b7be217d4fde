"""Corrections: images that are kept, relabelled or left out, by a file beside the data."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from support import RANDOM_CONVNET, ROOT
from support.sample_images import CLASSES, make_png, write_image_folder
from train.data import DataError, ImageData

pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def prepare(source: Path | str, **settings: Any) -> ImageData:
    """Return the data module after `setup`; nothing is cached."""
    data = ImageData(str(source), cache="", workers=0, **settings)
    data.setup()
    return data


def labels_by_part(data: ImageData) -> dict[str, dict[str, str]]:
    """Return the label of each file, by part."""
    return {
        part: {
            data.dataset.items.name(i): data.classes[data.dataset.labels[i]]
            for i in data.index[part].tolist()
        }
        for part in ("train", "val", "test")
    }


def write_corrections(file: Path, *rows: str) -> Path:
    file.write_text("\n".join(["path,action,label", *rows]) + "\n")
    return file


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_image_folder(tmp_path / "photos")


def test_other_images_keep_their_part_and_label(photos):
    before = labels_by_part(prepare(photos))
    relabelled = next(iter(before["test"]))
    left_out = [next(iter(before["train"])), next(iter(before["val"]))]
    label = next(name for name in CLASSES if name != before["test"][relabelled])
    write_corrections(
        photos / "corrections.csv",
        f"{relabelled},relabel,{label}",
        *(f"{path},leave out," for path in left_out),
    )

    after = labels_by_part(prepare(photos))

    before["test"][relabelled] = label
    del before["train"][left_out[0]]
    del before["val"][left_out[1]]
    assert after == before


def test_the_digest_follows_what_is_corrected(photos):
    file = photos / "corrections.csv"
    digests = [prepare(photos).digest]
    for row in ("red/001.png,keep,", "red/001.png,relabel,blue", "red/001.png,leave out,"):
        write_corrections(file, row)
        digests.append(prepare(photos).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_csv_file_has_its_corrections_beside_it(tmp_path, photos):
    table = tmp_path / "table.csv"
    files = sorted(file.relative_to(tmp_path) for file in photos.rglob("*.png"))
    lines = [f"{str(file).replace('/', chr(92))},{file.parent.name}" for file in files]
    table.write_text("\n".join(["path,label", *lines]) + "\n")
    write_corrections(
        tmp_path / "table.corrections.csv",
        r"photos\red\001.png,leave out,",
        "photos/red/002.png,relabel,blue",
    )

    parts = labels_by_part(prepare(table))

    labels = parts["train"] | parts["val"] | parts["test"]
    assert len(labels) == 35
    assert labels["photos/red/002.png"] == "blue"


def test_an_archive_has_its_corrections_beside_it(tmp_path, photos):
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", photos)
    write_corrections(tmp_path / "packed.corrections.csv", "red/001.png,leave out,")
    data = ImageData(archive, cache=str(tmp_path / "cache"))
    assert data.dataset.count_excluded() == 1


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffPath;Action;Label\r\n./red/001.png;Leave-Out;\r\n",
        "label,path,action\n,red\\001.png,leave_out\n\n",
        "path,action,label\nred/001.png,leave out\nred/001.png,leave out\n",
    ],
    ids=["spreadsheet", "another order", "the same twice"],
)
def test_spreadsheets_may_write_it(photos, content):
    (photos / "corrections.csv").write_text(content)
    assert ImageData(str(photos)).dataset.count_excluded() == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: must name the columns path,action,label; it is ''"),
        (b"file,action,label\n", "line 1: must name the columns path,action,label"),
        (b"path,action,label\nred/001.png,delete,\n", "line 2: action 'delete' is not one of keep"),
        (b"path,action,label\nred/001.png,keep,blue\n", "line 2: keep takes no label"),
        (
            b"path,action,label\n\nred/001.png,relabel,pink\n",
            "line 3: label 'pink' is not a class; the classes are blue, green, red",
        ),
        (b"path,action,label\nred/001.png,relabel,\n", "line 2: relabel needs a label"),
        (b"path,action,label\n,keep,\n", "line 2: lacks a path"),
        (b"path,action,label\nred/001,5.png,keep,\n", "line 2: 4 fields, but the first line"),
        (
            b"path,action,label\nred/001.png,keep,\n./red/001.png,leave out,\n",
            "line 3: ./red/001.png has another correction in line 2; remove one of them",
        ),
        (b'path,action,label\nred/001.png,keep,\n"red/002.png,keep,\n', "line 3: unexpected end"),
        (b"path,action,label\nred/001.png,keep,\nr\xe9d/1.png,keep,\n", "line 3: not readable"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(photos, content, message):
    file = photos / "corrections.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{file}: {message}")):
        prepare(photos)


def test_a_broken_file_ends_commands_with_status_2(commands, photos):
    write_corrections(photos / "corrections.csv", "red/001.png,relabel,pink")
    command = commands.start("find-lr", photos, *RANDOM_CONVNET)
    assert command.status() == 2
    assert command.text.splitlines()[-1] == (
        f"train: {photos}/corrections.csv: line 2: label 'pink' is not a class; the classes are "
        "blue, green, red"
    )


def test_images_that_are_gone_are_counted(photos, capsys):
    write_corrections(
        photos / "corrections.csv",
        "red/gone.png,relabel,pink",
        "red/away.png,keep,",
        "red/001.png,leave out,",
    )
    data = prepare(photos)
    assert data.dataset.count_excluded() == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "corrections.csv: 2 of its paths are not in the data, such as red/gone.png" in line


def test_the_file_may_be_elsewhere_or_ignored(photos, tmp_path):
    write_corrections(photos / "corrections.csv", "red/001.png,leave out,")
    elsewhere = write_corrections(
        tmp_path / "mine.csv", "red/001.png,leave out,", "red/002.png,leave out,"
    )
    assert ImageData(str(photos), corrections=str(elsewhere)).dataset.count_excluded() == 2
    assert ImageData(str(photos), corrections="").dataset.count_excluded() == 0
    with pytest.raises(DataError, match=r"data\.corrections: .*nowhere\.csv: no such file"):
        prepare(photos, corrections=str(tmp_path / "nowhere.csv"))


def test_data_without_files_has_no_corrections():
    with pytest.raises(DataError, match="not supported for digits, whose images are not files"):
        prepare("digits", corrections="mine.csv")


def test_a_class_may_be_corrected_into_being_large_enough(photos):
    """A class of one image could not be split; images that are relabelled to it go to any part."""
    (photos / "rare").mkdir()
    (photos / "rare" / "1.png").write_bytes(make_png(0, 99))
    with pytest.raises(DataError, match="class 'rare' has 1 image, too few"):
        prepare(photos)
    rows = [f"red/{i:03d}.png,relabel,rare" for i in range(6)]
    write_corrections(photos / "corrections.csv", *rows)
    data = prepare(photos)
    assert sum(data.count_classes(part)[2] for part in ("train", "val", "test")) == 7


def test_a_class_without_images_is_refused(photos):
    rows = [f"red/{i:03d}.png,leave out," for i in range(12)]
    write_corrections(photos / "corrections.csv", *rows)
    with pytest.raises(DataError, match="class 'red' has no image to train on"):
        prepare(photos)


@pytest.fixture(scope="module")
def leaky(tmp_path_factory) -> Path:
    """Two leaked test images, a pair of duplicates in training, and an unreadable file."""
    root = tmp_path_factory.mktemp("leaky") / "photos"
    write_image_folder(root / "train", 12)
    write_image_folder(root / "test", 4, first=100)
    write_image_folder(root / "val", 4, first=200)
    for name in ("a", "b"):
        original = root / "train" / "red" / f"00{'ab'.index(name)}.png"
        (root / "test" / "red" / f"{name}.png").write_bytes(original.read_bytes())
    (root / "train/blue/copy.png").write_bytes((root / "train/blue/003.png").read_bytes())
    (root / "train/blue/short.png").write_bytes(make_png(0, 50)[:300])
    return root


def audit(commands, source: Path, out: Path) -> tuple[dict[str, Any], str]:
    """Run the command; return the findings and its output."""
    done = commands.run("audit", source, "--out", out, "--data.size", 32, *RANDOM_CONVNET)
    return json.loads((out / "audit.json").read_text()), done.text


def test_the_audit_reports_corrected_findings_no_more(commands, leaky, tmp_path):
    file = leaky / "corrections.csv"
    file.unlink(missing_ok=True)
    findings, _ = audit(commands, leaky, tmp_path)
    assert findings["leakage"]["test"]["count"] == 2
    assert findings["exact_duplicates"]["count"] == 3

    write_corrections(
        file,
        "test/red/a.png,leave out,",
        "train/blue/copy.png,keep,",
        "train/blue/003.png,keep,",
        "train/blue/short.png,leave out,",
    )
    findings, text = audit(commands, leaky, tmp_path)

    assert findings["counts"]["test"] == 13
    assert findings["leakage"]["test"]["count"] == 1
    assert findings["unreadable"] == []
    duplicates = findings["exact_duplicates"]
    assert (duplicates["count"], duplicates["reviewed"]) == (2, 1)
    assert [pair["reviewed"] for pair in duplicates["pairs"]] == [False, True]
    assert "corrections applied: 0 relabelled, 2 left out" in text
    assert "2 exact duplicates, 1 across parts, 1 reviewed" in text


def test_a_reviewed_leak_is_still_reported_but_warns_no_more(commands, leaky, tmp_path):
    write_corrections(leaky / "corrections.csv", "test/red/a.png,keep,", "test/red/b.png,keep,")
    findings, text = audit(commands, leaky, tmp_path)
    assert findings["leakage"]["test"] | {"positions": None} == {
        "count": 2,
        "share": round(2 / 14, 4),
        "reviewed": 2,
        "positions": None,
    }
    assert "audit: 2 test images (14.3%, 2 reviewed) have an exact or near duplicate" in text
    assert "WARNING" not in text


def test_a_bundle_states_its_corrections_and_commands_apply_them(commands, tmp_path):
    photos = tmp_path / "photos"
    write_image_folder(photos / "train", 12)
    write_image_folder(photos / "test", 4, first=100)
    file = write_corrections(
        photos / "corrections.csv", "train/red/001.png,leave out,", "test/red/001.png,relabel,blue"
    )
    runs = ("--trainer.default_root_dir", tmp_path / "runs")
    commands.run(
        *("run", photos, "--recipe", "digits", "--data.size", "32", "--trainer.max_epochs", "1"),
        *("--store", tmp_path / "store", "--export.quantize.enabled", "false", *runs),
        *("--audit.enabled", "false", "--trainer.limit_train_batches", 1, "--logger", "none"),
    )
    bundle = tmp_path / "store/photos/1"
    data = json.loads((bundle / "manifest.json").read_text())["provenance"]["data"]
    assert data["corrections"] == {"relabelled": 1, "left_out": 1}
    assert data["counts"]["test"] == 12
    for card in ("report.html", "README.md"):
        assert "1 image relabelled and 1 left out by hand" in (bundle / card).read_text()

    write_corrections(file, *(f"test/{name}/002.png,leave out," for name in CLASSES))
    predicted = commands.run(
        *("predict", "--config", ROOT / "train/recipes/digits.yaml", "--data.source", photos),
        *("--data.size", "32", "--ckpt_path", tmp_path / "runs/photos/1/best.ckpt"),
    )
    rows = list(csv.reader(line for line in predicted.text.splitlines() if ".png," in line))
    assert len(rows) == 9
    assert not any("002.png" in field for row in rows for field in row)
