"""What a serving pod does before there is a model: wait, and go at once when it is told to."""

import os
import signal
import subprocess

import pytest
from support.manifests import containers, pod_templates


@pytest.fixture
def waiting(tmp_path):
    """The init container's process, which has found no bundle yet."""
    template = dict(pod_templates("overlays/local"))["Deployment/imago-serving"]
    container = next(c for c in containers(template) if c["name"] == "model")
    settings = {"IMAGO_STORE": str(tmp_path), "IMAGO_MODEL": "digits", "IMAGO_VERSION": "latest"}
    with subprocess.Popen(
        [*container["command"], *container["args"]],
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == f"waiting for {tmp_path}/digits/latest\n"
        yield process
        process.kill()


def test_it_ends_when_the_model_is_there(waiting, tmp_path):
    (tmp_path / "digits/latest").mkdir(parents=True)
    (tmp_path / "digits/latest/manifest.json").touch()
    assert waiting.wait(10) == 0


def test_it_hears_a_notice_to_end(waiting):
    """As the first process of a container, which the kernel spares a signal that it has no handler for."""
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(10) == 143
