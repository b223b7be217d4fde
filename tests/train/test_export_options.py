"""What the settings of the export make of a bundle, and what is refused before anything is trained."""

import json
import subprocess
import sys

import pytest
from support import ROOT
from support.sample_images import make_png

from models.bundle import Bundle
from train.cli.main import main


def test_every_step_can_be_told_otherwise(fitted, tmp_path):
    bundle = fitted(
        tmp_path,
        "--trainer.max_epochs",
        "1",
        "--model.network",
        "convnet",
        "--export.quantize.enabled",
        "false",
        "--export.report",
        "false",
        "--export.samples",
        "5",
        "--export.calibrate.temperature",
        "false",
        "--export.calibrate.conformal_level",
        "0.8",
        "--export.promote",
        "true",
    )
    m = bundle.manifest
    assert list(m.variants) == ["fp32"]
    assert not (bundle.path / "report.html").exists()
    assert len(m.samples) == 5
    assert (m.calibration.temperature, m.calibration.conformal_level) == (1.0, 0.8)
    assert m.outputs == [
        "probabilities",
        "energy",
        "embedding",
    ]  # it ends in more than pooling: no exact map


def test_many_classes_make_no_manifest_too_large_to_read(commands, tmp_path):
    """1,500 of them, which a confusion matrix a part would make 36 MB of."""
    (tmp_path / "image.png").write_bytes(make_png(0, 0, 8))
    rows = [f"image.png,c{k:04d},{part}" for k in range(1500) for part in ("train", "val", "test")]
    (tmp_path / "many.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    commands.run(
        "fit",
        "--data.source",
        tmp_path / "many.csv",
        "--name",
        "many",
        "--store",
        tmp_path / "store",
        "--trainer.default_root_dir",
        tmp_path / "runs",
        "--model.network",
        "convnet",
        "--trainer.max_epochs",
        1,
        "--samples.images",
        0,
        "--audit.enabled",
        "false",
        "--export.quantize.enabled",
        "false",
    )
    bundle = Bundle(tmp_path / "store/many/1")
    test = bundle.manifest.metrics["test"]
    assert len(test.per_class) == test.images == 1500
    assert test.confusion == []
    answer = next(
        name for name, of in zip(bundle.manifest.classes, test.per_class, strict=True) if of.recall
    )
    confused = [name for name in bundle.manifest.classes if name != answer][
        :8
    ]  # all images are the same to it
    text = (bundle.path / "report.html").read_text()
    assert all(f"{name} → {answer} <b>1</b>" in text for name in confused)


def test_int8_that_loses_too_much_is_not_shipped_and_the_report_says_why(fitted, tmp_path):
    bundle = fitted(
        tmp_path,
        "--trainer.max_epochs",
        "1",
        "--model.network",
        "convnet",
        "--export.quantize.max_loss",
        "-100",
        "--export.purpose",
        "Reads <digits> & such.",
    )
    assert list(bundle.manifest.variants) == ["fp32"]
    assert not list(bundle.path.glob("*int8*"))
    note = bundle.manifest.notes[0]
    assert note.startswith("int8 is not shipped: it loses more than -100")
    text = (bundle.path / "report.html").read_text()
    assert note in text
    assert "Reads &lt;digits&gt; &amp; such." in text
    assert note in (bundle.path / "README.md").read_text()


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)  # of Lightning's CLI
@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        (
            "--export.calibrate.conformal_level",
            "95",
            "calibrate.conformal_level: 95.0 is not between 0 and 1",
        ),
        ("--export.samples", "0", "export.samples: 0 is less than 1"),
        ("--export.sign_key", "/no/such/key", "/no/such/key: no such file"),
        ("--export.quantize.images", "0", "quantize.images"),
    ],
)
def test_bad_options_are_refused_before_training_in_one_line(tmp_path, capsys, flag, value, says):
    assert (
        main(["fit", "--data.source", "digits", "--store", str(tmp_path / "store"), flag, value])
        == 2
    )
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_signed_bundle(fitted, tmp_path):
    pytest.importorskip("model_signing", reason="the optional extra `signing` is not installed")
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True
    )
    subprocess.run(
        ["openssl", "ec", "-in", key, "-pubout", "-out", public], check=True, capture_output=True
    )
    bundle = fitted(
        tmp_path,
        "--trainer.max_epochs",
        "1",
        "--model.network",
        "convnet",
        "--export.sign_key",
        str(key),
        "--export.quantize.enabled",
        "false",
    )
    command = [
        sys.executable,
        "-m",
        "models",
        "verify",
        str(bundle.path),
        "--public-key",
        str(public),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "signed: yes, by the given key" in done.stdout, done.stderr
    assert json.loads((bundle.path / "manifest.json").read_text())["version"] == 1
