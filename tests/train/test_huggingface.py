"""Hugging Face data sets: rows that lack their label or their image, and the hub."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from support.file_server import FileServer, file_server
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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FileServer]:
    """A server that answers like the hub, without any data set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    with file_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.headers = {"X-Repo-Commit": COMMIT}
        yield server


def publish(hub: FileServer, repository: str, files: dict[str, bytes]) -> None:
    """Put a data set on the hub."""
    api = f"/api/datasets/{repository}"
    tree = [
        {"type": "file", "path": path, "size": len(content), "oid": f"{i:040x}"}
        for i, (path, content) in enumerate(files.items())
    ]
    info = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": path} for path in files]}
    hub.files[api] = hub.files[f"{api}/revision/main"] = json.dumps(info).encode()
    hub.files[f"{api}/tree/{COMMIT}"] = json.dumps(tree).encode()
    for path, content in files.items():
        hub.files[f"/datasets/{repository}/resolve/{COMMIT}/{path}"] = content


def write_parquet() -> dict[str, bytes]:
    images = [{"bytes": make_png(LABELS[i], i), "path": None} for i in range(30)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    )
    buffer = io.BytesIO()
    datasets.Dataset.from_dict({"image": images, "label": LABELS}, features).to_parquet(buffer)
    return {"data/train-00000-of-00001.parquet": buffer.getvalue()}


def write_class_folders() -> dict[str, bytes]:
    return {f"train/{NAMES[i]}/{i:03d}.png": make_png(LABELS[i], i) for i in range(30)}


@pytest.mark.parametrize("write_files", [write_parquet, write_class_folders])
def test_a_data_set_of_the_hub(hub, write_files, capsys):
    publish(hub, "me/photos", write_files())
    data = ImageData("hf://datasets/me/photos", cache="", workers=0)
    data.setup()
    assert data.classes == CLASSES
    assert sum(data.counts.values()) == 30
    assert data.dataset.name == "photos"
    assert "Fetching" not in capsys.readouterr().err, "a bar is for terminals"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://datasets/me/nothing", "no such data set; a private one needs HF_TOKEN"),
        ("hf://datasets/me", "write hf://datasets/owner/name"),
        ("hf://datasets/me/texts", "not readable as images|no image column"),
    ],
)
def test_what_the_hub_lacks_is_reported_in_one_line(hub, source, message):
    hub.headers["X-Error-Code"] = "RepoNotFound"
    publish(hub, "me/texts", {"data/train.txt": b"some text"})
    with pytest.raises(DataError, match=message) as caught:
        ImageData(source, cache="").setup()
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(source)


def test_a_hub_that_is_not_there_is_reported_in_one_line(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="can't be fetched") as caught:
        ImageData("hf://datasets/me/photos", cache="").setup()
    assert "\n" not in str(caught.value)
