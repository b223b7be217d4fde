"""`from serve import Model`: predictions in a Python program, without a server."""

import subprocess
import sys

import pytest

from models.bundle import BundleError
from models.image import ImageError
from serve import Model
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
