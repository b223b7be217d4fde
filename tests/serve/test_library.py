"""`from serve import Model`: predictions in a Python program, without a server."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from models.bundle import BundleError
from models.image import ImageError, InputSpec, UnsupportedFormat, resize_to_image, resize_to_input
from serve import Model, Prediction
from serve.commands import predict
from support import ROOT, tiny_bundle

RED = tiny_bundle.make_image("red")
GREEN = tiny_bundle.make_image("green")


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
        assert answer["predictions"] == [dataclasses.asdict(prediction)]


def test_an_image_is_a_path_bytes_or_an_array(model, tmp_path):
    path = tmp_path / "red.png"
    path.write_bytes(RED)
    rgb = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    expected = model.predict(RED)
    assert isinstance(expected, Prediction)
    assert expected.label == "red"

    images = [str(path), path, RED, bytearray(RED), memoryview(RED), rgb, np.asfortranarray(rgb)]
    assert [model.predict(image) for image in images] == [expected] * len(images)
    assert model.predict(images) == [expected] * len(images)
    assert model.predict(tuple(images)) == [expected] * len(images)
    assert model.predict(tmp_path.glob("*.png")) == [expected]


def test_a_gray_array_has_one_channel_or_none(model):
    gray = np.full((50, 40), 90, np.uint8)
    expected = model.predict(np.stack([gray] * 3, 2))
    assert model.predict([gray, gray[:, :, None]]) == [expected] * 2


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros(8, np.uint8),
    ],
    ids=["float", "four channels", "four dimensions", "empty", "one dimension"],
)
def test_an_array_that_is_no_image_raises(model, array):
    with pytest.raises(ValueError, match=r"is no image; give uint8 \[H, W\] for gray"):
        model.predict(array)


def test_embeddings_are_those_of_the_graph(model):
    pixels = model.decode(RED)
    expected = tiny_bundle.expected_outputs(pixels[None], 3)["embedding"][0]
    embedding = model.embed(RED)
    assert embedding.dtype == np.float32
    assert embedding == pytest.approx(expected, abs=1e-5)

    many = model.embed([RED, GREEN] * 10)
    assert many.shape == (20, 3)
    assert many[0] == pytest.approx(expected, abs=1e-5)
    assert model.embed([]).shape == (0, 3)


def test_an_explanation_covers_the_image_that_was_given(model, tmp_path):
    """The tiny graph's map of green is the green channel; the crop leaves out the sides."""
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[16:32, 64:80, 1] = 255
    path = tmp_path / "wide.png"
    Image.fromarray(pixels).save(path)
    activation_map = model.explain(pixels)
    assert activation_map.shape == (64, 128)
    assert activation_map.dtype == np.float32
    assert activation_map.max() == pytest.approx(1, abs=0.02)
    assert activation_map[20:28, 68:76].min() > 0.9
    assert activation_map[:12].max() == 0
    assert activation_map[:, :32].max() == 0
    for other in model.explain([path, str(path), path.read_bytes()]):
        assert np.array_equal(other, activation_map)

    assert model.explain(pixels, label="red").max() == 0
    with pytest.raises(ValueError, match="no class 'violet'; there are red, green, blue"):
        model.explain(pixels, label="violet")


def test_an_explanation_is_turned_like_the_image(model, tmp_path):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:, 8:24, 1] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate to the right
    for suffix in (".jpg", ".png"):
        path = tmp_path / f"turned{suffix}"
        Image.fromarray(pixels).save(path, exif=exif)
        activation_map = model.explain(path)
        assert activation_map.shape == (48, 32)
        assert activation_map[10:22].mean() > 0.9
        assert activation_map[26:].mean() < 0.1


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (32, 32), (7, 5)])
def test_a_map_is_scaled_back_as_the_image_was_scaled(resize, shape):
    """What is bright in the image is bright in its input, and again in the map of that input."""
    spec = InputSpec(height=32, width=32, channels=1, resize=resize)
    image = np.zeros((*shape, 1), np.uint8)
    rows = slice(shape[0] // 4, shape[0] // 2 + 1)
    columns = slice(shape[1] // 4 + 1, shape[1] // 2 + 2)
    image[rows, columns] = 255
    seen = resize_to_input(image, spec)[:, :, 0].astype(np.float32) / 255
    restored = resize_to_image(seen, shape, spec)
    assert restored.shape == shape

    weights = image[:, :, 0].astype(float)
    if resize == "crop":  # compare what the crop shows
        weights = weights * (resize_to_image(np.ones((32, 32), np.float32), shape, spec) > 0)
    for axis in (0, 1):
        centre = np.average(np.arange(shape[axis]), weights=weights.sum(1 - axis))
        restored_centre = np.average(np.arange(shape[axis]), weights=restored.sum(1 - axis))
        assert restored_centre == pytest.approx(centre, abs=0.02 * max(shape) + 0.3)


def test_a_model_without_maps_says_so_in_one_line(tmp_path):
    path = tiny_bundle.publish(tmp_path)
    tiny_bundle.remove_output(path, "cam")
    model = Model.open(path, threads=1)
    with pytest.raises(ValueError, match="the network has no class-activation maps") as caught:
        model.explain(RED)
    assert "\n" not in str(caught.value)


def test_a_path_opens_a_bundle_a_model_or_a_store(bundle_store, tmp_path):
    copy = shutil.copytree(bundle_store / "colours" / "1", tmp_path / "copy")
    tiny_bundle.publish(tmp_path / "store")
    tiny_bundle.publish(tmp_path / "store", promote=False)
    colours = tmp_path / "store" / "colours"
    opened = {
        copy: 1,
        colours / "latest": 1,
        colours / "2": 2,
        colours: 1,
        tmp_path / "store": 1,
    }
    for path, version in opened.items():
        assert Model.open(str(path), threads=1).version == version
    assert Model.open(colours, version=2, threads=1).version == 2
    assert repr(Model.open(copy, threads=1)).startswith(
        "<Model colours, version 1: 3 classes, fp32"
    )

    (colours / "latest").unlink()
    (colours / "latest").write_text("2\n")  # on a file system without links
    assert Model.open(colours / "latest", threads=1).version == 2
    with pytest.raises(BundleError, match="colours has no version 7; it has 1, 2"):
        Model.open(colours / "7")


def test_a_signed_bundle_is_demanded_for_a_path_too(bundle_store, tmp_path):
    with pytest.raises(BundleError, match=r"key\.pem|bundle\.sig"):
        Model.open(bundle_store / "colours" / "1", public_key=tmp_path / "key.pem", threads=1)


def test_no_images_give_no_predictions(model):
    assert model.predict([]) == []


def test_an_image_that_cannot_be_decoded_is_named(model, tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"^image 1: not a JPEG"):
        model.predict([RED, b"no image"])
    with pytest.raises(ImageError, match=r"^not a JPEG"):
        model.predict(b"no image")
    path = tmp_path / "a.png"
    path.write_bytes(b"no image")
    for images in (path, [RED, str(path)]):
        with pytest.raises(UnsupportedFormat, match=rf"^{path}: not a JPEG"):
            model.predict(images)
    with pytest.raises(FileNotFoundError, match="gone"):
        model.predict(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        model.predict(RED, top_k=0)


def test_outputs_that_are_not_finite_raise(tmp_path, capsys):
    """The command `predict` names the file, and classifies the others."""
    tiny_bundle.give_nan_for_black(tiny_bundle.publish(tmp_path / "store"))
    black = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    with pytest.raises(ValueError, match="NaN or infinite"):
        Model.open(tmp_path / "store").predict([RED, black])

    for name, image in {"a.png": RED, "b.png": black}.items():
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


def test_importing_serve_loads_no_runtime_and_the_model_no_server():
    script = """
import serve, sys
assert not {"numpy", "cv2", "onnxruntime"} & set(sys.modules)
from serve import Model
assert not {"torch", "train", "litserve", "uvicorn", "starlette"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_example_of_the_readme_runs(model, tmp_path, capsys, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    lines = readme.partition("    from serve import Model\n")[2].partition("\n\n[")[0]
    code = "".join(line.removeprefix("    ") for line in lines.splitlines(keepends=True))
    assert "model.explain" in code

    tiny_bundle.publish(tmp_path / "artifacts" / "store", "photos")
    for name in ("rose.jpg", "tulip.jpg"):
        (tmp_path / name).write_bytes(tiny_bundle.make_image("red", kind=".jpg"))
    monkeypatch.chdir(tmp_path)
    exec(code, {"Model": Model, "Path": Path})
    assert "red" in capsys.readouterr().out
