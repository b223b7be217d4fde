"""Training that starts from the weights of another run: --model.weights and --ckpt_path."""

import json
import shutil
from pathlib import Path

import cv2
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from support.forked_commands import ForkedCommands
from support.interrupted_runs import (
    STEPS,
    find_run_directory,
    finish_run,
    load_last_checkpoint,
    start_run,
)
from support.sample_images import write_image_folder

PHOTO_SETTINGS = (
    *["--name", "digits", "--data.batch_size", 16],
    *["--export.report", "false", "--export.quantize.enabled", "false"],
)


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def first(commands: ForkedCommands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with photos, a run that was trained on them, and a store with its bundle."""
    directory = tmp_path_factory.mktemp("first")
    photos = write_image_folder(directory / "photos", 30)
    finish_run(
        commands,
        directory,
        *["--data.source", photos, "--trainer.max_epochs", 1, "--store", directory / "store"],
        *["--export.enabled", "true", *PHOTO_SETTINGS],
    )
    return directory


def test_a_checkpoint_keeps_the_normalization_it_was_trained_with(commands, first, tmp_path):
    """Other images are normalized with the same mean."""
    darker = write_darker_copies(first / "photos", tmp_path / "darker")
    finish_run(
        commands,
        tmp_path,
        *["--data.source", darker, "--trainer.max_epochs", 2, *PHOTO_SETTINGS],
        *["--ckpt_path", find_run_directory(first) / "last.ckpt"],
    )
    mean = read_mean(first / "store/digits/1/weights.safetensors")
    assert min(mean) > 80  # that of the darker images is a third of it
    assert trained_mean(tmp_path) == pytest.approx(mean, rel=1e-5)


def test_weights_keep_their_normalization_and_the_rows_of_known_classes(commands, first, tmp_path):
    darker = write_darker_copies(first / "photos", tmp_path / "darker")
    shutil.copytree(darker / "red", darker / "yellow")
    weights = first / "store/digits/1/weights.safetensors"
    run = finish_run(
        commands,
        tmp_path,
        *["--data.source", darker, "--trainer.max_epochs", 1, "--model.weights", weights],
        *["--store", tmp_path / "store", "--export.enabled", "true", *PHOTO_SETTINGS],
    )
    expected = f"{weights}: loaded all but the rows of the head for yellow, which start with"
    assert expected in run.text

    mean = read_mean(weights)
    assert trained_mean(tmp_path) == pytest.approx(mean, rel=1e-5)
    assert read_mean(tmp_path / "store/digits/1/weights.safetensors") == pytest.approx(mean)


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


def trained_mean(runs: Path) -> list[float]:
    """The mean that the last checkpoint normalizes with."""
    return load_last_checkpoint(runs)["state_dict"]["mean"].flatten().tolist()


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
