"""Training that starts from the weights of another run: --model.weights and --ckpt_path."""

import json
from pathlib import Path

import cv2
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from support.interrupted_runs import STEPS, find_run_directory, finish_run, start_run
from support.sample_images import write_image_folder


def test_a_run_that_continues_another_keeps_the_best_weights_of_both(commands, tmp_path):
    """The best weights of the other run are read from the directory of that run."""
    settings = (
        *["--ema.decay", 0],
        *["--model.optimizer.name", "sgd", "--model.optimizer.momentum", 0],
        *["--export.quantize.enabled", "false", "--export.report", "false"],
        *["--store", tmp_path / "store"],
    )
    finish_run(commands, tmp_path / "runs", *settings, "--trainer.max_epochs", 1)
    finish_run(
        commands,
        tmp_path / "longer",
        *settings,
        *["--export.enabled", "true"],
        # Clipped to nothing, so that the first run's weights stay the best ones.
        *["--trainer.max_epochs", 2, "--trainer.gradient_clip_val", 1e-12],
        *["--ckpt_path", find_run_directory(tmp_path / "runs") / "last.ckpt"],
    )
    assert load_file(tmp_path / "store/digits/1/weights.safetensors")


@pytest.mark.parametrize("flag", ["--ckpt_path", "--model.weights"])
def test_weights_keep_the_normalization_they_were_trained_with(commands, tmp_path, flag):
    """Other images are normalized with the same mean, in training and in the bundle."""
    photos = write_image_folder(tmp_path / "photos", 30)
    darker = write_darker_copies(photos, tmp_path / "darker")
    settings = (
        *["--name", "digits", "--data.batch_size", 16],
        *["--export.enabled", "true", "--export.report", "false"],
        *["--export.quantize.enabled", "false"],
    )
    first = tmp_path / "first"
    second = tmp_path / "second"
    first_weights = first / "store/digits/1/weights.safetensors"
    second_weights = second / "store/digits/1/weights.safetensors"

    finish_run(
        commands,
        first,
        *["--data.source", photos, "--trainer.max_epochs", 1, "--store", first / "store"],
        *settings,
    )
    weights = first_weights
    if flag == "--ckpt_path":
        weights = find_run_directory(first) / "last.ckpt"
    finish_run(
        commands,
        second,
        *["--data.source", darker, "--trainer.max_epochs", 2, "--store", second / "store"],
        *[flag, weights],
        *settings,
    )

    mean = read_mean(first_weights)
    assert read_mean(second_weights) == pytest.approx(mean, rel=1e-5)
    assert min(mean) > 80  # that of the darker images is a third of it


def write_darker_copies(photos: Path, target: Path) -> Path:
    """Write the images of a folder at a third of their brightness, upside down."""
    for file in photos.rglob("*.png"):
        directory = target / file.parent.name
        directory.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(directory / file.name), cv2.imread(str(file))[::-1] // 3)
    return target


def read_mean(file: Path) -> list[float]:
    with safe_open(file, "np") as weights:
        return json.loads(weights.metadata()["mean"])


def test_an_interrupted_epoch_is_not_continued_with_another_batch_size(commands, tmp_path):
    interrupted = start_run(commands, tmp_path / "runs", kill=f"TERM:step:{STEPS + 4}")
    assert interrupted.status() == 143
    (checkpoint,) = find_run_directory(tmp_path / "runs").glob("step-*.ckpt")

    refused = start_run(
        commands,
        tmp_path / "other",
        *["--ckpt_path", checkpoint, "--data.batch_size", 300],
    )

    assert refused.status() == 2
    assert f"saved within an epoch of {STEPS} steps by 1 processes" in refused.text.splitlines()[-1]
