"""`serve predict --shard`: parts of a large set, in directories and in buckets."""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.bundle import Histogram
from models.drift import bin_edges, histogram
from serve.__main__ import main
from serve.commands import predict
from serve.model import Model
from support import tiny_bundle
from support.s3_server import s3_server

parquet = pytest.importorskip("pyarrow.parquet")

COUNT = 12
SHARDS = 3


def write_images(directory: Path) -> Path:
    """Write images of the three colours in two folders, and one that can't be decoded."""
    for i in range(COUNT):
        label = tiny_bundle.CLASSES[i % 3]
        path = directory / ("a" if i % 2 else "b") / f"{label}-{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny_bundle.make_image(label, seed=i))
    (directory / "broken.png").write_bytes(b"no image")
    return directory


def read_rows(directory: Path) -> list[dict]:
    """Return the rows of all shards, sorted by file."""
    rows: list[dict] = []
    for path in sorted(directory.glob("part-*.parquet")):
        rows += parquet.read_table(path).to_pylist()
    return sorted(rows, key=lambda row: row["file"])


def run_shard(shard: str, source: Path | str, out: Path | str, store: Path, *flags: str) -> int:
    words = [str(source), "--out", str(out), "--shard", shard, "--store", str(store), *flags]
    return main(["predict", *words])


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos")


def test_the_shards_together_are_one_run(bundle_store, photos, tmp_path):
    out = tmp_path / "shards"
    for number in range(SHARDS):
        assert run_shard(f"{number}/{SHARDS}", photos, out, bundle_store) == 0
    names = [f"part-0000{number}-of-00003.parquet" for number in range(SHARDS)]
    assert sorted(path.name for path in out.iterdir()) == names

    whole = tmp_path / "whole.parquet"
    arguments = [str(photos), "--out", str(whole), "--store", str(bundle_store)]
    assert predict.main(arguments) == 1, "one image is broken"
    assert read_rows(out) == parquet.read_table(whole).sort_by("file").to_pylist()
    (broken,) = (row for row in read_rows(out) if row["error"])
    assert broken["file"].endswith("broken.png")


def test_a_finished_shard_is_skipped(bundle_store, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "shards"
    assert run_shard("0/2", photos, out, bundle_store) == 0
    before = (out / "part-00000-of-00002.parquet").stat().st_mtime_ns

    monkeypatch.setattr(predict, "classify_batch", None)  # would fail
    assert run_shard("0/2", photos, out, bundle_store) == 0
    assert "shard 0/2: finished before, skipped" in capsys.readouterr().err
    assert (out / "part-00000-of-00002.parquet").stat().st_mtime_ns == before


def test_an_interrupted_shard_leaves_nothing(bundle_store, photos, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "classify_batch", interrupt)
    words = [str(photos), "--out", str(tmp_path / "out"), "--shard", "0/1"]
    with pytest.raises(KeyboardInterrupt):
        predict.main([*words, "--store", str(bundle_store)])
    assert list((tmp_path / "out").iterdir()) == []


def test_results_of_another_version_are_not_mixed(photos, tmp_path, capsys):
    store = tmp_path / "store"
    tiny_bundle.publish(store)
    tiny_bundle.publish(store)
    assert run_shard("0/1", photos, tmp_path / "out", store, "--version", "1") == 0
    capsys.readouterr()
    assert run_shard("0/1", photos, tmp_path / "out", store) == 2
    error = capsys.readouterr().err
    assert "is of colours, version 1, not of colours, version 2" in error

    (tmp_path / "out/part-00000-of-00001.parquet").write_bytes(b"PAR1 cut")
    assert run_shard("0/1", photos, tmp_path / "out", store) == 2
    assert "can't be read; delete it or give another --out" in capsys.readouterr().err


def test_new_images_move_no_other_one_to_another_shard(bundle_store, photos, tmp_path):
    def files_of_shard(out: Path) -> set[str]:
        assert run_shard("1/2", photos, out, bundle_store) == 0
        return {row["file"] for row in read_rows(out)}

    before = files_of_shard(tmp_path / "one")
    for i in range(8):
        (photos / f"0-new-{i}.png").write_bytes(tiny_bundle.make_image("red", seed=i))
    after = files_of_shard(tmp_path / "two")
    assert {file for file in after if "0-new" not in file} == before
    assert 0 < len(before) < COUNT


def brightness_baseline(brightness: float) -> dict[str, Histogram]:
    """Return the histogram of 200 images of about this brightness."""
    values = np.random.default_rng(0).normal(brightness, 2, 200).round()
    edges = bin_edges(values)
    return {"brightness": Histogram(edges=list(edges), counts=list(histogram(values, edges)))}


@pytest.mark.parametrize(("shift", "verdict"), [(0, "not large"), (60, "large")])
def test_drift_is_reported_against_the_baseline(shift, verdict, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(100):
        noise = np.random.default_rng(i).normal(100, 2)
        (images / f"{i}.png").write_bytes(make_gray_image(round(noise)))
    tiny_bundle.publish(tmp_path / "store", baseline=brightness_baseline(100 + shift))

    assert run_shard("0/1", images, tmp_path / "out", tmp_path / "store") == 0
    report = capsys.readouterr().err
    assert (
        f"shard 0/1: 100 images, 0 failed; drift against the validation data: {verdict}" in report
    )
    path = tmp_path / "out/part-00000-of-00001.parquet"
    metadata = parquet.ParquetFile(path).metadata.metadata
    drift = json.loads(metadata[b"drift"])
    assert drift.keys() == {"brightness"}
    assert (drift["brightness"] > 0.25) is (verdict == "large")
    assert (metadata[b"images"], metadata[b"failed"], metadata[b"shard"]) == (b"100", b"0", b"0/1")


def make_gray_image(value: int) -> bytes:
    return cv2.imencode(".png", np.full((32, 32, 3), value, np.uint8))[1].tobytes()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shard", "8/8", "--out", "x"], "'8/8' is not a shard such as 3/8"),
        (["--shard", "one", "--out", "x"], "'one' is not a shard such as 3/8"),
        (["--shard", "0/2"], "name its directory or bucket with --out"),
        (["--shard", "0/2", "--out", "x", "--format", "csv"], "shards are Parquet files"),
    ],
)
def test_shards_refuse_flags_that_do_not_fit(flags, words, bundle_store, photos, capsys):
    arguments = ["predict", str(photos), "--store", str(bundle_store), *flags]
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(arguments))
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A bucket with the images of `write_images` under photos/, and other objects."""
    directory = write_images(tmp_path_factory.mktemp("bucket") / "photos")
    (directory / "notes.txt").write_text("no image")
    (directory / ".hidden").mkdir()
    (directory / ".hidden/red.png").write_bytes(tiny_bundle.make_image("red"))
    with s3_server("images") as client:
        for path in directory.rglob("*"):
            if path.is_file():
                key = f"photos/{path.relative_to(directory)}"
                client.put_object(Bucket="images", Key=key, Body=path.read_bytes())
        client.put_object(Bucket="images", Key="photos-of-others/a.png", Body=b"")
        yield client


def test_a_prefix_of_a_bucket_is_classified_into_another(bucket, bundle_store, tmp_path):
    for number in range(2):
        out = "s3://images/results"
        assert run_shard(f"{number}/2", "s3://images/photos", out, bundle_store) == 0
    listed = bucket.list_objects_v2(Bucket="images", Prefix="results/")["Contents"]
    for description in listed:
        name = Path(description["Key"]).name
        bucket.download_file("images", description["Key"], str(tmp_path / name))

    model = Model.open(bundle_store)
    rows = read_rows(tmp_path)
    assert len(rows) == COUNT + 1
    assert {row["file"] for row in rows if row["error"]} == {"s3://images/photos/broken.png"}
    for row in rows:
        if not row["error"]:
            key = row["file"].removeprefix("s3://images/")
            body = bucket.get_object(Bucket="images", Key=key)["Body"].read()
            assert row["label"] == model.predict(body).label


def test_a_finished_shard_in_a_bucket_is_skipped(bucket, bundle_store, capsys):
    for _ in range(2):
        assert run_shard("0/9", "s3://images/photos", "s3://images/twice", bundle_store) == 0
    assert "shard 0/9: finished before, skipped" in capsys.readouterr().err


def test_without_shard_a_bucket_gets_one_file(bucket, bundle_store):
    words = ["s3://images/photos/a/red-3.png", "--out", "s3://images/one"]
    assert main(["predict", *words, "--store", str(bundle_store)]) == 0
    (only,) = bucket.list_objects_v2(Bucket="images", Prefix="one/")["Contents"]
    assert only["Key"] == "one/part-00000-of-00001.parquet"


def test_an_image_that_is_too_large_is_a_row_with_an_error(bucket, bundle_store, tmp_path):
    out = tmp_path / "out"
    flags = ("--max-body-bytes", "100")
    assert run_shard("0/1", "s3://images/photos/a", out, bundle_store, *flags) == 0
    assert all("are more than the 100 allowed" in row["error"] for row in read_rows(out))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("s3://images/none", "s3://images/none: no images below this prefix"),
        ("s3://nowhere/photos", "s3://nowhere/photos: no such bucket; check the name"),
        ("s3://", "s3://: no bucket; write s3://bucket/path"),
    ],
)
def test_a_wrong_prefix_is_one_line(source, words, bucket, bundle_store, tmp_path, capsys):
    assert run_shard("0/1", source, tmp_path / "out", bundle_store) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error
    assert not (tmp_path / "out").exists()
