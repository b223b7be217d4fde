"""The release workflow publishes the images that `make deploy` asks for."""

import re
import shutil
import subprocess

import pytest
import yaml

from support import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
OVERLAYS = sorted(path.name for path in (ROOT / "k8s/overlays").iterdir() if path.is_dir())


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_overlays_name_released_images():
    released = set()
    for entry in WORKFLOW["jobs"]["images"]["strategy"]["matrix"]["include"]:
        released.add(f"ghcr.io/team/imago-{entry['image']}:1.2.3{entry['suffix']}")

    used = set()
    for overlay in OVERLAYS:
        command = [
            "make",
            "-s",
            "render",
            f"OVERLAY={overlay}",
            "REGISTRY=ghcr.io/team",
            "TAG=1.2.3",
        ]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        used.update(re.findall(r"image: (\S*/imago-\S+)", result.stdout))
    assert used == released


def test_both_images_are_built_for_both_architectures():
    for entry in WORKFLOW["jobs"]["images"]["strategy"]["matrix"]["include"]:
        if entry["runtime"] == "cpu":
            assert entry["platforms"] == "linux/amd64,linux/arm64"


def test_each_dockerfile_of_the_workflow_exists():
    for entry in WORKFLOW["jobs"]["images"]["strategy"]["matrix"]["include"]:
        assert (ROOT / f"docker/{entry['image']}.Dockerfile").is_file()
