"""The commands `predict` and `check`, as a user calls them."""

import csv
import io
import json
import os
import re
import select
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from models.bundle import Calibration, write_checksums
from serve import Model
from serve.commands import predict, result_writers
from support import ROOT, tiny_bundle
from support.server import assert_refused


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory with three images, one of them in a subdirectory, and a text file."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "a.png").write_bytes(tiny_bundle.make_image("red"))
    (images / "b [bold].jpg").write_bytes(tiny_bundle.make_image("green", kind=".jpg"))
    (images / "deep" / "c.webp").write_bytes(tiny_bundle.make_image("blue", size=64, kind=".webp"))
    (images / "notes.txt").write_text("no image")
    return images


def test_predict_gives_the_predictions_of_the_server(run_serve, bundle_store, images, server):
    result = run_serve("predict", images, "--store", bundle_store, "--format", "json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["model"] == {"name": "colours", "version": "1"}
    names = [Path(prediction["file"]).name for prediction in answer["predictions"]]
    assert names == ["a.png", "b [bold].jpg", "c.webp"]
    for prediction in answer["predictions"]:
        data = Path(prediction.pop("file")).read_bytes()
        assert server.predict(data).json()["predictions"] == [prediction]


def test_predict_finds_the_images_that_training_finds(run_serve, bundle_store, images):
    """Links are followed, hidden files are skipped, and the content decides without an ending."""
    (images / "a.png").rename(images / "photo")
    (images / ".hidden.png").write_bytes(tiny_bundle.make_image("red"))
    (images / ".cache").mkdir()
    (images / ".cache" / "0.png").write_bytes(tiny_bundle.make_image("red"))
    (images / "deep" / "above").symlink_to("..")
    linked = images.with_name("linked")
    linked.mkdir()
    (linked / "d.png").write_bytes(tiny_bundle.make_image("blue"))
    (images / "link").symlink_to(linked)
    os.mkfifo(images / "pipe.png")
    result = run_serve("predict", images, "--store", bundle_store, "--format", "csv")
    assert result.returncode == 0, result.stderr
    files = [row["file"] for row in csv.DictReader(io.StringIO(result.stdout))]
    names = ["b [bold].jpg", "deep/c.webp", "link/d.png", "photo"]
    assert files == [str(images / name) for name in names]
    assert result.stderr.startswith(f"{images}: 1 of 5 files left out: not JPEG, PNG")
    assert result.stderr.count("\n") == 1


def test_predict_prints_csv(run_serve, bundle_store, images):
    result = run_serve("predict", images, "--store", bundle_store, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["label"] for row in rows] == ["red", "green", "blue"]
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a result file of any format, by the names of its columns."""
    if path.suffix == ".json":
        return json.loads(path.read_text())["predictions"]
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(path.read_text())))
    return parquet.read_table(path).to_pylist()


def read_embedding(row: dict[str, Any]) -> list[float]:
    embedding = row["embedding"]
    if isinstance(embedding, str):
        return [float(number) for number in embedding.split("|")]
    return embedding


@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_predict_writes_a_file_with_predictions_embeddings_and_errors(
    run_serve, bundle_store, images, tmp_path, ending
):
    out = tmp_path / f"results.{ending}"
    out.write_text("old")
    (images / "broken.png").write_bytes(b"no image")
    result = run_serve("predict", images, "--store", bundle_store, "--out", out, "--embedding")
    assert result.returncode == 1
    assert result.stdout == ""
    assert [path.name for path in out.parent.iterdir() if path.is_file()] == [out.name]

    model = Model.open(bundle_store, threads=1)
    rows = {Path(row["file"]).name: row for row in read_rows(out)}
    assert list(rows) == ["a.png", "b [bold].jpg", "broken.png", "c.webp"]
    broken = rows.pop("broken.png")
    assert "not a JPEG" in broken["error"]
    assert not broken.get("label")
    for row in rows.values():
        prediction = model.predict(row["file"])
        assert row["label"] == prediction.label
        assert float(row["confidence"]) == pytest.approx(prediction.confidence, rel=1e-5)
        assert row["prediction_set"] in (prediction.prediction_set, prediction.label)
        assert str(row["abstain"]) == str(row["out_of_distribution"]) == "False"
        assert not row.get("error")
        assert read_embedding(row) == pytest.approx(model.embed(row["file"]), rel=1e-5)


def test_a_parquet_file_has_the_types_of_the_values_and_names_the_model(
    run_serve, bundle_store, images, tmp_path
):
    out = tmp_path / "results.parquet"
    assert run_serve("predict", images, "--store", bundle_store, "--out", out).returncode == 0
    schema = parquet.read_schema(out)
    assert schema.metadata[b"model"] == b"colours"
    assert schema.metadata[b"version"] == b"1"
    assert str(schema.field("abstain").type) == "bool"
    assert str(schema.field("confidence").type) == "float"
    assert "embedding" not in schema.names
    top = parquet.read_table(out).to_pylist()[0]["top"]
    assert [choice["label"] for choice in top][:1] == ["red"]


def test_results_are_written_in_order_while_files_are_classified(
    bundle_store, tmp_path, monkeypatch
):
    """Only a bounded number of results waits, however many files there are."""
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    monkeypatch.setattr(result_writers, "ROWS_PER_GROUP", 5)
    files: list[Path] = []
    for i in range(60):
        files.append(tmp_path / f"{i:02d}.png")
        files[-1].write_bytes(tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=i))

    classified: list[Path] = []
    waiting: list[int] = []
    classify_batch = predict.classify_batch

    def record_batch(model: Model, top_k: int, has_embeddings: bool, batch: list[Path]) -> Any:
        classified.extend(batch)
        return classify_batch(model, top_k, has_embeddings, batch)

    class RecordingWriter(result_writers.ParquetWriter):
        def write(self, result: result_writers.Result) -> None:
            waiting.append(len(classified) - len(waiting))
            super().write(result)

    monkeypatch.setattr(predict, "classify_batch", record_batch)
    monkeypatch.setattr(predict, "ParquetWriter", RecordingWriter)
    out = tmp_path / "results.parquet"
    store = ("--store", str(bundle_store), "--threads", "2")
    assert predict.main([*map(str, files), "--out", str(out), *store]) == 0
    assert [row["file"] for row in read_rows(out)] == [str(file) for file in files]
    assert [row["label"] for row in read_rows(out)] == tiny_bundle.CLASSES * 20
    assert parquet.ParquetFile(out).num_row_groups == 12
    assert max(waiting) <= 2 * predict.BATCHES_AHEAD * 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--format", "parquet"), "name it with --out FILE"),
        (("--embedding",), "add --format json, csv or parquet"),
        (("--out", "missing/results.csv"), "No such file or directory"),
        (("--out", "."), "is not a regular file"),
        (("--top-k", "0"), "--top-k must be at least 1"),
    ],
)
def test_predict_refuses_flags_that_do_not_fit(run_serve, bundle_store, images, flags, words):
    assert_refused(run_serve("predict", images / "a.png", "--store", bundle_store, *flags), words)


def test_parquet_without_its_package_names_the_extra(bundle_store, images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    out = tmp_path / "results.parquet"
    with pytest.raises(ValueError, match=r"needs the package pyarrow: pip install 'imago\[parquet"):
        predict.main([str(images), "--store", str(bundle_store), "--out", str(out)])
    assert not out.exists()


def test_predict_prints_a_table(run_serve, bundle_store, images):
    table = run_serve("predict", images, "--store", bundle_store).stdout
    for word in ("a.png", "b [bold].jpg", "green", "%", "colours, version 1"):
        assert word in table


def test_progress_bar_appears_on_a_terminal_only(run_serve, serve_commands, bundle_store, images):
    command = ["predict", str(images), "--store", str(bundle_store), "--format", "csv"]
    assert "Classifying" not in run_serve(*command).stderr

    terminal, child_end = os.openpty()
    error_log = Path(os.ttyname(child_end))
    process = serve_commands.start(*command, env={"TERM": "xterm"}, error_log=error_log)
    output = b""
    is_running = True
    while is_running:
        is_running = process.poll() is None
        while select.select([terminal], [], [], 0.05)[0]:
            output += os.read(terminal, 4096)
    os.close(child_end)
    os.close(terminal)
    assert b"Classifying" in output
    assert b"100%" in output


def test_a_file_that_fails_does_not_stop_the_others(run_serve, bundle_store, images):
    files = (images / "notes.txt", images / "a.png")
    result = run_serve("predict", *files, "--store", bundle_store, "--format", "json")
    assert result.returncode == 1
    failed, classified = json.loads(result.stdout)["predictions"]
    assert "not a JPEG" in failed["error"]
    assert classified["label"] == "red"


def test_predict_names_what_is_missing(run_serve, bundle_store, tmp_path):
    result = run_serve("predict", tmp_path / "gone.png", "--store", bundle_store)
    assert_refused(result, "gone.png", "No such file")
    assert_refused(run_serve("predict", tmp_path, "--store", bundle_store), "no images")
    assert_refused(
        run_serve("predict", ROOT / "README.md", "--store", tmp_path / "empty"), "no model"
    )


def test_check_shows_what_would_be_served(run_serve, tmp_path):
    calibration = Calibration(conformal_level=0.9, conformal_quantile=0.5)
    tiny_bundle.publish(tmp_path, calibration=calibration)
    tiny_bundle.publish(tmp_path)
    result = run_serve("check", "--store", tmp_path, "--version", "1")
    assert result.returncode == 0, result.stderr
    for line in (
        r"model +colours, version 1 of 1, 2$",
        r"checksums +all files match",
        r"variant +fp32 of fp32, on onnxruntime",
        r"classes +3: red",
        r"samples +16 reproduced",
        r"prediction sets +contain the true class in 90%",
        r"ready +yes",
    ):
        assert re.search(line, result.stdout, re.MULTILINE), (line, result.stdout)

    latest = run_serve("check", "--store", tmp_path)
    assert "version 2 of 1, 2, follows latest" in latest.stdout
    summary = json.loads(run_serve("check", "--store", tmp_path, "--json").stdout)
    assert summary["version"] == 2
    assert summary["variant"] == "fp32"
    assert summary["engine"] == "onnxruntime"


def test_check_shows_why_the_service_is_not_ready(run_serve, tmp_path):
    store = tmp_path / "store"
    assert_refused(run_serve("check", "--store", store, "--json"), "no model", status=1)
    path = tiny_bundle.publish(store)
    with (path / "model.onnx").open("ab") as file:
        file.write(b"\0")
    result = run_serve("check", "--store", store)
    assert_refused(result, "model.onnx", "changed since it was written", status=1)
    assert re.search(r"ready +no", result.stdout)
    assert_refused(run_serve("check", "--store", store, "--threads", "x"), "--threads")


def test_check_runs_the_samples(run_serve, tmp_path):
    path = tiny_bundle.publish(tmp_path)
    expected = dict(np.load(path / "samples" / "expected.npz"))
    expected["probabilities"] = expected["probabilities"][:, ::-1]
    np.savez(path / "samples" / "expected.npz", **expected)
    write_checksums(path)
    result = run_serve("check", "--store", tmp_path, "--json")
    assert_refused(result, "self check", "probabilities", status=1)


def test_help_lists_every_command(run_serve):
    text = run_serve("--help").stdout
    for command in ("predict", "check"):
        assert command in text
        assert run_serve(command, "--help").returncode == 0
