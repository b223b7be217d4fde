"""`from serve import Model`: predictions in a Python program, without a server."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from models.bundle import BundleError
from models.image import ImageError
from serve import Model
from serve.commands import predict
from support import ROOT, tiny_bundle


@pytest.fixture(scope="module")
def model(bundle_store) -> Model:
    """A loaded model with one thread."""
    return Model.open(bundle_store, "colours", threads=1)


def test_predictions_are_those_of_the_server(model, server):
    images = [tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=i) for i in range(20)]
    predictions = model.predict(images, top_k=2)
    assert [prediction.label for prediction in predictions[:3]] == tiny_bundle.CLASSES
    for image, prediction in zip(images, predictions, strict=True):
        answer = server.predict(image, "?top_k=2").json()
        assert answer["predictions"] == [prediction.model_dump()]


def test_no_images_give_no_predictions(model):
    assert model.predict([]) == []


def test_an_image_that_cannot_be_decoded_raises(model):
    with pytest.raises(ImageError, match="not a JPEG"):
        model.predict([tiny_bundle.make_image("red"), b"no image"])


def test_outputs_that_are_not_finite_raise(tmp_path, capsys):
    """The command `predict` names the file, and classifies the others."""
    tiny_bundle.give_nan_for_black(tiny_bundle.publish(tmp_path / "store"))
    black = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    red = tiny_bundle.make_image("red")
    with pytest.raises(ValueError, match="NaN or infinite"):
        Model.open(tmp_path / "store").predict([red, black])

    for name, image in {"a.png": red, "b.png": black}.items():
        (tmp_path / name).write_bytes(image)
    files = [str(tmp_path / name) for name in ("a.png", "b.png")]
    assert predict.main([*files, "--store", str(tmp_path / "store"), "--format", "json"]) == 1
    classified, failed = json.loads(capsys.readouterr().out)["predictions"]
    assert classified["label"] == "red"
    assert "NaN or infinite" in failed["error"]


def test_the_only_model_needs_no_name(bundle_store):
    assert Model.open(bundle_store).name == "colours"


def test_a_missing_model_or_an_invalid_setting_raises(bundle_store):
    with pytest.raises(BundleError, match="colours"):
        Model.open(bundle_store, "other")
    with pytest.raises(ValueError, match="--threads"):
        Model.open(bundle_store, "colours", threads=-1)


def test_importing_serve_loads_no_runtime():
    script = "import serve, sys; assert not {'numpy', 'cv2', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
