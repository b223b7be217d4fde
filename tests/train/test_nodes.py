"""A run resumes on another node: in another directory, with less memory, on another processor."""

import json

import pytest
import torch
from safetensors.torch import load_file

from support.interrupted_runs import (
    assert_equal,
    assert_same_result,
    find_run_directory,
    finish_run,
    start_run,
)
from support.sample_images import write_image_folder


@pytest.mark.slow
def test_a_moved_run_resumes(commands, tmp_path):
    """It finds its best weights in the new directory."""
    runs = tmp_path / "runs"
    moved = tmp_path / "moved"
    settings = (
        "--trainer.max_epochs=1",
        "--export.enabled=true",
        "--export.quantize.enabled=false",
        "--export.report=false",
        f"--store={tmp_path / 'store'}",
    )
    assert start_run(commands, runs, *settings, kill="TERM:end:0").status() == 143
    runs.rename(moved)
    assert "resuming from step" in finish_run(commands, moved, *settings).text
    best = torch.load(find_run_directory(moved) / "best.ckpt", weights_only=True)["state_dict"]
    published = load_file(tmp_path / "store/digits/1/weights.safetensors")
    assert_equal(published, {name: best[f"network.{name}"] for name in published})


@pytest.mark.slow
def test_a_run_resumes_on_a_node_with_less_memory(commands, tmp_path):
    """It normalizes as before, though only a sample of streamed images is measured."""
    photos = write_image_folder(tmp_path / "photos", 1000, 8)
    settings = (
        f"--data.source={photos}",
        "--name=digits",
        "--trainer.max_epochs=2",
        "--trainer.limit_train_batches=4",
    )
    finish_run(commands, tmp_path / "whole", *settings)
    assert start_run(commands, tmp_path / "killed", *settings, kill="TERM:step:3").status() == 143
    resumed = finish_run(
        commands, tmp_path / "killed", *settings, "--data.memory_share=1e-9", "--data.workers=1"
    )
    assert "streamed by workers" in resumed.text
    assert "resuming from step 3:" in resumed.text
    assert_same_result(tmp_path / "killed", tmp_path / "whole")


def test_a_run_records_the_requested_precision(commands, tmp_path):
    """A node without bfloat16 computes in float32; the next one may have it."""
    precision = "--trainer.precision=bf16-mixed"
    assert start_run(commands, tmp_path, precision, kill="TERM:step:1").status() == 143
    settings = json.loads((find_run_directory(tmp_path) / "settings.json").read_text())
    assert settings["trainer"]["precision"] == "bf16-mixed"
