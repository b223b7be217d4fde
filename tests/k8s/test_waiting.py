"""The init container of a serving pod: it waits for the model, and ends on SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT, tiny_bundle
from support.manifests import containers, pod_templates


@pytest.fixture
def waiting(tmp_path):
    """Run the init container's process in a store without `latest`."""
    (tmp_path / "digits/1").mkdir(parents=True)
    (tmp_path / "photos/12").mkdir(parents=True)
    template = dict(pod_templates("overlays/local"))["Deployment/imago-serving"]
    container = next(c for c in containers(template) if c["name"] == "model")
    settings = {"IMAGO_STORE": str(tmp_path), "IMAGO_MODEL": "digits", "IMAGO_VERSION": "latest"}
    with subprocess.Popen(
        [*container["command"], *container["args"]],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stdout.readline()
        assert line == f"{tmp_path} has no digits/latest; it has digits/1 photos/12 \n"
        yield process
        process.kill()


def test_with_a_bucket_it_says_what_the_store_has(tmp_path):
    """It runs `models show`, which reads a bucket as it reads this directory."""
    case = "components/store-bucket on local"
    template = dict(pod_templates(case))["Deployment/imago-serving"]
    container = next(c for c in containers(template) if c["name"] == "model")
    tiny_bundle.publish(tmp_path, "digits")
    settings = {"IMAGO_STORE": str(tmp_path), "IMAGO_MODEL": "digits", "IMAGO_VERSION": "2"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [*container["command"], *container["args"]],
        env=os.environ | settings | {"PATH": path},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == f"{tmp_path}: digits has no version 2; it has 1\n"
        tiny_bundle.publish(tmp_path, "digits")
        assert process.wait(240) == 0


def test_it_ends_when_the_model_exists(waiting, tmp_path):
    (tmp_path / "digits/latest").mkdir(parents=True)
    (tmp_path / "digits/latest/manifest.json").touch()
    assert waiting.wait(240) == 0


def test_it_ends_on_sigterm(waiting):
    """Process 1 of a container gets only the signals that it handles."""
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(240) == 143
