"""imago_drift_psi against numpy, for traffic like the baseline and for other traffic."""

import time

import numpy as np
import pytest
from support import tiny_bundle
from support.server import wait_until

from models.bundle import DRIFT_SIGNALS, Histogram
from models.drift import bin_edges, class_edges, histogram, image_signals, psi
from models.image import InputSpec, decode

SPEC = InputSpec(height=32, width=32)
IMAGES = 120


def measure_signals(files: list[bytes], sizes: list[int]) -> dict[str, np.ndarray]:
    """Measure each signal as training does on the validation data."""
    pixels = np.stack([decode(data, SPEC) for data in files])
    out = tiny_bundle.expected_outputs(pixels, 3)
    looks = np.array([image_signals(image) for image in pixels])
    return {
        "class": out["probabilities"].argmax(1),
        "confidence": out["probabilities"].max(1),
        "energy": out["energy"],
        "brightness": looks[:, 0],
        "contrast": looks[:, 1],
        "sharpness": looks[:, 2],
        "width": np.array(sizes),
        "height": np.array(sizes),
    }


def make_images(
    seed: int, sizes: tuple[int, ...], labels: list[str]
) -> tuple[list[bytes], list[int]]:
    chosen = [sizes[i % len(sizes)] for i in range(IMAGES)]
    return [
        tiny_bundle.make_image(labels[i % len(labels)], size, seed=seed + i)
        for i, size in enumerate(chosen)
    ], chosen


@pytest.fixture(scope="module")
def baseline() -> dict[str, Histogram]:
    found = measure_signals(*make_images(0, (32, 48), tiny_bundle.CLASSES))
    cut = {
        name: class_edges(3) if name == "class" else bin_edges(values, bins=5)
        for name, values in found.items()
    }
    assert tuple(found) == DRIFT_SIGNALS
    return {
        name: Histogram(edges=cut[name].tolist(), counts=histogram(values, cut[name]).tolist())
        for name, values in found.items()
    }


def read_psi(service) -> dict[str, float]:
    """Return the index of each signal that has one."""
    lines = [line for line in service.metrics().splitlines() if line.startswith("imago_drift_psi{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def send(service, files: list[bytes]) -> None:
    """Send images one after the other, no faster than drift is sampled."""
    for data in files:
        assert service.predict(data).status_code == 200
        time.sleep(0.045)


def test_psi_of_each_signal(start, tmp_path, baseline):
    tiny_bundle.publish(tmp_path, baseline=baseline)
    service = start("--drift-window", str(IMAGES), store=tmp_path)
    assert read_psi(service) == {}
    same, sizes = make_images(1000, (32, 48), tiny_bundle.CLASSES)
    send(service, same[:15])
    assert read_psi(service) == {}, "too few images for an index"
    send(service, same[15:])
    wait_until(
        lambda: service.metric("imago_drift_images") == IMAGES
    )  # an answer leaves before it is counted
    found, want = read_psi(service), measure_signals(same, sizes)
    for name, histogram_ in baseline.items():
        live = histogram(want[name], np.array(histogram_.edges))
        assert found[name] == pytest.approx(psi(np.array(histogram_.counts), live), abs=0.05), name
    assert found["class"] < 0.02
    moved, sizes = make_images(2000, (64,), ["red"])
    send(service, moved)
    assert service.metric("imago_drift_images") == IMAGES  # the window slides
    found = read_psi(service)
    assert min(found[name] for name in ("class", "width", "height", "sharpness")) > 0.5


def test_windows_of_several_workers_are_summed(start, tmp_path, baseline):
    tiny_bundle.publish(tmp_path, baseline=baseline)
    service = start("--workers", "2", "--drift-window", str(IMAGES), store=tmp_path)
    files, _ = make_images(1000, (32, 48), tiny_bundle.CLASSES)
    for at in range(0, IMAGES, 10):  # many in one request are spread over the workers
        many = [("f", (str(i), data)) for i, data in enumerate(files[at : at + 10])]
        assert service.http.post("/predict", files=many).status_code == 200
        time.sleep(0.45)
    assert service.metric("imago_drift_images") > IMAGES / 2
    assert read_psi(service)["class"] < 0.1


def wait_for_reload(service, workers: int = 1) -> None:
    before = service.metric("imago_reloads_total", outcome="ok")
    wait_until(lambda: service.metric("imago_reloads_total", outcome="ok") == before + workers, 120)


def test_reload_with_fewer_classes_shows_no_drift(start, tmp_path, baseline):
    many = {"class": Histogram(edges=class_edges(100).tolist(), counts=[10] * 100)}
    tiny_bundle.publish(tmp_path, classes=[f"class {i}" for i in range(100)], baseline=many)
    service = start("--reload-seconds", "0.2", store=tmp_path)
    assert service.predict(tiny_bundle.make_image("red")).status_code == 200
    tiny_bundle.publish(tmp_path, baseline={"class": baseline["class"]})
    wait_for_reload(service)
    send(service, make_images(1000, (32,), tiny_bundle.CLASSES)[0][:36])
    wait_until(lambda: read_psi(service) != {})
    assert read_psi(service)["class"] < 0.1


# Classes next to each other share bins, or each has a bin of its own.
@pytest.mark.parametrize("window", ["2000", pytest.param("1000000", marks=pytest.mark.slow)])
def test_many_thousands_of_classes(start, tmp_path, window):
    def write(classes: int, at: int) -> None:
        """Those that are predicted come first; the others come with the baseline from `at` on."""
        counts = np.zeros(classes, int)
        counts[at : at + 3] = 40
        tiny_bundle.publish(
            tmp_path,
            classes=[f"class {i}" for i in range(classes)],
            size=4,
            samples=3,
            baseline={
                "class": Histogram(edges=class_edges(classes).tolist(), counts=counts.tolist())
            },
        )

    write(20_000, 0)
    service = start("--reload-seconds", "0.2", "--drift-window", window, store=tmp_path)
    files = make_images(1000, (4,), tiny_bundle.CLASSES)[0][:36]
    send(service, files)
    wait_until(lambda: read_psi(service) != {})
    assert read_psi(service)["class"] < 0.1
    write(20_001, 10_000)
    wait_for_reload(service)
    assert service.http.get("/model").json()["version"] == "2"
    send(service, files)
    wait_until(lambda: read_psi(service) != {})
    assert read_psi(service)["class"] > 1
    assert "Traceback" not in service.log.read_text()


def test_bins_are_merged_where_classes_are_too_many_for_the_window(start, tmp_path):
    even = [20] * 500
    tiny_bundle.publish(
        tmp_path,
        classes=[f"class {i}" for i in range(500)],
        baseline={"class": Histogram(edges=class_edges(500).tolist(), counts=even)},
    )
    service = start("--drift-window", "60", store=tmp_path)
    send(service, make_images(1000, (32,), ["red"])[0][:62])
    wait_until(lambda: read_psi(service) != {})
    want = psi(np.array([10_000 // 6] * 6), np.array([60, 0, 0, 0, 0, 0]))
    assert read_psi(service)["class"] == pytest.approx(want, rel=0.05)


def test_idle_worker_publishes_the_new_baseline(start, tmp_path):
    def even(*counts: int) -> dict[str, Histogram]:
        return {"class": Histogram(edges=class_edges(3).tolist(), counts=counts)}

    tiny_bundle.publish(tmp_path, baseline=even(9000, 1, 1))
    service = start("--workers", "2", "--reload-seconds", "0.2", store=tmp_path)
    files = make_images(1000, (32,), tiny_bundle.CLASSES)[0][:36]
    for _ in range(5):  # both workers get some
        service.http.post("/predict", files=[("f", (str(i), data)) for i, data in enumerate(files)])
    tiny_bundle.publish(tmp_path, baseline=even(40, 40, 40))
    wait_for_reload(service, workers=2)
    assert service.metric("imago_drift_images") == 0
    send(service, files)  # one at a time all go to one worker
    wait_until(lambda: read_psi(service) != {})
    assert read_psi(service)["class"] < 0.1


def test_bundle_without_a_baseline_has_no_index(server):
    server.predict(tiny_bundle.make_image("red"))
    assert "imago_drift_psi{" not in server.metrics()
    assert "drift_baseline" not in server.metrics()
