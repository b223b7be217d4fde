"""The training benchmarks run from any directory and measure what they name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
TIMEOUT_SECONDS = 280


def run_script(script: str, *arguments: str, cwd: Path, status: int = 0) -> str:
    """Run a benchmark and return its output."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments],
        cwd=cwd,
        env=os.environ | {"BENCHMARK_RESULTS": str(cwd)},
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def parse_json_lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


@pytest.mark.slow  # like those below: each script imports all of train
def test_train_speed_compares_fit_with_the_bare_loop(tmp_path):
    """The ratio is noise on so few images; the bounds only catch a loop that does nothing."""
    arguments = ["--case", "lenet", "--epochs", "2", "--images", "1000"]
    (result,) = parse_json_lines(run_script("train_speed", *arguments, cwd=tmp_path))
    assert result["epochs"] == 2
    ratio = result["fit_images_per_s"] / result["bare_images_per_s"]
    assert result["ratio"] == pytest.approx(ratio, rel=0.5)
    assert 0.3 < result["cpu_ratio"] < 3
    assert result["peak_memory_mb"] > 200


@pytest.mark.slow
def test_train_recipes_runs_recipe_and_bare_loop_over_two_seeds(tmp_path):
    output = run_script(
        "train_recipes",
        *["digits", "--seeds", "2", "--bare", "--ema.decay", "0"],
        *["--checkpoint.monitor", "null", "--trainer.max_epochs", "10"],
        cwd=tmp_path,
    )
    runs = parse_json_lines(output)
    assert [run["seed"] for run in runs] == [0, 1]
    for run in runs:
        assert run["accuracy"] > 0.9
        assert run["bare_accuracy"] == pytest.approx(run["accuracy"], abs=0.05)
        assert run["seconds"] > 0
        assert run["bare_seconds"] > 0
    mean = sum(run["accuracy"] for run in runs) / 2
    assert output.splitlines()[-1].startswith(f"digits: {mean:.4f} ± ")


@pytest.mark.slow
def test_train_recipes_refuses_a_recipe_that_the_bare_loop_cannot_follow(tmp_path):
    output = run_script(
        "train_recipes",
        *["digits", "--bare", "--logger", "none", "--audit.enabled", "false"],
        cwd=tmp_path,
        status=1,
    )
    assert "--bare: the bare loop has no ema.decay;" in output.splitlines()[-1]


@pytest.mark.slow
def test_audit_speed_prints_each_step(tmp_path):
    output = run_script("audit_speed", "digits", cwd=tmp_path)
    assert "1797 images, 2 threads: " in output
    for step in (
        "in total",
        "find, read, digest, decode",
        "of these, near duplicates",
        "of these, suspicious labels",
    ):
        assert f"\n  {step} " in output


@pytest.mark.slow
def test_data_augment_prints_times_and_ratios(tmp_path):
    """A batch at once is faster than torchvision image by image."""
    table = run_script("data_augment", "--threads", "1", cwd=tmp_path).splitlines()[-11:]
    for line in table:
        name = line[:24].strip()
        milliseconds, *ratio = line[24:].split()
        assert float(milliseconds) > 0, name
        if ratio:
            assert float(ratio[0]) > 1, name


@pytest.mark.slow
def test_bundle_export_writes_sizes_and_speeds(tmp_path):
    run_script("bundle_export", "--networks", "convnet", "--keep", cwd=tmp_path)
    (result,) = json.loads((tmp_path / "bundle_export.json").read_text())
    assert result.keys() >= {"date", "machine", "versions"}
    assert result["max_abs_diff"] < 1e-3
    assert result["bytes"]["int8"] < result["bytes"]["fp32"]
    assert result["images_per_second"].keys() == {"fp32", "int8"}


@pytest.mark.slow
def test_finetune_recipes_continues_a_table(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(12):
            squares = rng.integers(0, 128, (6, 6, 3), np.uint8) + 127 * (label == "light")
            image = cv2.resize(squares.astype(np.uint8), (48, 48), interpolation=cv2.INTER_CUBIC)
            cv2.imwrite(str(tmp_path / "photos" / label / f"{i}.png"), image)

    command = ["--flowers", str(tmp_path / "photos"), "--work", str(tmp_path / "work")]
    command += ["--out", str(tmp_path / "out.json"), "--sets", "flowers", "--seeds", "1"]

    run_script("finetune_recipes", *command, "--methods", "probe", cwd=tmp_path)
    output = run_script("finetune_recipes", *command, "--methods", "probe", "timm", cwd=tmp_path)

    (new_cell,) = parse_json_lines(output)
    assert new_cell["method"] == "timm"
    probe, timm = json.loads((tmp_path / "out.json").read_text())
    assert probe["images"] == timm["images"]
    for result in (probe, timm):
        assert 0 <= result["accuracy"] <= 1
        assert result["cpu_seconds"] > 0
        row = f"| flowers | {result['method']} | 1 | {result['accuracy']:.4f} |"
        assert row in output
