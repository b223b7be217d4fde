"""Hugging Face data sets with rows that lack their label or their image."""

from pathlib import Path

import numpy as np
import pytest

from support.sample_images import CLASSES, make_png
from train.cli import main
from train.data import DataError, ImageData

datasets = pytest.importorskip("datasets", reason="the extra huggingface is not installed")
LABELS = [i % 3 for i in range(30)]
NAMES = [CLASSES[label] for label in LABELS]
pytestmark = pytest.mark.filterwarnings("ignore:::lightning")


def write(path: Path, labels: list, missing: tuple[int, ...] = (), **parts: list) -> str:
    """Save a data set with the part train and `parts`; the rows `missing` have no image."""
    datasets.disable_progress_bars()
    written = {}
    for name, part_labels in {"train": labels, **parts}.items():
        is_text = any(isinstance(label, str) for label in part_labels)
        kind = datasets.Value("string") if is_text else datasets.ClassLabel(names=CLASSES)
        images = [
            None if i in missing else {"bytes": make_png(LABELS[i], i), "path": None}
            for i in range(len(part_labels))
        ]
        written[name] = datasets.Dataset.from_dict(
            {"image": images, "label": part_labels},
            datasets.Features({"image": datasets.Image(), "label": kind}),
        )
    datasets.DatasetDict(written).save_to_disk(path)
    return f"hf:{path}"


@pytest.mark.parametrize(
    ("labels", "row"),
    [
        ([*LABELS[:7], -1, *LABELS[8:]], 7),
        ([None, *LABELS[1:]], 0),
        ([*NAMES[:4], None, *NAMES[5:]], 4),
    ],
    ids=["-1", "null", "null name"],
)
def test_a_row_without_a_label_is_reported_before_training(tmp_path, capsys, labels, row):
    source = write(tmp_path / "set", labels)
    assert main.main(["audit", source, "--out", str(tmp_path)]) == 2
    assert f"row {row} of the train part has no label" in capsys.readouterr().err


def test_the_row_is_counted_within_its_part(tmp_path):
    source = write(tmp_path / "set", LABELS, test=[*LABELS[:2], -1])
    with pytest.raises(DataError, match="row 2 of the test part has no label"):
        ImageData(source, cache="").setup()


@pytest.mark.parametrize("nothing", [-1, None])
def test_a_test_part_without_labels_is_left_out_and_reported(tmp_path, capsys, nothing):
    data = ImageData(write(tmp_path / "set", LABELS, test=[nothing] * 9), cache="", workers=0)
    data.setup()
    assert data.counts == {"train": 21, "val": 3, "test": 6}
    assert "the part test has no labels, so it is left out" in capsys.readouterr().err


def test_rows_without_an_image_count_as_unreadable(tmp_path, capsys):
    data = ImageData(write(tmp_path / "set", LABELS, missing=(3,)), cache="", workers=2)
    data.setup()
    assert data.unreadable == [("000003", "the row has no image")]
    assert np.concatenate([*data.index.values()]).size == 29
