"""Training that publishes to a store in a bucket, and starts from a bundle of it."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.store import Store
from support import ROOT, tiny_bundle
from support.interrupted_runs import assert_same_result, finish_run, start_run
from support.s3_server import S3Server, failing_s3_server
from support.server import wait_until
from train.learning.initial_weights import InitialWeights
from train.runs.checkpoints import checkpoint_path
from train.runs.run_mirror import RunMirror

BUCKET = "bucket"
QUICK = (
    *("--data.source", "digits", "--data.size", 16, "--trainer.max_epochs", 1),
    *("--export.quantize.enabled", "false", "--export.report", "false"),
    *("--progress.quiet", "true", "--audit.enabled", "false"),
)


@pytest.fixture(scope="module")
def running_server() -> Iterator[S3Server]:
    with failing_s3_server(BUCKET) as server:
        yield server


@pytest.fixture
def s3(running_server: S3Server, tmp_path, monkeypatch) -> S3Server:
    monkeypatch.setenv("IMAGO_STORE_CACHE", str(tmp_path / "cache"))
    running_server.choose_failure = lambda method, path: None
    return running_server


def variables() -> dict[str, str]:
    """The variables of this test that a command needs."""
    prefixes = ("AWS_", "IMAGO_STORE_CACHE")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def test_a_run_publishes_to_a_bucket(commands, s3: S3Server, tmp_path):
    url = f"s3://{BUCKET}/trained"
    runs = ["--trainer.default_root_dir", tmp_path / "runs"]
    command = commands.run("fit", *QUICK, "--store", url, *runs, env=variables(), cwd=ROOT)
    last_line = command.text.strip().splitlines()[-1]
    assert f"{url}/digits/1: test accuracy" in last_line
    assert f"--store {url} --model digits" in last_line
    store = Store(url)
    assert store.latest("digits") == 1
    assert store.open("digits").manifest.name == "digits"
    assert not [key for key in s3.keys(BUCKET, "trained") if ".staging" in key]


@pytest.mark.parametrize(
    ("failure", "store", "message"),
    [
        ("denied", f"s3://{BUCKET}/other", "access denied; set AWS_ACCESS_KEY_ID"),
        (None, "s3://not-there/other", "no such bucket; check the name"),
    ],
)
def test_a_store_that_can_not_be_written_is_found_before_the_training(
    commands, s3: S3Server, tmp_path, failure, store, message
):
    s3.choose_failure = lambda method, path: failure
    runs = ["--trainer.default_root_dir", tmp_path / "runs"]
    command = commands.start("fit", *QUICK, "--store", store, *runs, env=variables(), cwd=ROOT)
    assert command.status() == 2
    assert f"{store}: {message}" in command.text.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


def test_weights_are_those_of_a_version_in_a_bucket(s3: S3Server):
    url = f"s3://{BUCKET}/weights"
    for _ in range(2):
        tiny_bundle.publish(url, samples=1)
    settings: dict[str, tuple[Any, str]] = {
        "colours": (url, "2"),
        "colours/1": (url, "1"),
        f"{url}/colours": ("artifacts/store", "2"),
        f"{url}/colours/1": ("artifacts/store", "1"),
        f"{url}/colours/latest": ("artifacts/store", "2"),
    }
    for setting, (store, version) in settings.items():
        bundle = InitialWeights(setting, "tiny", store).bundle
        assert bundle is not None
        assert bundle.name == version
        assert (bundle / "manifest.json").is_file()


# Runs


def resume_elsewhere(commands, s3: S3Server, tmp_path, name: str) -> Path:
    """Kill a run, remove its machine's disk, and resume it on another; return its runs there."""
    flags = ("--resume.url", f"s3://{BUCKET}/{name}", "--resume.every_steps", 4)
    first = tmp_path / "first"
    run = start_run(commands, first, *flags, kill="TERM:step:17", variables=variables())
    assert run.status() == 143
    assert json.loads(s3.read(BUCKET, f"{name}/digits/1/newest"))["step"] == 17
    shutil.rmtree(first)

    second = tmp_path / "second"
    resumed = finish_run(commands, second, *flags, variables=variables())
    assert "resuming from step 17" in resumed.text
    return second


def test_a_run_resumes_on_another_machine_from_the_bucket(commands, s3: S3Server, tmp_path):
    resume_elsewhere(commands, s3, tmp_path, "runs")
    assert s3.keys(BUCKET, "runs/") == ["runs/digits/1/finished", "runs/digits/1/settings.json"]

    # A third machine gets another number.
    third = tmp_path / "third" / "digits"
    RunMirror(f"s3://{BUCKET}/runs", "digits").fetch(third)
    assert (third / "1" / "finished").exists()


@pytest.mark.slow
def test_a_run_that_moved_ends_like_an_uninterrupted_one(commands, s3: S3Server, tmp_path):
    finish_run(commands, tmp_path / "undisturbed")
    moved = resume_elsewhere(commands, s3, tmp_path, "moved")
    assert_same_result(moved, tmp_path / "undisturbed")


@pytest.mark.parametrize("failure", ["reset", "denied"])
def test_an_upload_that_is_cut_leaves_the_snapshot_before_it(
    s3: S3Server, tmp_path, capfd, failure
):
    url = f"s3://{BUCKET}/cut-{failure}"
    run = tmp_path / "digits" / "1"
    run.mkdir(parents=True)
    mirror = RunMirror(url, "digits")
    assert mirror.claim(1, {"seed_everything": 1})
    assert not RunMirror(url, "digits").claim(1, {"seed_everything": 1})
    mirror.start(run)
    (run / "best.ckpt").write_bytes(b"best")
    for step in (4, 8):
        checkpoint_path(run, step).write_bytes(f"weights of step {step}".encode())
        if step == 8:
            s3.choose_failure = lambda method, path: failure if "00000008" in path else None
        mirror.upload_soon()
        wait_until(lambda step=step: is_uploaded(s3, failure, step) or capfd.readouterr().err)
    mirror.close()
    s3.choose_failure = lambda method, path: None

    other = tmp_path / "other"
    RunMirror(url, "digits").fetch(other)
    assert checkpoint_path(other / "1", 4).read_bytes() == b"weights of step 4"
    assert not checkpoint_path(other / "1", 8).exists()
    assert (other / "1" / "best.ckpt").read_bytes() == b"best"


def is_uploaded(s3: S3Server, prefix: str, step: int) -> bool:
    keys = s3.keys(BUCKET, f"cut-{prefix}/digits/1/newest")
    return bool(keys) and json.loads(s3.read(BUCKET, keys[0]))["step"] == step


def test_a_run_that_another_process_continues_is_not_written(s3: S3Server, tmp_path, capfd):
    url = f"s3://{BUCKET}/taken"
    for name, step in (("one", 4), ("two", 8), ("one", 12)):
        run = tmp_path / name / "1"
        run.mkdir(parents=True, exist_ok=True)
        checkpoint_path(run, step).write_bytes(name.encode())
    one = RunMirror(url, "digits")
    one.start(tmp_path / "one" / "1")
    two = RunMirror(url, "digits")
    two.start(tmp_path / "two" / "1")
    two.upload_soon()
    two.close()
    one.upload_soon()
    one.close()
    assert f"{url}/digits/1: another process continues this run" in capfd.readouterr().err
    assert json.loads(s3.read(BUCKET, "taken/digits/1/newest"))["step"] == 8


def test_a_place_for_checkpoints_that_is_no_bucket_is_refused(commands, tmp_path):
    flags = ["--resume.url", "/disk/runs", "--trainer.default_root_dir", tmp_path / "runs"]
    command = commands.start("fit", *QUICK, *flags, cwd=ROOT)
    assert command.status() == 2
    assert "resume.url: /disk/runs is not a URL of a bucket" in command.text.splitlines()[-1]
