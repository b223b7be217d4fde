"""The house stays in order: its rooms, the direction of its imports, its locks, and what `make` says."""
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
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
        "train.lock": extras["train"] + extras["serve"],
        "dev.lock": extras["train"] + extras["serve"] + extras["dev"],
    }
    for lock, requirements in wanted.items():
        locked = pins(lock)
        for requirement in map(Requirement, PROJECT["dependencies"] + requirements):
            assert requirement.specifier.contains(locked[requirement.name]), f"{requirement} in {lock}"
        assert "://" not in re.sub(r"#.*", "", (ROOT / "docker" / lock).read_text()), f"an address in {lock}"


def test_the_serving_lock_is_hashed_and_free_of_torch():
    text = (ROOT / "docker" / "serve.lock").read_text()
    assert not {"torch", "torchvision", "lightning"} & set(pins("serve.lock"))
    assert text.count("--hash=sha256:") >= len(pins("serve.lock"))


def test_make_alone_lists_every_target():
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("train", "serve", "test", "audit", "lock"):
        assert re.search(rf"^  make {target} +\w", result.stdout, re.MULTILINE)
    for variable in ("DATA", "NAME", "RECIPE", "STORE", "PORT", "ARGS"):
        assert variable in result.stdout
