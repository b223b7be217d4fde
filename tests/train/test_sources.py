"""Sources other than folders, each on a small data set that the test writes."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from models.image import decode
from support import RANDOM_CONVNET, ROOT
from support.s3_server import s3_server
from support.sample_images import (
    CLASSES,
    classify_by_colour,
    make_pixels,
    make_png,
    write_image_folder,
)
from train.data import DataError, ImageData
from train.data.corrections import read_corrections
from train.data.sources.csv_file import read_csv

COUNT = 30
LABELS = [i % 3 for i in range(COUNT)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
    # LitData's readers leave files open.
    pytest.mark.filterwarnings("ignore:.*unclosed file.*chunk-:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:(?s).*FileIO name.*chunk-:pytest.PytestUnraisableExceptionWarning"
    ),
    # Deep Lake warns of forks. Each process opens the data set for itself.
    pytest.mark.filterwarnings("ignore:Global variable:UserWarning"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def check(source: str, classes: list[str] = CLASSES, stream: int = 2, **parts: int) -> ImageData:
    """Check that memory and a stream give the same batches, with labels that fit the pixels."""
    batches = []
    for memory, workers in (("memory", 0), ("stream", stream)):
        data = ImageData(source, memory=memory, workers=workers, batch_size=8, size=32)
        data.setup()
        batches.append(list(data.train_dataloader()) + list(data.test_dataloader()))
        assert data.classes == classes
        if parts:
            assert data.counts == parts
    for (images, labels), (same, truth) in zip(*batches, strict=True):
        assert torch.equal(images, same)
        assert labels.tolist() == truth.tolist() == classify_by_colour(images.numpy()).tolist()
    assert (
        sum(len(labels) for _, labels in batches[0]) == data.counts["train"] + data.counts["test"]
    )
    return data


def write_table(path: Path, rows: list[tuple], header: str = "path,label") -> Path:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")
    return path


def test_csv_of_paths_and_labels(tmp_path):
    files = write_image_folder(tmp_path / "photos", 10)
    rows = [
        (path.relative_to(tmp_path).as_posix(), path.parent.name)
        for path in sorted(files.rglob("*.png"))
    ]
    data = check(str(write_table(tmp_path / "table.csv", rows)))
    assert sum(data.counts.values()) == 30


def test_csv_with_parts(tmp_path):
    files = write_image_folder(tmp_path / "photos", 10)
    part = {0: "test", 1: "valid", 2: "valid"}
    rows = [
        (str(path), path.parent.name, part.get(int(path.stem), "train"))
        for path in sorted(files.rglob("*.png"))
    ]
    check(
        str(write_table(tmp_path / "table.csv", rows, "path,label,split")), train=21, val=6, test=3
    )


def test_spaces_around_labels_in_a_csv_are_ignored(tmp_path):
    files = write_image_folder(tmp_path / "photos", 10)
    rows = [
        (str(path), path.parent.name + " " * (int(path.stem) % 2))
        for path in sorted(files.rglob("*.png"))
    ]
    data = ImageData(str(write_table(tmp_path / "table.csv", rows)))
    data.setup()
    assert data.classes == CLASSES


def test_numeric_labels_are_sorted_as_numbers(tmp_path):
    names = ["00002", "0002", "002", "02", "2", "010", "10"]
    files = write_image_folder(tmp_path / "photos", 4 * len(names))
    rows = [
        (str(path), names[int(path.stem) % len(names)]) for path in sorted(files.rglob("*.png"))
    ]
    data = ImageData(str(write_table(tmp_path / "table.csv", rows)))
    data.setup()
    assert data.classes == names


def test_an_invalid_csv_is_refused_in_one_line(tmp_path):
    def assert_refused(rows: list[tuple], message: str, header: str = "path,label") -> None:
        with pytest.raises(DataError, match=message):
            ImageData(str(write_table(tmp_path / "table.csv", rows, header))).setup()

    assert_refused([("a.png", "x")], "no column 'label'.*it has path, kind", "path,kind")
    assert_refused([("a.png", "")], "line 2 lacks a path or a label")
    assert_refused([("a\0.png", "x")], r"table\.csv: line 2: a NUL byte in the path")
    assert_refused([("a.png", " ")], "line 2 lacks a path or a label")
    assert_refused(
        [("a.png", "x", "somewhere")], "line 2: split 'somewhere' is not one of", "path,label,split"
    )
    assert_refused([], "no rows")
    with pytest.raises(DataError, match=r"nowhere\.csv: not readable"):
        ImageData(str(tmp_path / "nowhere.csv")).setup()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A directory with pics/<class>/000.png to 007.png."""
    root = tmp_path_factory.mktemp("pictures")
    write_image_folder(root / "pics", 8)
    return root


def write_lines(directory: Path, header: str, line: str, encoding: str = "utf-8") -> str:
    """Write a CSV file for `pictures`; `line` has fields for path, name, label and number."""
    rows = [header]
    for name in CLASSES:
        for i in range(8):
            path = f"pics/{name}/{i:03d}.png"
            part = "test" if i < 2 else "train"
            windows = path.replace("/", "\\")
            rows.append(line.format(path=path, windows=windows, label=name, part=part, i=i))
    file = directory / "table.csv"
    file.write_text("\r\n".join(rows), encoding)
    return str(file)


@pytest.mark.parametrize(
    ("header", "line", "encoding"),
    [
        ("Path,Label", "{path},{label}", "utf-8"),
        ("path;label", "{path};{label}", "utf-8-sig"),
        ("path\tlabel", "{path}\t{label}", "utf-16"),
        ("label,path", '"{label}", "{path}"', "utf-8"),
        ("path, label", '{path}, "{label}"', "utf-8"),
        ("path,label", "{windows},{label}", "utf-8"),
        ("filename,label,class id", "{path},{label},{i}", "utf-8"),
        ("path,label,class", "{path},{label},{i}", "utf-8"),
        ("path,label,", "{path},{label},", "utf-8"),
    ],
)
def test_csv_files_as_programs_write_them(pictures, header, line, encoding):
    data = ImageData(write_lines(pictures, header, line, encoding), cache="", workers=0)
    data.setup()
    assert data.classes == CLASSES
    assert data.counts == {"train": 15, "val": 3, "test": 6}
    assert data.unreadable == []


@pytest.mark.parametrize("column", ["Split", "set", "data set"])
def test_split_columns_of_other_names_are_used(pictures, column):
    source = write_lines(pictures, f"path,label,{column}", "{path},{label},{part}")
    dataset = ImageData(source, cache="").dataset
    assert np.flatnonzero(dataset.parts == "test").tolist() == [0, 1, 8, 9, 16, 17]


def test_is_valid_names_the_validation_part(pictures):
    source = Path(write_lines(pictures, "path,label,is_valid", "{path},{label},False"))
    source.write_text(source.read_text() + "\npics/red/007.png,red,True")
    dataset = ImageData(str(source), cache="").dataset
    assert dataset.parts.tolist() == ["train"] * 24 + ["val"]


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("path,label", "{path},bird, {label}", r"line 2: 3 fields, but the first line names 2"),
        ("path,label,label", "{path},{label},x", "columns 'label' and 'label' could both be"),
        ("path,labels,class", "{path},{label},x", "columns 'labels' and 'class' could both be"),
        ("path,label,Split", "{path},{label},holdout", "line 2: Split 'holdout' is not one of"),
        ("path,label,is_valid", "{path},{label},maybe", "line 2: is_valid 'maybe' is not true or"),
        ("path,label,split", "{path},{label},test", "all images are in the part test, so nothing"),
        ("path,label", '{path},"{label}', r"line \d+: "),
        ("path,label", '{path},"{label}" x', r"line 2: "),
    ],
)
def test_a_csv_that_is_not_plain_names_the_line_and_the_cause(pictures, header, line, message):
    with pytest.raises(DataError, match=message) as caught:
        ImageData(write_lines(pictures, header, line), cache="").setup()
    assert "\n" not in str(caught.value)


def test_a_csv_in_another_encoding_names_the_line(tmp_path):
    (tmp_path / "table.csv").write_bytes("path,label\na.png,rose\nb.png,käse\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"line 3: .*save the file as UTF-8"):
        ImageData(str(tmp_path / "table.csv"), cache="").setup()


@pytest.mark.parametrize("read", [read_csv, read_corrections])
def test_a_named_pipe_is_no_table(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="not readable as a CSV file: not a regular file"):
        read(tmp_path / "pipe.csv")


def test_a_named_pipe_in_a_csv_counts_as_unreadable(pictures):
    pipe = pictures / "pipe.png"
    os.mkfifo(pipe)
    source = Path(write_lines(pictures, "path,label", "{path},{label}"))
    source.write_text(source.read_text() + "\npipe.png,red\n")
    data = ImageData(str(source), cache="", workers=0)
    data.setup()
    assert data.unreadable == [("pipe.png", "not a regular file")]


def test_csv_with_missing_files_lists_them(tmp_path):
    files = write_image_folder(tmp_path / "photos", 10)
    rows = [
        (path.relative_to(tmp_path).as_posix(), path.parent.name)
        for path in sorted(files.rglob("*.png"))
    ]
    source = str(write_table(tmp_path / "table.csv", [*rows, ("photos/gone.png", "red")]))
    with pytest.raises(DataError, match=r"1 of 31 .*photos/gone\.png \(.*No such file"):
        ImageData(source, max_unreadable=0.01).setup()
    data = ImageData(source)
    data.setup()
    assert [name for name, _ in data.unreadable] == ["photos/gone.png"]


@pytest.mark.parametrize(
    ("name", "directory", "first"),
    [("mnist", "MNIST", "0 - zero"), ("fashion-mnist", "FashionMNIST", "T-shirt/top")],
)
def test_torchvision_data_at_root_is_not_downloaded(tmp_path, name, directory, first):
    raw = tmp_path / directory / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 200), ("t10k", 50)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = np.broadcast_to(20 * labels[:, None, None], (count, 28, 28)).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">4I", 2051, count, 28, 28) + pixels.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2I", 2049, count) + labels.tobytes()
        )
    data = ImageData(name, root=str(tmp_path), batch_size=10, val_fraction=0.1)
    data.setup()
    assert data.counts == {"train": 180, "val": 20, "test": 50}
    assert (data.classes[0], len(data.classes)) == (first, 10)
    assert (data.input.height, data.input.width, data.input.channels) == (28, 28, 1)
    for images, labels in (*data.train_dataloader(), *data.test_dataloader()):
        assert torch.equal(images.flatten(1).float().mean(1), 20.0 * labels)


def optimize(directory: Path, images: list) -> Path:
    """Write a LitData directory of these images, with LABELS."""
    streaming = pytest.importorskip(
        "litdata.streaming", reason="the extra litdata is not installed"
    )
    cache = streaming.Cache(str(directory), chunk_size=8)
    for i, (image, label) in enumerate(zip(images, LABELS, strict=True)):
        cache[i] = {"image": image, "label": CLASSES[label]}
    cache.done()
    cache.merge()
    return directory


@pytest.fixture(scope="module")
def optimized(tmp_path_factory) -> Path:
    """A LitData directory with train/ and test/."""
    root = tmp_path_factory.mktemp("litdata") / "photos"
    for part, first in (("train", 0), ("test", 100)):
        optimize(root / part, [make_png(label, first + i) for i, label in enumerate(LABELS)])
    return root


def test_litdata_from_a_directory(optimized):
    check(f"litdata:{optimized}", train=27, val=3, test=30)
    check(f"litdata:{optimized}/train")


def test_litdata_labels_are_kept_in_the_given_cache(optimized, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    # No directory can be made below a file, so the default cache can't be written.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for cache in (tmp_path / "named", "", tmp_path / "file" / "named"):
        data = ImageData(f"litdata:{optimized}", cache=str(cache), workers=0)
        data.setup()
        assert data.classes == CLASSES
    assert len(list((tmp_path / "named").glob("labels/*"))) == 2


def test_cached_labels_of_another_number_of_images_are_read_again(optimized, tmp_path):
    source = f"litdata:{optimized}/train"
    cache = tmp_path / "cache"
    ImageData(source, cache=str(cache), workers=0).setup()
    (kept,) = cache.glob("labels/*")
    whole = kept.read_text()
    kept.write_text(json.dumps(json.loads(whole)[:7]))
    data = ImageData(source, cache=str(cache), workers=0)
    data.setup()
    assert sum(data.counts.values()) == COUNT
    assert kept.read_text() == whole


@pytest.mark.slow
def test_litdata_is_whole_in_each_of_two_processes(optimized, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "train",
            "launch",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "train",
            "run",
            f"litdata:{optimized}",
            "--trainer.max_steps",
            "1",
            "--trainer.accelerator",
            "cpu",
            *RANDOM_CONVNET,
            "--data.size",
            "32",
            "--data.batch_size",
            "4",
            "--logger",
            "none",
            "--progress.quiet",
            "true",
            "--audit.enabled",
            "false",
            "--trainer.default_root_dir",
            str(tmp_path / "runs"),
            "--store",
            str(tmp_path / "store"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads(next((tmp_path / "store").rglob("manifest.json")).read_text())
    assert sum(manifest["provenance"]["data"]["counts"].values()) == 2 * COUNT


@pytest.mark.parametrize("kind", ["channels last", "channels first", "PIL"])
def test_transparent_pixels_lie_on_white_as_in_serving(tmp_path, kind):
    files = []
    for i, label in enumerate(LABELS):
        alpha = np.random.default_rng(i).integers(60, 256, (32, 32, 1), np.uint8)
        files.append(cv2.imencode(".png", np.dstack([make_pixels(label, i), alpha]))[1].tobytes())
    images = [Image.open(io.BytesIO(file)) for file in files]
    if kind != "PIL":
        axes = (2, 0, 1) if kind == "channels first" else (0, 1, 2)
        images = [np.ascontiguousarray(np.asarray(image).transpose(axes)) for image in images]
    data = check(f"litdata:{optimize(tmp_path / 'set', images)}")
    assert np.array_equal(data.decoded.pixels, [decode(file, data.input) for file in files])


def test_pixels_of_other_channels_count_as_unreadable(tmp_path):
    images = [np.zeros((32, 32, 2 if i == 4 else 3), np.uint8) for i in range(COUNT)]
    data = ImageData(f"litdata:{optimize(tmp_path / 'set', images)}", workers=2)
    data.setup()
    assert [name for name, _ in data.unreadable] == ["000004"]


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def edit_index(directory: Path, **config: object) -> str:
    """Change the configuration in a data set's index; return the data set as a source."""
    index = directory / "index.json"
    content = json.loads(index.read_text())
    content["config"].update(config)
    index.write_text(json.dumps(content))
    return f"litdata:{directory}"


def test_a_pickled_label_is_refused_and_not_unpickled(tmp_path):
    streaming = pytest.importorskip(
        "litdata.streaming", reason="the extra litdata is not installed"
    )
    marker = tmp_path / "ran"
    cache = streaming.Cache(str(tmp_path / "set"), chunk_size=8)
    for i in range(4):
        cache[i] = {"image": make_png(0, i), "label": Payload(marker)}
    cache.done()
    cache.merge()
    source = f"litdata:{tmp_path / 'set'}"
    with pytest.raises(DataError, match=r"index\.json stores 'pickle', .*run code"):
        ImageData(source, cache="").setup()

    # An index that hides the serializer behind a harmless name.
    source = edit_index(tmp_path / "set", data_format=["bytes", "file:pickle"])
    with pytest.raises(DataError, match=r"index\.json stores 'file:pickle'"):
        ImageData(source, cache="").setup()
    assert not marker.exists()


def test_a_container_that_names_a_python_function_is_refused(optimized, tmp_path, monkeypatch):
    directory = tmp_path / "set"
    shutil.copytree(optimized / "train", directory)
    (tmp_path / "payload.py").write_text("raise SystemExit('the data set ran code')")
    monkeypatch.syspath_prepend(tmp_path)
    leaf = {"type": None, "context": None, "children_spec": []}
    context = {
        "default_factory_module": "payload",
        "default_factory_name": "x",
        "dict_context": ["image", "label"],
    }
    spec = {
        "type": "collections.defaultdict",
        "context": context,
        "children_spec": [leaf, leaf],
    }
    source = edit_index(directory, data_spec=json.dumps([1, spec]))
    with pytest.raises(DataError, match=r"index.json stores 'collections\.defaultdict'"):
        ImageData(source, cache="").setup()


def test_a_damaged_litdata_index_is_refused_in_one_line(optimized, tmp_path):
    shutil.copytree(optimized / "train", tmp_path / "set")
    source = edit_index(tmp_path / "set", data_format=None)
    with pytest.raises(DataError, match=r"index\.json is not that of images and labels"):
        ImageData(source, cache="").setup()


@pytest.fixture(scope="module")
def bucket(optimized) -> Iterator[str]:
    """An S3-compatible server with the LitData directory in a bucket."""
    with s3_server("images") as s3:
        for path in optimized.rglob("*.*"):
            s3.upload_file(str(path), "images", f"photos/{path.relative_to(optimized).as_posix()}")
        yield "s3://images/photos"


def test_litdata_from_an_object_store(bucket):
    check(f"litdata:{bucket}", stream=0, train=27, val=3, test=30)


@pytest.mark.slow
def test_litdata_from_an_object_store_by_workers(bucket):
    check(f"litdata:{bucket}", stream=2, train=27, val=3, test=30)


def test_missing_litdata_is_refused_in_one_line(tmp_path, bucket):
    for location in (str(tmp_path), f"{bucket}/nowhere"):
        with pytest.raises(DataError, match=r"no index\.json there"):
            ImageData(f"litdata:{location}").setup()


@pytest.mark.slow
def test_deep_lake(tmp_path):
    deeplake = pytest.importorskip("deeplake", reason="the extra deeplake is not installed")
    from deeplake import types

    lake = deeplake.create(f"file://{tmp_path}/lake")
    lake.add_column("image", types.Image(sample_compression="png"))
    lake.add_column("label", types.ClassLabel("uint32"))
    lake.add_column("split", types.Text())
    lake["label"].metadata["class_names"] = CLASSES
    lake.append(
        {
            "image": [
                np.ascontiguousarray(make_pixels(label, i)[:, :, ::-1])
                for i, label in enumerate(LABELS)
            ],
            "label": np.array(LABELS, np.uint32),
            "split": ["test" if i < 6 else "train" for i in range(COUNT)],
        }
    )
    lake.commit()
    check(f"deeplake:{tmp_path}/lake", train=21, val=3, test=6)
    with pytest.raises(DataError, match="not readable by deeplake"):
        ImageData(f"deeplake:{tmp_path}/nowhere").setup()
    lake.append(
        {
            "image": [np.zeros((32, 32, 3), np.uint8)],
            "label": np.array([7], np.uint32),
            "split": ["train"],
        }
    )
    lake.commit()
    with pytest.raises(DataError, match="row 24 of the train part has the label 7 of 3 classes"):
        ImageData(f"deeplake:{tmp_path}/lake").setup()


@pytest.mark.slow
def test_hugging_face_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra huggingface is not installed")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)}
    )

    def part(first: int) -> object:
        images = [
            {"bytes": make_png(label, first + i), "path": None} for i, label in enumerate(LABELS)
        ]
        return datasets.Dataset.from_dict({"image": images, "label": LABELS}, features=features)

    datasets.disable_progress_bars()
    datasets.DatasetDict(
        {"train": part(0), "validation": part(50), "test": part(100)}
    ).save_to_disk(tmp_path / "parts")
    check(f"hf:{tmp_path}/parts", train=30, val=30, test=30)
    part(0).save_to_disk(tmp_path / "single")
    check(f"hf:{tmp_path}/single", train=21, val=3, test=6)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(DataError, match="no image column; its columns are text"):
        ImageData(f"hf:{tmp_path}/text").setup()
    with pytest.raises(DataError, match="not a data set that Hugging Face"):
        ImageData(f"hf:{tmp_path}/nowhere").setup()


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(DataError, match=r"digits, cifar10.*litdata:…, deeplake:…, hf:…"):
        ImageData("cifar11").setup()
