"""Export settings: their effect on the bundle, and what is refused before training starts."""

import json
import subprocess
import sys

import pytest

from models.__main__ import main as run_models
from models.bundle import Bundle
from support import ROOT
from support.sample_images import make_png
from train.cli.main import main

ONE_CONVNET_EPOCH = [
    *["--trainer.max_epochs", "1", "--model.network", "convnet"],
    *["--audit.enabled", "false", "--logger", "none"],
]
NO_INT8 = ["--export.quantize.enabled", "false"]


@pytest.mark.slow
def test_each_step_can_be_configured(fitted, tmp_path):
    bundle = fitted(
        tmp_path,
        *ONE_CONVNET_EPOCH,
        *NO_INT8,
        *["--export.report", "false"],
        *["--export.samples", "5"],
        *["--export.calibrate.temperature", "false"],
        *["--export.calibrate.conformal_level", "0.8"],
        *["--export.promote", "true"],
    )
    manifest = bundle.manifest
    assert list(manifest.variants) == ["fp32"]
    assert not (bundle.path / "report.html").exists()
    assert len(manifest.samples) == 5
    assert manifest.calibration.temperature == 1.0
    assert manifest.calibration.conformal_level == 0.8
    # No `cam`: the network's head is more than pooling and one linear layer.
    assert manifest.outputs == ["probabilities", "energy", "embedding"]


@pytest.mark.slow
def test_manifest_of_1500_classes_stays_small(commands, tmp_path):
    """The confusion matrices would take 36 MB, so they are left out."""
    (tmp_path / "image.png").write_bytes(make_png(0, 0, 8))
    rows = ["path,label,split"]
    for k in range(1500):
        for part in ("train", "val", "test"):
            rows.append(f"image.png,c{k:04d},{part}")
    (tmp_path / "many.csv").write_text("\n".join(rows) + "\n")
    commands.run(
        *["fit", "--data.source", tmp_path / "many.csv"],
        *["--store", tmp_path / "store", "--trainer.default_root_dir", tmp_path / "runs"],
        *ONE_CONVNET_EPOCH,
        *NO_INT8,
        *["--samples.images", 0],
    )

    bundle = Bundle(tmp_path / "store/many/1")
    classes = bundle.manifest.classes
    test = bundle.manifest.metrics["test"]
    assert len(test.per_class) == test.images == 1500
    assert test.confusion == []

    # All images are the same, so that all have the same prediction.
    recalls = [metrics.recall for metrics in test.per_class]
    predicted = classes[recalls.index(1.0)]
    confused = [name for name in classes if name != predicted][:8]
    report = (bundle.path / "report.html").read_text()
    assert all(f"{name} → {predicted} <b>1</b>" in report for name in confused)


def test_int8_that_loses_too_much_is_not_shipped_and_the_report_says_why(fitted, tmp_path):
    bundle = fitted(
        tmp_path,
        *ONE_CONVNET_EPOCH,
        *["--export.quantize.max_loss", "-100"],
        *["--export.purpose", "Reads <digits> & such."],
        *["--export.calibrate.abstain_accuracy", "0.9999"],
    )
    assert list(bundle.manifest.variants) == ["fp32"]
    assert not list(bundle.path.glob("*int8*"))
    note = bundle.manifest.notes[0]
    assert note.startswith("int8 is not shipped: it loses more than -100")
    report = (bundle.path / "report.html").read_text()
    assert note in report
    assert "Reads &lt;digits&gt; &amp; such." in report
    card = (bundle.path / "README.md").read_text()
    assert note in card

    # 10,000 images without an error would be needed to support this accuracy.
    calibration = bundle.manifest.calibration
    assert calibration.abstain_threshold == 0
    assert calibration.abstain_bound is None
    for text in (report, card):
        assert "no prediction abstains: " in text
        assert "Nothing abstains: " in text


def test_accuracy_is_stated_with_what_unequal_classes_make_of_it(commands, tmp_path, capsys):
    """All images are the same, so that all have the same prediction."""
    (tmp_path / "image.png").write_bytes(make_png(0, 0, 8))
    rows = ["path,label,split"]
    for part in ("train", "val", "test"):
        rows += [f"image.png,common,{part}"] * 20
        rows += [f"image.png,rare,{part}"] * 2
    (tmp_path / "unequal.csv").write_text("\n".join(rows) + "\n")
    done = commands.run(
        *["fit", "--data.source", tmp_path / "unequal.csv", "--name", "unequal"],
        *["--store", tmp_path / "store", "--trainer.default_root_dir", tmp_path / "runs"],
        *ONE_CONVNET_EPOCH,
        *NO_INT8,
        *["--samples.images", 0],
    )

    bundle = Bundle(tmp_path / "store/unequal/1")
    test = bundle.manifest.metrics["test"]
    assert test.balanced_accuracy == 0.5
    assert test.majority_accuracy == pytest.approx(20 / 22)
    missed = "rare (2)" if test.accuracy > 0.5 else "common (20)"
    warning = f"WARNING: no test image of these classes is recognized: {missed}"
    assert "the largest class has 10 times the training images of the smallest" in done.text
    assert f"train: {warning}" in done.text
    assert (
        f"test accuracy {test.accuracy:.4f} (balanced 0.5000, majority class 0.9091)" in done.text
    )
    assert "(balanced 0.5000)  " in done.text  # the line of the epoch
    for file in ("README.md", "report.html"):
        text = (bundle.path / file).read_text()
        assert warning in text
        assert "50.00 %" in text
        assert "90.91 %" in text

    for command in (["list"], ["show", "unequal"]):
        assert run_models([*command, "--store", str(tmp_path / "store")]) == 0
        text = capsys.readouterr().out
        assert "50.00 %" in text
        assert "90.91 %" in text


@pytest.mark.filterwarnings(
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"
)  # of Lightning's CLI
@pytest.mark.parametrize(
    ("flag", "value", "message"),
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
def test_invalid_settings_are_refused_before_training_in_one_line(
    tmp_path, capsys, flag, value, message
):
    store = str(tmp_path / "store")
    assert main(["fit", "--data.source", "digits", "--store", store, flag, value]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_sign_key_signs_the_bundle(fitted, tmp_path):
    pytest.importorskip("model_signing", reason="the optional extra `signing` is not installed")
    key = tmp_path / "key.pem"
    public_key = tmp_path / "key.pub"
    generate = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key]
    subprocess.run(generate, check=True)
    extract = ["openssl", "ec", "-in", key, "-pubout", "-out", public_key]
    subprocess.run(extract, check=True, capture_output=True)

    signed = ["--export.sign_key", str(key), "--export.report", "false"]
    bundle = fitted(tmp_path, *ONE_CONVNET_EPOCH, *NO_INT8, *signed)

    verify = [sys.executable, "-m", "models", "verify", str(bundle.path)]
    done = subprocess.run(
        [*verify, "--public-key", str(public_key)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "signed: yes, by the given key" in done.stdout, done.stderr
    assert json.loads((bundle.path / "manifest.json").read_text())["version"] == 1
