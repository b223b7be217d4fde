"""The whole road through its own doors: train the embedded default, serve the bundle, ask about real scans."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import httpx
import pytest
from sklearn.datasets import load_digits
from support import ROOT
from support.server import Server, find_free_ports

DIGITS = load_digits()


def png(index: int) -> bytes:
    pixels = (DIGITS.images[index] * 255 / 16).round().astype("uint8")
    return cv2.imencode(".png", pixels)[1].tobytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store with the bundle of a run of `digits`, and what the run printed."""
    store = tmp_path_factory.mktemp("road") / "store"
    command = [
        sys.executable,
        "-m",
        "train",
        "run",
        "digits",
        "--store",
        str(store),
        "--trainer.default_root_dir",
        str(store.parent / "runs"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return store, result.stdout


@pytest.fixture(scope="module")
def served(trained: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(trained[0], tmp_path_factory.mktemp("served") / "log")
    try:
        yield running.wait_ready()
    finally:
        assert running.stop() == 0


def test_training_ends_in_one_line_that_says_where_how_good_and_how_to_serve(trained):
    store, printed = trained
    last = printed.strip().splitlines()[-1]
    accuracy = float(re.search(r"test accuracy (0\.\d+|1\.0+)", last)[1])
    assert accuracy >= 0.98
    assert str(store / "digits" / "1") in last
    command = last.partition("serve it: ")[2].split()
    assert subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True).returncode == 0, last


def test_the_bundle_records_what_the_line_says(trained):
    store, printed = trained
    manifest = json.loads((store / "digits" / "latest" / "manifest.json").read_text())
    assert f"{manifest['metrics']['test']['accuracy']:.4f}" in printed.strip().splitlines()[-1]
    assert manifest["classes"] == [str(i) for i in range(10)]
    assert manifest["input"]["channels"] == 1


def test_the_service_knows_the_digits(served):
    """Over many real scans, so that a wrong channel, scale or class order can't pass."""
    indices = range(0, 1797, 9)
    parts = [("file", (f"{i}.png", png(i), "image/png")) for i in indices]
    right = 0
    for at in range(0, len(parts), 20):
        answer = served.http.post("/predict", files=parts[at : at + 20]).json()
        truth = [str(DIGITS.target[i]) for i in indices[at : at + 20]]
        right += sum(
            p["label"] == label for p, label in zip(answer["predictions"], truth, strict=True)
        )
    assert right / len(parts) >= 0.98


def test_raw_bytes_as_in_the_readme(served):
    answer = served.predict(png(7)).json()
    assert answer["model"] == {"name": "digits", "version": "1"}
    assert answer["predictions"][0]["label"] == str(DIGITS.target[7])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_barrier_in_the_reports(trained, browser, scheme):
    """Of the model and of the data."""
    from axe_playwright_python.sync_playwright import Axe

    store = trained[0]
    page = browser.new_page(color_scheme=scheme)
    for path in (
        store / "digits" / "1" / "report.html",
        store.parent / "runs/digits/1/audit/index.html",
    ):
        page.goto(path.as_uri())
        report = Axe().run(page)
        assert not report.violations_count, report.generate_report()
    page.close()


@pytest.mark.slow
def test_a_fresh_clone_serves_with_one_command(tmp_path):
    """What a newcomer does, virtual environment included."""
    clone = tmp_path / "imago"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    port, metrics_port = find_free_ports(2)
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                "make",
                "serve",
                f"PORT={port}",
                f"ARGS=--host 127.0.0.1 --metrics-port {metrics_port}",
            ],
            cwd=clone,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health/ready", process, log)
        answer = httpx.post(
            f"http://127.0.0.1:{port}/predict",
            content=png(3),
            headers={"Content-Type": "image/png"},
        )
        assert answer.json()["predictions"][0]["label"] == "3"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(clone)


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: int = 900) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    raise AssertionError(f"not ready: {log.read_text()}")
