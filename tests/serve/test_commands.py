"""`python -m serve predict | check | bench`, as a user calls them."""

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny_bundle

from models.bundle import Calibration, write_checksums
from serve.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )


def refused(result: subprocess.CompletedProcess, *words: str, status: int = 2) -> None:
    assert result.returncode == status, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three colours, one file below another directory, and a text that no one should look at."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "a.png").write_bytes(tiny_bundle.make_image("red"))
    (images / "b [bold].jpg").write_bytes(tiny_bundle.make_image("green", kind=".jpg"))
    (images / "deep" / "c.webp").write_bytes(tiny_bundle.make_image("blue", size=64, kind=".webp"))
    (images / "notes.txt").write_text("no image")
    return images


def test_predict_a_directory_as_json_is_what_the_server_says(bundle_store, folder, server):
    result = run("predict", folder, "--store", bundle_store, "--format", "json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["model"] == {"name": "colours", "version": "1"}
    assert [Path(p["file"]).name for p in answer["predictions"]] == [
        "a.png",
        "b [bold].jpg",
        "c.webp",
    ]
    for prediction in answer["predictions"]:
        (said,) = server.predict(Path(prediction.pop("file")).read_bytes()).json()["predictions"]
        assert prediction == said


def test_predict_as_csv_and_as_table(bundle_store, folder):
    rows = list(
        csv.DictReader(
            io.StringIO(run("predict", folder, "--store", bundle_store, "--format", "csv").stdout)
        )
    )
    assert [row["label"] for row in rows] == ["red", "green", "blue"]
    assert all(0 < float(row["confidence"]) <= 1 for row in rows)
    table = run("predict", folder, "--store", bundle_store).stdout
    for word in ("a.png", "b [bold].jpg", "green", "%", "colours, version 1"):
        assert word in table


def test_a_terminal_sees_a_progress_bar_and_a_pipe_does_not(bundle_store, folder):
    assert run("predict", folder, "--store", bundle_store).stderr == ""
    ours, theirs = os.openpty()
    command = [
        sys.executable,
        "-m",
        "serve",
        "predict",
        str(folder),
        "--store",
        str(bundle_store),
        "--format",
        "csv",
    ]
    env = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, env=env):
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(ours, 4096):
                seen += part
    os.close(ours)
    assert b"Classifying" in seen
    assert b"100%" in seen


def test_one_bad_file_does_not_stop_the_others(bundle_store, folder):
    result = run(
        "predict",
        folder / "notes.txt",
        folder / "a.png",
        "--store",
        bundle_store,
        "--format",
        "json",
    )
    assert result.returncode == 1
    bad, good = json.loads(result.stdout)["predictions"]
    assert "not a JPEG" in bad["error"]
    assert good["label"] == "red"


def test_predict_says_what_is_missing(bundle_store, tmp_path):
    refused(
        run("predict", tmp_path / "gone.png", "--store", bundle_store), "gone.png", "No such file"
    )
    refused(run("predict", tmp_path, "--store", bundle_store), "no images")
    refused(run("predict", ROOT / "README.md", "--store", tmp_path / "empty"), "no model")


def test_check_tells_what_would_be_served(tmp_path):
    tiny_bundle.publish(
        tmp_path, calibration=Calibration(conformal_level=0.9, conformal_quantile=0.5)
    )
    tiny_bundle.publish(tmp_path)
    result = run("check", "--store", tmp_path, "--version", "1")
    assert result.returncode == 0, result.stderr
    for line in (
        r"model +colours, version 1 of 1, 2$",
        r"variant +fp32 of fp32, on onnxruntime",
        r"classes +3: red",
        r"samples +16 answered as expected",
        r"prediction sets +hold the true class in 90%",
        r"ready +yes",
    ):
        assert re.search(line, result.stdout, re.MULTILINE), (line, result.stdout)
    assert "version 2 of 1, 2, follows latest" in run("check", "--store", tmp_path).stdout
    told = json.loads(run("check", "--store", tmp_path, "--json").stdout)
    assert (told["version"], told["variant"], told["engine"]) == (2, "fp32", "onnxruntime")


def test_check_tells_why_it_is_not_ready(tmp_path):
    store = tmp_path / "store"
    refused(run("check", "--store", store, "--json"), "no model", status=1)
    path = tiny_bundle.publish(store)
    with (path / "model.onnx").open("ab") as file:
        file.write(b"\0")
    result = run("check", "--store", store)
    refused(result, "model.onnx", "changed since it was written", status=1)
    assert re.search(r"ready +no", result.stdout)
    refused(run("check", "--store", store, "--threads", "x"), "--threads")


def test_check_runs_the_samples(tmp_path):
    path = tiny_bundle.publish(tmp_path)
    expected = dict(np.load(path / "samples" / "expected.npz"))
    expected["probabilities"] = expected["probabilities"][:, ::-1]
    np.savez(path / "samples" / "expected.npz", **expected)
    write_checksums(path)
    refused(run("check", "--store", tmp_path, "--json"), "self check", "probabilities", status=1)


def test_bench_measures_a_service_with_its_own_samples(server):
    result = run("bench", server.url, "--clients", "1,4", "--seconds", "1", "--json")
    assert result.returncode == 0, result.stderr
    one, four = json.loads(result.stdout)
    assert (one["clients"], four["clients"]) == (1, 4)
    for step in (one, four):
        assert set(step["statuses"]) == {"200"}
        assert 0 < step["p50_ms"] <= step["p90_ms"] <= step["p99_ms"] <= step["max_ms"]
        assert step["per_second"] == pytest.approx(step["statuses"]["200"], rel=0.2)
    table = run(
        "bench", server.url.removeprefix("http://"), "--clients", "2", "--seconds", "0.2"
    ).stdout
    assert "p99 ms" in table


def test_bench_counts_what_was_refused(server, tmp_path):
    text = tmp_path / "text"
    text.write_text("no image")
    result = run(
        "bench", server.url, "--image", text, "--clients", "1", "--seconds", "0.2", "--json"
    )
    assert result.returncode == 1
    assert list(json.loads(result.stdout)[0]["statuses"]) == ["415"]


def test_bench_says_what_is_wrong(server, tmp_path):
    refused(run("bench", "http://127.0.0.1:9", "--clients", "1"), "nothing answers")
    refused(run("bench", server.url, "--clients", "0"), "--clients")
    refused(run("bench", server.url, "--seconds", "1e9"), "--seconds")
    refused(run("bench", server.url, "--image", tmp_path / "gone"), "gone")
    refused(run("bench", f"http://127.0.0.1:{server.metrics_port}"), "not an Imago service")
    refused(run("bench", "ftp://x"), "URL")


def test_help_lists_every_setting_and_every_command():
    said = run("--help").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in said
        assert PREFIX + name.upper() in said
    for command in ("predict", "check", "bench"):
        assert command in said
        assert run(command, "--help").returncode == 0
