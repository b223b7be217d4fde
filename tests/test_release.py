"""The release workflow publishes the images that `make deploy` asks for."""

import re
import shutil
import subprocess

import pytest
import yaml

from support import ROOT
from support.fake_kubectl import error_line, make_fake_cluster, run_cluster_script

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


DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_a_release_is_deployed_from_its_files_without_a_build(tmp_path):
    """As the workflow renders it: the images have tag and digest, and nothing else differs."""
    digests = tmp_path / "digests"
    names = ("imago-serve:1.2.3", "imago-train:1.2.3", "imago-serve:1.2.3-cuda")
    digests.write_text("".join(f"ghcr.io/team/{name} {DIGEST}\n" for name in names))
    settings = {"OVERLAY": "gpu", "REGISTRY": "ghcr.io/team", "TAG": "1.2.3"}
    rendered = run_cluster_script("render", **settings, DIGESTS=str(digests)).stdout
    images = set(re.findall(r"image: (\S+)", rendered))
    assert images == {f"ghcr.io/team/{name}@{DIGEST}" for name in names[1:]}
    assert rendered.replace(f"@{DIGEST}", "") == run_cluster_script("render", **settings).stdout

    file = tmp_path / "imago-gpu.yaml"
    file.write_text(rendered)
    answers = {"apply -f -": f"cat >{tmp_path}/applied"}
    result, calls = make_fake_cluster(tmp_path)("deploy", answers, OVERLAY=str(file))
    assert result.returncode == 0, result.stderr
    assert "Serving." in result.stdout
    assert "kustomize" not in calls
    applied = list(yaml.safe_load_all((tmp_path / "applied").read_text()))
    assert len(applied) == len(list(yaml.safe_load_all(rendered)))
    assert set(re.findall(r"image: (\S+)", (tmp_path / "applied").read_text())) == images


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/Team/imago.git",
        "git@github.com:Team/imago",
        "https://x:y@github.com/Team/imago",
    ],
)
def test_published_images_are_those_of_the_owner_of_the_repository(url):
    result = run_cluster_script("render", PUBLISHED="1", **git_remote(url))
    images = set(re.findall(r"image: (\S+):[0-9.]+\n", result.stdout))
    assert images == {"ghcr.io/team/imago-serve", "ghcr.io/team/imago-train"}


def git_remote(url: str) -> dict[str, str]:
    """Variables with which git's remote origin has this URL."""
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "remote.origin.url",
        "GIT_CONFIG_VALUE_0": url,
    }


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_without_a_github_repository_the_published_images_are_unknown():
    result = run_cluster_script("render", PUBLISHED="1", **git_remote("/srv/imago"))
    assert "set REGISTRY=ghcr.io/OWNER" in error_line(result)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_a_registry_does_not_apply_to_a_file_of_a_release(tmp_path):
    file = tmp_path / "imago-local.yaml"
    file.write_text("kind: Namespace\n")
    result = run_cluster_script("render", OVERLAY=str(file), TAG="1")
    assert "do not apply to rendered manifests" in error_line(result)


def test_both_images_are_built_for_both_architectures():
    for entry in WORKFLOW["jobs"]["images"]["strategy"]["matrix"]["include"]:
        if entry["runtime"] == "cpu":
            assert entry["platforms"] == "linux/amd64,linux/arm64"


def test_each_dockerfile_of_the_workflow_exists():
    for entry in WORKFLOW["jobs"]["images"]["strategy"]["matrix"]["include"]:
        assert (ROOT / f"docker/{entry['image']}.Dockerfile").is_file()
