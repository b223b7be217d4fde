"""Serving from a bucket, with a cache on disk, and serving one bundle without a store."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.__main__ import main as models
from models.store import Store
from serve import Model
from serve.__main__ import main as serve
from support import ROOT, tiny_bundle
from support.hot_reload import FAST_RELOAD, served_version
from support.s3_server import S3Server, failing_s3_server
from support.server import wait_until

BUCKET = "bucket"
RED = tiny_bundle.make_image("red")


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    with failing_s3_server(BUCKET) as server:
        yield server


@pytest.fixture
def s3(running_server: S3Server, tmp_path, monkeypatch) -> S3Server:
    """A server without failures; the cache of the commands is not that of the service."""
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "cache-of-commands"))
    running_server.choose_failure = lambda method, path: None
    running_server.requests.clear()
    return running_server


@pytest.fixture
def url(request) -> str:
    return f"s3://{BUCKET}/{request.node.name}"


def publish(store: str, **options: object) -> Path:
    return tiny_bundle.publish(store, samples=2, **options)


def reachable(server) -> float:
    return server.metric("imago_store_reachable")


def test_a_bucket_is_followed_and_its_outages_are_survived(start, s3, url, tmp_path):
    flags = (*FAST_RELOAD, "--store-cache", str(tmp_path / "cache"))
    publish(url)
    server = start(*flags, store=url)
    assert served_version(server) == "1"
    assert reachable(server) == 1
    assert server.http.get("/samples/0").status_code == 200

    # Nothing but one small request for `latest` at a time.
    s3.requests.clear()
    wait_until(lambda: len(s3.requests) >= 3)
    assert {path.partition(url.removeprefix("s3://"))[2] for _, path in s3.requests} == {
        "/colours/latest"
    }

    publish(url, scale=0.5)
    wait_until(lambda: served_version(server) == "2")
    assert models(["rollback", "colours", "--store", url]) == 0
    wait_until(lambda: served_version(server) == "1")

    s3.choose_failure = lambda method, path: "denied"
    wait_until(lambda: reachable(server) == 0)
    assert served_version(server) == "1"
    assert server.is_ready()

    # A second service starts from the same cache, which is not that of the commands.
    second = start(*flags, store=url)
    assert served_version(second) == "1"
    assert reachable(second) == 0

    s3.choose_failure = lambda method, path: None
    assert models(["promote", "colours", "2", "--store", url]) == 0
    wait_until(lambda: served_version(server) == "2")
    wait_until(lambda: served_version(second) == "2")
    assert reachable(server) == reachable(second) == 1
    assert server.metric("imago_reloads_total", outcome="refused") == 0


def test_a_half_written_version_is_served_when_it_is_whole(start, s3, url, tmp_path):
    publish(url)
    server = start(*FAST_RELOAD, "--store-cache", str(tmp_path / "cache"), store=url)
    publish(url, promote=False)
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    key = f"{prefix}/colours/2/model.onnx"
    content = s3.read(BUCKET, key)
    s3.client.delete_object(Bucket=BUCKET, Key=key)
    s3.write(BUCKET, f"{prefix}/colours/latest", b"2\n")
    wait_until(lambda: "half-written" in server.log.read_text())
    assert served_version(server) == "1"
    s3.write(BUCKET, key, content)
    wait_until(lambda: served_version(server) == "2")
    assert server.metric("imago_reloads_total", outcome="refused") == 0


def test_commands_and_programs_read_a_bucket(s3, url, tmp_path, capsys):
    publish(url)
    cache = ["--store-cache", str(tmp_path / "cache")]
    assert serve(["check", "--store", url, *cache]) == 0
    assert "colours, version 1 of 1, follows latest" in capsys.readouterr().out
    image = tmp_path / "red.png"
    image.write_bytes(RED)
    assert serve(["predict", str(image), "--store", url, *cache, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["label"] == "red"
    assert Model.open(url, "colours", 1, threads=1).predict(RED).label == "red"


@pytest.mark.parametrize(
    ("failure", "store", "message"),
    [
        ("denied", "", "access denied; set AWS_ACCESS_KEY_ID"),
        ("skewed", "", "the clock of this machine is off"),
        (None, "s3://not-there/store", "no such bucket; check the name"),
        (None, "", "no model in this store; train one first"),
        (None, "ftp://host/store", "no store; give a directory, or a URL that begins with s3://"),
    ],
)
def test_a_service_without_a_model_says_why(
    serve_commands, s3, url, tmp_path, failure, store, message
):
    s3.choose_failure = lambda method, path: failure
    flags = ["--store", store or url, "--store-cache", tmp_path / "cache"]
    command = serve_commands.start(*flags, env=dict(os.environ), cwd=ROOT)
    assert command.status() == 2
    (line,) = command.text.splitlines()
    assert line.startswith(f"error: {store or url}: {message}")


def test_check_tells_a_store_that_can_not_be_read_from_a_bad_bundle(s3, url, tmp_path, capsys):
    flags = ["check", "--store", url, "--model", "colours", "--store-cache", str(tmp_path / "c")]
    publish(url)
    s3.choose_failure = lambda method, path: "denied"
    assert serve(flags) == 75
    s3.choose_failure = lambda method, path: None
    s3.write(BUCKET, f"{url.removeprefix(f's3://{BUCKET}/')}/colours/1/model.onnx", b"torn")
    assert serve(flags) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "colours/1/model.onnx: changed since it was written" in error


# One bundle


@pytest.fixture
def bare(bundle_store, tmp_path) -> Path:
    """A bundle outside of a store, as a volume mounts it."""
    path = tmp_path / "models"
    shutil.copytree(Store(bundle_store).path("colours", 1), path)
    return path


def test_one_bundle_is_served_without_a_store(start, bare, tmp_path):
    server = start("--bundle", str(bare), *FAST_RELOAD, store=tmp_path / "no-store")
    (prediction,) = server.predict(RED).json()["predictions"]
    assert prediction["label"] == "red"
    assert server.http.get("/model").json()["version"] == "1"
    assert server.http.get("/samples/0").status_code == 200
    assert server.http.get("/v2/models/colours/ready").status_code == 200


def test_the_commands_take_one_bundle(bare, tmp_path, capsys):
    assert serve(["check", "--bundle", str(bare)]) == 0
    assert "colours, version 1 of 1" in capsys.readouterr().out
    image = tmp_path / "red.png"
    image.write_bytes(RED)
    assert serve(["predict", str(image), "--bundle", str(bare), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["label"] == "red"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bundle", "{}/none"], "none/manifest.json: no such file"),
        (["--bundle", "{}", "--model", "digits"], "is colours/1, but --model and --version say"),
        (["--bundle", "{}", "--version", "2"], "is colours/1, but --model and --version say"),
        (["--bundle", "{}", "--shadow-version", "2"], "shadow_version needs a store; give no"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused(bare, capsys, flags, message):
    assert serve([flag.format(bare) for flag in flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
