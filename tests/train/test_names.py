"""File and folder names may be any bytes; what is written about them is valid text."""

import csv
import json
from pathlib import Path

import pytest

from models.bundle import Bundle
from support import RANDOM_CONVNET
from support.forked_commands import ForkedCommands
from support.sample_images import write_image_folder

# Bytes that are not UTF-8 (Python writes the byte E9 as \udce9), control characters, a backslash.
ODD_NAMES = {
    "000.png": "caf\udce9.png",
    "001.png": "back\\slash.png",
    "002.png": "new\nline.png",
    "003.png": "a b\r.png",
}
QUICK = [
    *RANDOM_CONVNET,
    *["--trainer.max_epochs=1", "--name=odd", "--data.cache=", "--export.quantize.enabled=false"],
]
SPLIT = ["--data.val_fraction=0.4", "--data.test_fraction=0.4", "--seed_everything=1"]


def write_oddly_named_folder(root: Path) -> Path:
    """Write images with odd names; one class has an odd name, an unreadable file and a text."""
    write_image_folder(root, count=16)
    for class_folder in root.iterdir():
        for plain, odd in ODD_NAMES.items():
            (class_folder / plain).rename(class_folder / odd)
    (root / "red" / "br\udcf6ken.png").write_bytes(b"no image")
    (root / "red" / "notes.t\udcf6xt").write_bytes(b"no image")
    (root / "red").rename(root / "rosa \udce9")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_oddly_named_folder(tmp_path_factory.mktemp("odd") / "photos")


@pytest.fixture(scope="module")
def trained(
    commands: ForkedCommands, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A directory with a run on the photos and its bundle, and what the run printed."""
    directory = tmp_path_factory.mktemp("trained")
    run = commands.run(
        "run",
        photos,
        *QUICK,
        *SPLIT,
        f"--store={directory / 'store'}",
        f"--trainer.default_root_dir={directory / 'runs'}",
    )
    return directory, run.text


def test_a_folder_with_odd_names_becomes_a_bundle(trained):
    directory, printed = trained
    assert r"rosa \xe9/br\xf6ken.png" in printed
    bundle = Bundle(directory / "store/odd/1")
    assert bundle.manifest.classes == ["blue", "green", r"rosa \xe9"]
    samples = [sample.file for sample in bundle.manifest.samples]
    assert samples == [f"{i:02d}.png" for i in range(12)]
    for name in ("report.html", "README.md", "manifest.json"):
        assert r"rosa \xe9" in (bundle.path / name).read_text("utf-8").replace(r"\\", "\\")


def test_odd_names_in_the_audit_are_valid_text(commands, photos, tmp_path):
    commands.run("audit", photos, *RANDOM_CONVNET, f"--out={tmp_path / 'audit'}")
    text = (tmp_path / "audit/audit.json").read_text("ascii")
    json.loads(text)
    assert r"\ud" not in text  # half a surrogate pair, which only Python accepts
    assert json.loads(text)["unreadable"][0]["file"] == r"rosa \xe9/br\xf6ken.png"
    (left_out,) = json.loads(text)["left_out"]
    assert left_out["folder"] == r"rosa \xe9"
    assert left_out["count"] == 1
    assert left_out["reason"].endswith(r"(.t\xf6xt)")
    assert left_out["reason"] in (tmp_path / "audit/index.html").read_text("utf-8")


def test_odd_names_in_predictions_are_valid_text(commands, photos, trained):
    directory, _ = trained
    run = commands.run(
        "predict",
        f"--data.source={photos}",
        "--data.cache=",
        "--model.network=lenet",
        f"--ckpt_path={next(directory.rglob('best.ckpt'))}",
        *SPLIT,
        "--progress.quiet=true",
    )
    output = run.log.read_text("utf-8")
    rows = [
        row
        for row in csv.reader(output[output.index("image,label") :].splitlines())
        if len(row) == 3
    ]
    assert any(r"caf\xe9.png" in row[0] for row in rows)


def test_a_directory_whose_name_is_not_utf8_is_refused_in_one_line(commands, tmp_path):
    directory = write_oddly_named_folder(tmp_path / "b\udcfccher")
    refused = commands.start(
        "run", directory, *QUICK, f"--trainer.default_root_dir={tmp_path / 'runs'}"
    )
    assert refused.status() == 2
    assert refused.text.startswith("train: ")
    assert r"b\xfccher: the name is not UTF-8" in refused.text
    assert len(refused.text.strip().splitlines()) == 1
