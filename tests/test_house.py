"""The house stays in order: its rooms, the direction of its imports, its locks, and what `make` says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listed.stdout.splitlines()


def pins(lock: str) -> dict[str, str]:
    text = (ROOT / "docker" / lock).read_text()
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE))


def test_top_level_is_the_agreed_one():
    rooms = {"train", "serve", "models", "docker", "k8s", "tests"}
    files = {"pyproject.toml", "Makefile", "README.md", "LICENSE"}
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} == rooms | files


def test_imports_point_from_train_and_serve_to_models():
    result = subprocess.run([BIN / "lint-imports"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_style():
    result = subprocess.run([BIN / "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_locks_satisfy_the_declared_ranges_and_name_no_index():
    extras = PROJECT["optional-dependencies"]
    wanted = {
        "serve.lock": extras["serve"],
        "serve-cuda.lock": [
            re.sub("^onnxruntime(?=[>=])", "onnxruntime-gpu", r) for r in extras["serve"]
        ],
        "serve-openvino.lock": extras["serve"] + extras["openvino"],
        "train.lock": extras["train"] + extras["serve"],
        "dev.lock": extras["train"] + extras["serve"] + extras["dev"],
    }
    for lock, requirements in wanted.items():
        locked = pins(lock)
        for requirement in map(Requirement, PROJECT["dependencies"] + requirements):
            assert requirement.specifier.contains(locked[requirement.name]), (
                f"{requirement} in {lock}"
            )
        assert "://" not in re.sub(r"#.*", "", (ROOT / "docker" / lock).read_text()), (
            f"an address in {lock}"
        )


@pytest.mark.parametrize("lock", sorted(p.name for p in (ROOT / "docker").glob("serve*.lock")))
def test_serving_locks_are_hashed_and_free_of_torch(lock):
    locked = pins(lock)
    assert not {"torch", "torchvision", "lightning"} & set(locked)
    entries = re.split(r"^(?=[\w.-]+==)", (ROOT / "docker" / lock).read_text(), flags=re.MULTILINE)[
        1:
    ]
    assert len(entries) >= len(locked)  # a package may stand there once for each Python
    assert all("--hash=sha256:" in entry for entry in entries)
    assert ("onnxruntime" in locked) is ("onnxruntime-gpu" not in locked), (
        "each would overwrite the other's files"
    )


def test_the_images_that_are_tested_are_those_that_were_built():
    for runtime, suffix in (("cpu", ""), ("openvino", "-openvino")):
        told = subprocess.run(
            ["make", "-n", "test-images", f"RUNTIME={runtime}", "REGISTRY=here", "TAG=7"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"IMAGO_TEST_IMAGES='here/imago-serve:7{suffix} here/imago-train:7'" in told


def test_make_alone_lists_every_target():
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("train", "serve", "test", "audit", "lock"):
        assert re.search(rf"^  make {target} +\w", result.stdout, re.MULTILINE)
    for variable in ("DATA", "NAME", "RECIPE", "STORE", "PORT", "ARGS"):
        assert variable in result.stdout
