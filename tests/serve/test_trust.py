"""Confidence, prediction sets, abstention, out-of-distribution flags and class-activation maps."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from models.bundle import Calibration, Histogram, write_checksums
from models.image import InputSpec, decode
from serve.model import Model
from support import tiny_bundle

SPEC = InputSpec(height=32, width=32)


def make_flat_image(*rgb: int) -> bytes:
    return cv2.imencode(".png", np.full((32, 32, 3), rgb[::-1], np.uint8))[1].tobytes()


CASES = {
    "sure": make_flat_image(255, 0, 0),
    "between two": make_flat_image(120, 120, 0),
    "black": make_flat_image(0, 0, 0),
    "white": make_flat_image(255, 255, 255),
}
CALIBRATION = Calibration(
    abstain_threshold=0.6, conformal_level=0.9, conformal_quantile=0.8, energy_threshold=-2.0
)


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """The outputs of the graph for the images in CASES."""
    pixels = np.stack([decode(image, SPEC) for image in CASES.values()])
    return tiny_bundle.expected_outputs(pixels, 3)


def test_flags_follow_the_thresholds_of_the_bundle(start, tmp_path, expected):
    tiny_bundle.publish(tmp_path, calibration=CALIBRATION)
    server = start(store=tmp_path)
    predictions: dict[str, dict] = {}
    for i, (name, image) in enumerate(CASES.items()):
        (prediction,) = server.predict(image).json()["predictions"]
        predictions[name] = prediction
        probabilities = expected["probabilities"][i]
        energy = expected["energy"][i]
        assert prediction["confidence"] == pytest.approx(probabilities.max(), abs=1e-4), name
        assert prediction["energy"] == pytest.approx(energy, abs=1e-3), name
        assert prediction["abstain"] is bool(probabilities.max() < 0.6), name
        assert prediction["out_of_distribution"] is bool(energy > -2.0), name
        members = [tiny_bundle.CLASSES[index] for index in np.flatnonzero(probabilities >= 0.2)]
        assert sorted(prediction["prediction_set"]) == sorted(members), name

    abstained = [name for name, prediction in predictions.items() if prediction["abstain"]]
    assert abstained == ["between two", "black", "white"]
    unusual = [name for name, value in predictions.items() if value["out_of_distribution"]]
    assert unusual == ["black"]
    assert len(predictions["between two"]["prediction_set"]) == 2


def test_every_prediction_abstains_with_a_threshold_of_1(start, tmp_path):
    """Also those whose confidence is exactly 1 in float32."""
    tiny_bundle.publish(tmp_path, calibration=Calibration(abstain_threshold=1), scale=100)
    server = start(store=tmp_path)
    (prediction,) = server.predict(CASES["sure"]).json()["predictions"]
    assert prediction["confidence"] == 1
    assert prediction["abstain"] is True
    assert server.metric("imago_abstained_total") == 1


@pytest.mark.parametrize(("variant", "abstains"), [("fp32", False), ("int8", True)])
def test_thresholds_and_baseline_are_those_of_the_served_variant(tmp_path, variant, abstains):
    path = tiny_bundle.publish(tmp_path)
    tiny_bundle.add_int8(path)
    variants = json.loads((path / "manifest.json").read_text())["variants"]
    baseline = Histogram(edges=[0, 1, 2], counts=[1, 2])
    variants["int8"]["calibration"] = Calibration(abstain_threshold=0.999).model_dump()
    variants["int8"]["baseline"] = {"class": baseline.model_dump()}
    tiny_bundle.edit_manifest(path, variants=variants)
    write_checksums(path)

    model = Model.open(tmp_path, variant=variant, threads=1)
    (prediction,) = model.predict([tiny_bundle.make_image("red")])
    assert prediction.abstain is abstains
    assert model.baseline == ({"class": baseline} if variant == "int8" else {})


def decode_activation_map(prediction: dict) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(prediction["cam"], validate=True), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_UNCHANGED)


def test_activation_map_shows_the_region_of_the_class(server):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[4:12, 20:28, 1] = 255  # green, in one corner
    data = cv2.imencode(".png", pixels)[1].tobytes()
    (prediction,) = server.predict(data, "?explain=cam").json()["predictions"]
    activation_map = decode_activation_map(prediction)
    assert prediction["label"] == "green"
    assert activation_map.shape == (32, 32)
    assert activation_map.dtype == np.uint8
    assert np.array_equal(activation_map, pixels[:, :, 1])
    assert len(prediction["cam"]) < 1000


def test_further_outputs_on_request_leave_other_answers_unchanged(server):
    images = [tiny_bundle.make_image(tiny_bundle.CLASSES[i % 3], seed=i) for i in range(60)]

    def predict(image: bytes, query: str) -> dict:
        (prediction,) = server.predict(image, query).json()["predictions"]
        return prediction

    separate = [predict(image, "") for image in images]
    queries = ["", "?explain=cam", "?embedding=true", "?explain=cam&embedding=base64"] * 15
    with ThreadPoolExecutor(8) as pool:  # batches mix all kinds
        mixed = list(pool.map(predict, images, queries))

    for query, prediction, expected in zip(queries, mixed, separate, strict=True):
        assert ("cam" in prediction) is ("cam" in query)
        assert ("embedding" in prediction) is ("embedding" in query)
        assert prediction["label"] == expected["label"]
        assert prediction["confidence"] == pytest.approx(expected["confidence"], abs=1e-5)


def test_request_for_an_activation_map_that_the_model_lacks_gets_400(start, tmp_path):
    path = tiny_bundle.publish(tmp_path)
    tiny_bundle.remove_output(path, "cam")
    server = start(store=tmp_path)
    answer = server.predict(tiny_bundle.make_image("red"), "?explain=cam")
    assert answer.status_code == 400
    assert "no heat maps" in answer.json()["detail"]
    assert server.predict(tiny_bundle.make_image("red")).status_code == 200
