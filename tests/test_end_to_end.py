"""Train the built-in digits, serve the bundle, and predict real scans."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import httpx
import pytest
from sklearn.datasets import load_digits

from support import ROOT
from support.forked_commands import ForkedCommands
from support.server import Server, find_free_ports

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DIGITS = load_digits()
IMAGES_PER_REQUEST = 20


def make_png(index: int) -> bytes:
    """One of scikit-learn's digits as a file's bytes."""
    pixels = (DIGITS.images[index] * 255 / 16).round().astype("uint8")
    return cv2.imencode(".png", pixels)[1].tobytes()


def label_of(index: int) -> str:
    return str(DIGITS.target[index])


@pytest.fixture(scope="module")
def trained(commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store with the bundle of a run of `digits`, and what the run printed."""
    store = tmp_path_factory.mktemp("end-to-end") / "store"
    runs = store.parent / "runs"
    command = commands.run(
        "run", "digits", "--store", store, "--trainer.default_root_dir", runs, cwd=ROOT
    )
    return store, command.text


@pytest.fixture(scope="module")
def served(
    trained: tuple[Path, str],
    serve_commands: ForkedCommands,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("served") / "log"
    server = Server(trained[0], log, forker=serve_commands)
    try:
        yield server.wait_ready()
    finally:
        assert server.stop() == 0


def test_training_ends_with_the_bundle_its_accuracy_and_the_command_to_serve_it(trained):
    store, printed = trained
    last_line = printed.strip().splitlines()[-1]
    accuracy = float(re.search(r"test accuracy (0\.\d+|1\.0+)", last_line)[1])
    assert accuracy >= 0.98
    assert str(store / "digits" / "1") in last_line

    command = last_line.partition("serve it: ")[2].split()
    result = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True)
    assert result.returncode == 0, last_line


def test_the_bundle_records_the_printed_accuracy(trained):
    store, printed = trained
    manifest = json.loads((store / "digits" / "latest" / "manifest.json").read_text())
    accuracy = f"{manifest['metrics']['test']['accuracy']:.4f}"
    assert accuracy in printed.strip().splitlines()[-1]
    assert manifest["classes"] == [str(i) for i in range(10)]
    assert manifest["input"]["channels"] == 1


def test_the_service_recognises_the_digits(served):
    """Over many real scans: a wrong channel, scale or class order lowers the accuracy."""
    indices = range(0, 1797, 9)
    correct = 0
    for start in range(0, len(indices), IMAGES_PER_REQUEST):
        batch = indices[start : start + IMAGES_PER_REQUEST]
        files = [("file", (f"{i}.png", make_png(i), "image/png")) for i in batch]
        predictions = served.http.post("/predict", files=files).json()["predictions"]
        for prediction, i in zip(predictions, batch, strict=True):
            correct += prediction["label"] == label_of(i)
    assert correct / len(indices) >= 0.98


def test_raw_bytes_as_in_the_readme(served):
    answer = served.predict(make_png(7)).json()
    assert answer["model"] == {"name": "digits", "version": "1"}
    assert answer["predictions"][0]["label"] == label_of(7)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_reports_are_accessible(trained, browser: "Browser", scheme):
    """Axe finds no violation in the model's report and in that of the audit; both fit a phone."""
    from axe_playwright_python.sync_playwright import Axe

    store, _ = trained
    reports = [
        store / "digits" / "1" / "report.html",
        store.parent / "runs/digits/1/audit/index.html",
    ]
    page = browser.new_page(color_scheme=scheme)
    for path in reports:
        page.goto(path.as_uri())
        results = Axe().run(page)
        assert not results.violations_count, results.generate_report()
        for width in (390, 320):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    page.close()


@pytest.mark.slow
def test_a_fresh_clone_serves_with_one_command(tmp_path):
    """`make serve` sets up the virtual environment, trains and serves."""
    clone = tmp_path / "imago"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)

    port, metrics_port = find_free_ports(2)
    flags = f"ARGS=--host 127.0.0.1 --metrics-port {metrics_port}"
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["make", "serve", f"PORT={port}", flags],
            cwd=clone,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, log)
        headers = {"Content-Type": "image/png"}
        answer = httpx.post(f"{url}/predict", content=make_png(3), headers=headers)
        assert answer.json()["predictions"][0]["label"] == "3"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(clone)


def wait_until_ready(url: str, process: subprocess.Popen, log: Path, seconds: int = 900) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not ready: {log.read_text()}")
