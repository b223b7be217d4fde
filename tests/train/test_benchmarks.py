"""The scripts behind the published numbers run as they say, from anywhere, and measure what they name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def run(script: str, *argv: str, cwd: Path, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), *argv],
        cwd=cwd,
        text=True,
        timeout=280,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def lines(said: str) -> list[dict]:
    """What a script printed as JSON."""
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


@pytest.mark.slow  # as all below: each imports all that trains
def test_the_speed_of_fit(tmp_path):
    """On little data all is noise, but a loop that did nothing would show."""
    (found,) = lines(
        run("train_speed", "--case", "lenet", "--epochs", "2", "--images", "1000", cwd=tmp_path)
    )
    assert found["epochs"] == 2
    assert found["ratio"] == pytest.approx(
        found["fit_images_per_s"] / found["bare_images_per_s"], rel=0.5
    )
    assert 0.3 < found["cpu_ratio"] < 3
    assert found["peak_memory_mb"] > 200


@pytest.mark.slow
def test_a_recipe_and_its_twin_over_two_seeds(tmp_path):
    said = run(
        "train_recipes",
        "digits",
        "--seeds",
        "2",
        "--twin",
        "--ema.decay",
        "0",
        "--checkpoint.monitor",
        "null",
        "--trainer.max_epochs",
        "10",
        cwd=tmp_path,
    )
    runs = lines(said)
    assert [found["seed"] for found in runs] == [0, 1]
    for found in runs:
        assert found["accuracy"] > 0.9
        assert found["twin_accuracy"] == pytest.approx(found["accuracy"], abs=0.05)
        assert found["seconds"] > 0
        assert found["twin_seconds"] > 0
    mean = sum(found["accuracy"] for found in runs) / 2
    assert said.splitlines()[-1].startswith(f"digits: {mean:.4f} ± ")


def test_a_twin_that_would_not_follow_the_recipe_is_refused(tmp_path):
    said = run(
        "train_recipes",
        "digits",
        "--twin",
        "--logger",
        "none",
        "--audit.enabled",
        "false",
        cwd=tmp_path,
        status=1,
    )
    assert "--twin: the bare loop has no ema.decay;" in said.splitlines()[-1]


@pytest.mark.slow
def test_the_speed_of_an_audit(tmp_path):
    said = run("audit_speed", "digits", cwd=tmp_path)
    assert "1797 images, 2 threads: " in said
    for step in (
        "in all",
        "find, read, digest, decode",
        "of these, near duplicates",
        "of these, doubtful labels",
    ):
        assert f"\n  {step} " in said


@pytest.mark.slow
def test_the_speed_of_augmentation(tmp_path):
    table = run("data_augment", "--threads", "1", cwd=tmp_path).splitlines()[-11:]
    for name, milliseconds, *ratio in (
        line.rsplit(maxsplit=2 if "mix" not in line and "cutout" not in line else 1)
        for line in table
    ):
        assert float(milliseconds) > 0, name
        assert not ratio or float(ratio[0]) > 1, (
            name
        )  # a batch at once is faster than image by image


@pytest.mark.slow
def test_what_a_bundle_costs(tmp_path):
    run("bundle_export", "--networks", "convnet", "--out", "out.json", cwd=tmp_path)
    (found,) = json.loads((tmp_path / "out.json").read_text())["networks"]
    assert found["max_abs_diff"] < 1e-3
    assert found["bytes"]["int8"] < found["bytes"]["fp32"]
    assert found["images_per_second"].keys() == {"fp32", "int8"}
