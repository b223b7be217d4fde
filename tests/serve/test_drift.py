"""imago_drift_psi against numpy, for traffic like the baseline and for other traffic."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from models.bundle import DRIFT_SIGNALS, Histogram
from models.drift import bin_edges, class_edges, drift_index, histogram, image_signals
from models.image import InputSpec, decode
from support import tiny_bundle
from support.server import Server, wait_until

SPEC = InputSpec(height=32, width=32)
IMAGES = 120


class Traffic(NamedTuple):
    """Image files and the length of their sides in pixels."""

    files: list[bytes]
    sizes: list[int]


def make_traffic(seed: int, sizes: tuple[int, ...], labels: list[str]) -> Traffic:
    """Make IMAGES image files that cycle through these sizes and labels."""
    traffic = Traffic([], [])
    for i in range(IMAGES):
        size = sizes[i % len(sizes)]
        label = labels[i % len(labels)]
        traffic.files.append(tiny_bundle.make_image(label, size, seed=seed + i))
        traffic.sizes.append(size)
    return traffic


def make_files(count: int, labels: list[str], size: int = 32) -> list[bytes]:
    return make_traffic(1000, (size,), labels).files[:count]


def measure_signals(traffic: Traffic) -> dict[str, np.ndarray]:
    """Measure each signal as training does on the validation data."""
    pixels = np.stack([decode(file, SPEC) for file in traffic.files])
    outputs = tiny_bundle.expected_outputs(pixels, 3)
    signals = np.array([image_signals(image) for image in pixels])
    return {
        "class": outputs["probabilities"].argmax(1),
        "confidence": outputs["probabilities"].max(1),
        "energy": outputs["energy"],
        "brightness": signals[:, 0],
        "contrast": signals[:, 1],
        "sharpness": signals[:, 2],
        "width": np.array(traffic.sizes),
        "height": np.array(traffic.sizes),
    }


def class_histogram(counts: list[int]) -> Histogram:
    """Return a baseline of the predicted class: the count of each class."""
    return Histogram(edges=class_edges(len(counts)).tolist(), counts=counts)


def name_classes(count: int) -> list[str]:
    return [f"class {i}" for i in range(count)]


@pytest.fixture(scope="module")
def baseline() -> dict[str, Histogram]:
    """The baseline of images of all classes in two sizes."""
    signals = measure_signals(make_traffic(0, (32, 48), tiny_bundle.CLASSES))
    assert tuple(signals) == DRIFT_SIGNALS

    histograms: dict[str, Histogram] = {}
    for name, values in signals.items():
        edges = class_edges(3) if name == "class" else bin_edges(values, bins=5)
        counts = histogram(values, edges).tolist()
        histograms[name] = Histogram(edges=edges.tolist(), counts=counts)
    return histograms


def read_psi(server: Server) -> dict[str, float]:
    """Return the index of each signal that has one."""
    indices: dict[str, float] = {}
    for line in server.metrics().splitlines():
        if line.startswith("imago_drift_psi{"):
            indices[line.split('"')[1]] = float(line.split()[-1])
    return indices


def repeat_until_sampled(server: Server, request: Callable[[], None]) -> None:
    """Repeat a request until drift has sampled an image more, up to 25 a second and worker."""
    sampled = server.metric("imago_drift_images")

    def send_and_check() -> bool:
        request()
        return server.metric("imago_drift_images") > sampled

    wait_until(send_and_check)


def send(server: Server, files: list[bytes]) -> None:
    """Send images one after the other, each until drift has sampled it or the window is full.

    On a busy machine an image may be sampled twice, because it is measured after the answer.
    """
    for file in files:
        if server.metric("imago_drift_images") == IMAGES:
            break
        repeat_until_sampled(server, lambda file=file: predict(server, file))


def predict(server: Server, file: bytes) -> None:
    assert server.predict(file).status_code == 200


def send_together(server: Server, files: list[bytes]) -> None:
    """Send images in one request, so that they are spread over the workers."""
    parts = [("f", (str(i), file)) for i, file in enumerate(files)]
    assert server.http.post("/predict", files=parts).status_code == 200


def wait_for_reload(server: Server, workers: int = 1) -> None:
    before = server.metric("imago_reloads_total", outcome="ok")
    wait_until(lambda: server.metric("imago_reloads_total", outcome="ok") == before + workers)


def wait_for_class_psi(server: Server) -> float:
    """Wait until there is an index, and return that of the predicted class."""
    wait_until(lambda: read_psi(server) != {})
    return read_psi(server)["class"]


def test_psi_of_each_signal(start, tmp_path, baseline):
    tiny_bundle.publish(tmp_path, baseline=baseline)
    server = start("--drift-window", str(IMAGES), store=tmp_path)
    assert read_psi(server) == {}

    similar = make_traffic(1000, (32, 48), tiny_bundle.CLASSES)
    send(server, similar.files[:15])
    assert read_psi(server) == {}, "too few images for an index"
    send(server, similar.files[15:])
    assert server.metric("imago_drift_images") == IMAGES

    indices = read_psi(server)
    signals = measure_signals(similar)
    for name, expected in baseline.items():
        live = histogram(signals[name], np.array(expected.edges))
        index = drift_index(np.array(expected.counts), live)
        assert indices[name] == pytest.approx(index, abs=0.05), name
    assert indices["class"] < 0.02

    other_files = itertools.cycle(make_traffic(2000, (64,), ["red"]).files)

    def has_drifted() -> bool:
        """Send another image, and return whether each of these signals shows the change."""
        predict(server, next(other_files))
        indices = read_psi(server)
        return all(indices[name] > 0.5 for name in ("class", "width", "height", "sharpness"))

    wait_until(has_drifted)
    assert server.metric("imago_drift_images") == IMAGES  # the window slides


@pytest.mark.slow
def test_windows_of_several_workers_are_summed(start, tmp_path, baseline):
    tiny_bundle.publish(tmp_path, baseline=baseline)
    server = start("--workers", "2", "--drift-window", str(IMAGES), store=tmp_path)
    files = make_traffic(1000, (32, 48), tiny_bundle.CLASSES).files
    groups = [files[first : first + 10] for first in range(0, IMAGES, 10)]
    for group in itertools.cycle(groups):
        repeat_until_sampled(server, lambda group=group: send_together(server, group))
        if server.metric("imago_drift_images") >= IMAGES:
            break
    assert read_psi(server)["class"] < 0.1


@pytest.mark.slow
def test_reload_with_fewer_classes_shows_no_drift(start, tmp_path, baseline):
    hundred = class_histogram([10] * 100)
    tiny_bundle.publish(tmp_path, classes=name_classes(100), baseline={"class": hundred})
    server = start("--reload-seconds", "0.2", store=tmp_path)
    assert server.predict(tiny_bundle.make_image("red")).status_code == 200

    tiny_bundle.publish(tmp_path, baseline={"class": baseline["class"]})
    wait_for_reload(server)
    send(server, make_files(36, tiny_bundle.CLASSES))
    assert wait_for_class_psi(server) < 0.1


# Adjacent classes share bins, or each class has a bin.
@pytest.mark.slow
@pytest.mark.parametrize("window", ["2000", pytest.param("1000000", marks=pytest.mark.slow)])
def test_many_thousands_of_classes(start, tmp_path, window):
    def publish(classes: int, first_expected: int) -> None:
        """Publish a model that predicts its first classes; the baseline has three others."""
        counts = np.zeros(classes, int)
        counts[first_expected : first_expected + 3] = 40
        tiny_bundle.publish(
            tmp_path,
            classes=name_classes(classes),
            size=4,
            samples=3,
            baseline={"class": class_histogram(counts.tolist())},
        )

    publish(20_000, first_expected=0)  # the classes that are predicted
    server = start("--reload-seconds", "0.2", "--drift-window", window, store=tmp_path)
    files = make_files(36, tiny_bundle.CLASSES, size=4)
    send(server, files)
    assert wait_for_class_psi(server) < 0.1

    publish(20_001, first_expected=10_000)
    wait_for_reload(server)
    assert server.http.get("/model").json()["version"] == "2"
    send(server, files)
    assert wait_for_class_psi(server) > 1
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_bins_are_merged_if_classes_are_too_many_for_the_window(start, tmp_path):
    uniform = class_histogram([20] * 500)
    tiny_bundle.publish(tmp_path, classes=name_classes(500), baseline={"class": uniform})
    server = start("--drift-window", "60", store=tmp_path)
    send(server, make_files(60, ["red"]))

    # A window of 60 images has 6 bins of 10, and all images are in the first.
    expected = drift_index(np.array([10_000 // 6] * 6), np.array([60, 0, 0, 0, 0, 0]))
    assert wait_for_class_psi(server) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_idle_worker_publishes_the_new_baseline(start, tmp_path):
    tiny_bundle.publish(tmp_path, baseline={"class": class_histogram([9000, 1, 1])})
    server = start("--workers", "2", "--reload-seconds", "0.2", store=tmp_path)
    files = make_files(36, tiny_bundle.CLASSES)
    for _ in range(5):  # so that both workers get images
        send_together(server, files)

    tiny_bundle.publish(tmp_path, baseline={"class": class_histogram([40, 40, 40])})
    wait_for_reload(server, workers=2)
    assert server.metric("imago_drift_images") == 0
    send(server, files)  # one at a time: all go to one worker
    assert wait_for_class_psi(server) < 0.1


def test_bundle_without_a_baseline_has_no_index(server):
    server.predict(tiny_bundle.make_image("red"))
    assert "imago_drift_psi{" not in server.metrics()
    assert "drift_baseline" not in server.metrics()
