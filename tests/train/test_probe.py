"""The linear probe, fine-tuning from it, and the time budget."""

import contextlib
import copy
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from models import networks
from models.bundle import Bundle
from models.networks.base import Network
from models.networks.weights import load_weights, read_weights
from support.forked_commands import ForkedCommand, ForkedCommands
from train.cli import main
from train.data import ImageData
from train.export import embedder
from train.export.candidates import choose_model
from train.export.evaluate import score_part
from train.export.onnx_graph import InferenceGraph
from train.export.pipeline import TrainedModel
from train.export.steps import ignore_progress

IMAGES_PER_CLASS = 30
SEEN_CLASSES = ("0", "1", "2", "3", "4")
NEW_CLASS = "7"
SMALL = ("--model.network", "convnet", "--data.size", "16", "--data.channels", "1")


def write_digits(folder: Path, label: str, count: int = IMAGES_PER_CLASS) -> None:
    """Write images of one digit, gray and of 16 pixels, into a class folder."""
    digits = load_digits()
    images = digits.images[digits.target == int(label)][:count]
    (folder / label).mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        pixels = cv2.resize(np.uint8(image * 15), (16, 16), interpolation=cv2.INTER_LINEAR)
        cv2.imwrite(str(folder / label / f"{i}.png"), pixels)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photos"
    for label in SEEN_CLASSES:
        write_digits(folder, label)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory, commands: ForkedCommands, photos):
    """A directory with a store whose `photos/1` is trained from random weights."""
    home = tmp_path_factory.mktemp("home")
    weights = ("--model.weights", "none", "--model.optimizer.lr", "3e-3")
    budget = ("--trainer.max_epochs", "8", "--time-budget", "1h")
    command = start(commands, home, photos, *weights, *budget)
    assert command.status() == 0, command.text
    assert re.search(r"8 epochs of \d+ s, done at \d\d:\d\d", command.text)
    assert "linear probe" not in command.text
    return home


def start(
    commands: ForkedCommands, home: Path, folder: Path, *flags: str, kill: str = ""
) -> ForkedCommand:
    """Start `run FOLDER` with store, runs and cache in `home`.

    `kill` is the SEND_SIGNAL of the callback `SendSignal`.
    """
    return commands.start(
        *("run", folder, *SMALL, "--trainer.accelerator", "cpu", "--logger", "none"),
        *("--store", home / "store", "--name", "photos", "--data.cache", home / "cache"),
        *("--trainer.default_root_dir", home / "runs", "--samples.images", "0"),
        *("--export.report", "false", "--export.quantize.enabled", "false"),
        *("--audit.enabled", "false"),
        "--trainer.callbacks+=support.interruption_callbacks.SendSignal",
        *flags,
        env={"SEND_SIGNAL": kill},
    )


def count_embeddings(home: Path) -> list[int]:
    """Return the number of embeddings in each file of the cache, the largest first."""
    counts: list[int] = []
    for path in home.glob("cache/embeddings/*/*.npz"):
        with np.load(path) as file:
            counts.append(len(file["embeddings"]))
    return sorted(counts, reverse=True)


def test_a_new_class_costs_only_its_embeddings(commands, home, photos, tmp_path):
    first = start(commands, home, photos, "--model.weights", "photos/1", "--fit.mode", "probe")
    assert first.status() == 0, first.text
    images = len(SEEN_CLASSES) * IMAGES_PER_CLASS
    assert count_embeddings(home) == [images]

    grown = tmp_path / "photos"
    shutil.copytree(photos, grown)
    write_digits(grown, NEW_CLASS)
    second = start(commands, home, grown, "--model.weights", "photos/1", "--fit.mode", "probe")
    assert second.status() == 0, second.text
    assert count_embeddings(home) == [images, IMAGES_PER_CLASS]

    bundle = Bundle(home / "store" / "photos" / "latest")
    assert bundle.manifest.classes == [*SEEN_CLASSES, NEW_CLASS]
    test = bundle.manifest.test_metrics
    assert test.accuracy > 0.9
    assert test.per_class[-1].recall > 0.5
    assert "epoch" not in second.text


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)  # Lightning's, once a process
def test_another_decoder_computes_embeddings_again(home, photos, tmp_path, monkeypatch):
    def audit() -> list[int]:
        main.run(
            [
                *("audit", str(photos), *SMALL, "--store", str(home / "store")),
                *("--model.weights", "photos/1", "--out", str(tmp_path / "audit")),
                *("--data.cache", str(tmp_path / "cache"), "--data.workers", "0"),
                *("--trainer.accelerator", "cpu"),
            ]
        )
        return count_embeddings(tmp_path)

    images = len(SEEN_CLASSES) * IMAGES_PER_CLASS
    assert audit() == [images]
    assert audit() == [images]

    monkeypatch.setattr(embedder, "DECODER_VERSION", "another")
    assert audit() == [images, images]


def test_the_better_of_probe_and_fine_tuning_is_published(commands, home, photos):
    """A learning rate that destroys the weights leaves the probe as the better one."""
    accuracies: dict[str, float] = {}
    for rate, kept in (("1e-6", None), ("3", "the probe is kept")):
        command = start(
            commands,
            home,
            photos,
            *("--model.weights", "photos/1", "--trainer.max_epochs", "1", "--ema.decay", "0"),
            *("--model.optimizer.lr", rate, "--model.schedule.warmup", "0"),
        )
        assert command.status() == 0, command.text
        manifest = Bundle(home / "store" / "photos" / "latest").manifest
        (note,) = [note for note in manifest.notes if "linear probe" in note]
        assert "fine-tuned" in note
        accuracies[rate] = manifest.test_metrics.accuracy
        if kept:
            assert note.endswith(kept)
        else:
            assert re.search(r"(probe|network|fine-tuned \(\d\.\d{4}\),) is kept$", note)
    # A tiny rate leaves the probe as it was.
    assert accuracies["3"] == pytest.approx(accuracies["1e-6"], abs=0.05)


def test_the_mean_of_both_networks_is_kept_where_it_is_best(home, photos):
    """Two networks with noise in their heads, whose mean is the trained one."""
    weights = read_weights(home / "store" / "photos" / "1" / "weights.safetensors")
    assert weights.normalization is not None
    mean, std = weights.normalization

    def build_model(network: Network) -> TrainedModel:
        graph = InferenceGraph(network.eval(), mean, std)
        return TrainedModel("convnet", {}, mean, std, "none", graph)

    data = ImageData(str(photos), size=16, channels=1, val_fraction=0.4, cache="", workers=0)
    data.setup()
    torch.manual_seed(0)
    trained = networks.build("convnet", len(SEEN_CLASSES), 1, 16)
    load_weights(trained, weights)
    first = copy.deepcopy(trained)
    second = copy.deepcopy(trained)
    noise = 20 * torch.randn_like(trained.head.weight)
    with torch.no_grad():
        first.head.weight.add_(noise)
        second.head.weight.sub_(noise)

    probe = build_model(first)
    val = score_part(probe.graph, data, "val", torch.device("cpu"))
    best, note = choose_model(
        probe, build_model(second), val, data, torch.device("cpu"), ignore_progress
    )
    assert note.endswith("is kept")
    assert "a mean of their weights, 50% fine-tuned (" in note
    kept = best.graph.network.head.weight
    torch.testing.assert_close(kept, trained.head.weight, atol=1e-3, rtol=0)


def test_the_audit_finds_wrong_labels_by_the_embeddings(commands, home, photos, tmp_path):
    mislabelled = tmp_path / "photos"
    shutil.copytree(photos, mislabelled)
    planted = [("0", "3"), ("1", "4"), ("4", "2")]
    for true_class, wrong_class in planted:
        source = mislabelled / true_class / "5.png"
        source.rename(mislabelled / wrong_class / f"from-{true_class}.png")

    probe = ("--model.weights", "photos/1", "--fit.mode", "probe", "--audit.enabled", "true")
    command = start(commands, home, mislabelled, *probe)
    assert command.status() == 0, command.text
    newest = max(home.glob("runs/photos/*/audit/audit.json"), key=lambda path: path.stat().st_mtime)
    suspects = json.loads(newest.read_text())["labels"]["suspects"]
    files = {Path(entry["file"]).name for entry in suspects[: len(planted)]}
    assert files == {f"from-{true_class}.png" for true_class, _ in planted}

    audit = commands.run(
        *("audit", mislabelled, *SMALL, "--model.weights", "photos/1", "--out", tmp_path / "audit"),
        *("--store", home / "store", "--data.cache", home / "cache"),
        *("--trainer.accelerator", "cpu", "--logger", "none"),
    )
    assert "suspicious label" in audit.text
    report = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert report["labels"]["suspects"] == suspects


def test_a_run_that_ends_after_its_probe_starts_from_it(commands, home, photos):
    """A time budget keeps its epochs, too; the second command resumes the run of the first."""
    flags = (
        *("--model.weights", "photos/1", "--seed_everything", "3", "--time-budget", "1h"),
        *("--trainer.max_epochs", "2", "--resume.every_steps", "1"),
    )
    killed = start(commands, home, photos, *flags, kill="KILL:step:1")
    assert killed.status() == 137
    assert "2 epochs of" in killed.text

    resumed = start(commands, home, photos, *flags)
    assert resumed.status() == 0, resumed.text
    assert "linear probe" not in resumed.text
    assert "2 epochs of" not in resumed.text
    manifest = Bundle(home / "store" / "photos" / "latest").manifest
    assert any("linear probe" in note for note in manifest.notes)
    assert manifest.test_metrics.accuracy > 0.8


def test_a_probe_of_other_data_is_not_resumed(commands, home, photos, tmp_path):
    growing = tmp_path / "photos"
    shutil.copytree(photos, growing)
    flags = ("--model.weights", "photos/1", "--fit.mode", "probe", "--seed_everything", "4")
    killed = start(commands, home, growing, *flags)
    killed.wait_for("linear probe")
    with contextlib.suppress(ProcessLookupError):  # it ended first
        killed.kill()
    killed.wait()

    write_digits(growing, NEW_CLASS)
    command = start(commands, home, growing, *flags)
    assert command.status() == 0, command.text
    manifest = Bundle(home / "store" / "photos" / "latest").manifest
    assert manifest.classes == [*SEEN_CLASSES, NEW_CLASS]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--model.weights", "none", "--fit.mode", "probe"), ("fit.mode", "--model.weights")),
        (("--time-budget", "soon"), ("fit.time_budget", "'soon'", "10m")),
        (("--time-budget=1s",), ("fit.time_budget", "too short", "give at least")),
    ],
)
def test_invalid_settings_end_in_one_line(commands, home, photos, tmp_path, flags, parts):
    command = start(
        commands,
        home,
        photos,
        "--model.weights",
        "photos/1",
        *flags,
        "--trainer.default_root_dir",
        str(tmp_path / "runs"),
    )
    assert command.status() == 2
    line = command.text.splitlines()[-1]
    for part in parts:
        assert part in line
    assert not list(tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "runs").exists()
