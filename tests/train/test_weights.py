"""Training that begins with what another run has learnt: --model.weights and --ckpt_path."""

import json

import cv2
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from support.interrupted_runs import STEPS, find_run_directory, finish_run, start_run
from support.sample_images import write_image_folder


def test_what_goes_on_from_another_run_keeps_the_best_of_either(commands, tmp_path):
    """Only what is the same run has moved: the best weights of another lie where they lay."""
    settings = (
        "--ema.decay",
        0,
        "--model.optimizer.name",
        "sgd",
        "--model.optimizer.momentum",
        0,
        "--export.quantize.enabled",
        "false",
        "--export.report",
        "false",
        "--store",
        tmp_path / "store",
    )
    finish_run(commands, tmp_path / "runs", *settings, "--trainer.max_epochs", 1)
    finish_run(
        commands,
        tmp_path / "longer",
        *settings,
        "--export.enabled",
        "true",
        "--trainer.max_epochs",
        2,
        "--trainer.gradient_clip_val",
        1e-12,
        "--ckpt_path",
        find_run_directory(tmp_path / "runs") / "last.ckpt",
    )
    assert load_file(tmp_path / "store/digits/1/weights.safetensors")


@pytest.mark.parametrize("how", ["--ckpt_path", "--model.weights"])
def test_weights_go_with_the_brightness_that_they_were_trained_on(commands, tmp_path, how):
    """Other images are normalised by the old ones' moments, in training as in the bundle."""
    photos, darker = write_image_folder(tmp_path / "photos", 30), tmp_path / "darker"
    for file in photos.rglob("*.png"):
        (darker / file.parent.name).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(darker / file.parent.name / file.name), cv2.imread(str(file))[::-1] // 3)
    settings = (
        "--name",
        "digits",
        "--data.batch_size",
        16,
        "--export.enabled",
        "true",
        "--export.report",
        "false",
        "--export.quantize.enabled",
        "false",
    )
    first, second = tmp_path / "first", tmp_path / "second"
    finish_run(
        commands,
        first,
        "--data.source",
        photos,
        "--trainer.max_epochs",
        1,
        "--store",
        first / "store",
        *settings,
    )
    learnt = {
        "--ckpt_path": find_run_directory(first) / "last.ckpt",
        "--model.weights": first / "store/digits/1/weights.safetensors",
    }[how]
    finish_run(
        commands,
        second,
        "--data.source",
        darker,
        "--trainer.max_epochs",
        2,
        "--store",
        second / "store",
        how,
        learnt,
        *settings,
    )
    means = [
        moments(place / "store/digits/1/weights.safetensors")["mean"] for place in (first, second)
    ]
    assert means[1] == pytest.approx(means[0], rel=1e-5)
    assert min(means[0]) > 80  # the darker ones' is a third of it


def moments(file) -> dict[str, list[float]]:
    with safe_open(file, "np") as weights:
        return {name: json.loads(weights.metadata()[name]) for name in ("mean", "std")}


def test_an_epoch_is_not_gone_on_with_in_other_batches(commands, tmp_path):
    assert start_run(commands, tmp_path / "runs", kill=f"TERM:step:{STEPS + 4}").status() == 143
    (halfway,) = find_run_directory(tmp_path / "runs").glob("step-*.ckpt")
    refused = start_run(
        commands, tmp_path / "other", "--ckpt_path", halfway, "--data.batch_size", 300
    )
    assert refused.status() == 2
    assert f"saved within an epoch of {STEPS} steps by 1 processes" in refused.text.splitlines()[-1]
