"""imago_drift_psi against numpy: live traffic that looks like the baseline, and traffic that does not."""

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


def signals(files: list[bytes], sizes: list[int]) -> dict[str, np.ndarray]:
    """Each signal of these files as the validation data of a bundle would have it."""
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


def made(seed: int, sizes: tuple[int, ...], labels: list[str]) -> tuple[list[bytes], list[int]]:
    chosen = [sizes[i % len(sizes)] for i in range(IMAGES)]
    return [
        tiny_bundle.make_image(labels[i % len(labels)], size, seed=seed + i)
        for i, size in enumerate(chosen)
    ], chosen


@pytest.fixture(scope="module")
def baseline() -> dict[str, Histogram]:
    found = signals(*made(0, (32, 48), tiny_bundle.CLASSES))
    cut = {
        name: class_edges(3) if name == "class" else bin_edges(values, bins=5)
        for name, values in found.items()
    }
    assert tuple(found) == DRIFT_SIGNALS
    return {
        name: Histogram(edges=cut[name].tolist(), counts=histogram(values, cut[name]).tolist())
        for name, values in found.items()
    }


def observed(service) -> dict[str, float]:
    """The index of each signal; missing where there is none yet."""
    lines = [line for line in service.metrics().splitlines() if line.startswith("imago_drift_psi{")]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines}


def send(service, files: list[bytes]) -> None:
    """One after the other, no faster than they are sampled."""
    for data in files:
        assert service.predict(data).status_code == 200
        time.sleep(0.045)


def test_psi_of_each_signal(start, tmp_path, baseline):
    tiny_bundle.publish(tmp_path, baseline=baseline)
    service = start("--drift-window", str(IMAGES), store=tmp_path)
    assert observed(service) == {}
    same, sizes = made(1000, (32, 48), tiny_bundle.CLASSES)
    send(service, same[:15])
    assert observed(service) == {}, "so few images say nothing"
    send(service, same[15:])
    wait_until(
        lambda: service.metric("imago_drift_images") == IMAGES
    )  # an answer leaves before it is counted
    found, want = observed(service), signals(same, sizes)
    for name, histogram_ in baseline.items():
        live = histogram(want[name], np.array(histogram_.edges))
        assert found[name] == pytest.approx(psi(np.array(histogram_.counts), live), abs=0.05), name
    assert found["class"] < 0.02
    moved, sizes = made(2000, (64,), ["red"])
    send(service, moved)
    assert service.metric("imago_drift_images") == IMAGES  # the window slides
    found = observed(service)
    assert min(found[name] for name in ("class", "width", "height", "sharpness")) > 0.5


def test_several_workers_add_up(start, tmp_path, baseline):
    tiny_bundle.publish(tmp_path, baseline=baseline)
    service = start("--workers", "2", "--drift-window", str(IMAGES), store=tmp_path)
    files, _ = made(1000, (32, 48), tiny_bundle.CLASSES)
    for at in range(0, IMAGES, 10):  # many in one request are spread over the workers
        many = [("f", (str(i), data)) for i, data in enumerate(files[at : at + 10])]
        assert service.http.post("/predict", files=many).status_code == 200
        time.sleep(0.45)
    assert service.metric("imago_drift_images") > IMAGES / 2
    assert observed(service)["class"] < 0.1


def swap(service, workers: int = 1) -> None:
    before = service.metric("imago_reloads_total", outcome="ok")
    wait_until(lambda: service.metric("imago_reloads_total", outcome="ok") == before + workers, 120)


def test_a_model_of_fewer_classes_shows_no_drift_that_there_is_not(start, tmp_path, baseline):
    many = {"class": Histogram(edges=class_edges(100).tolist(), counts=[10] * 100)}
    tiny_bundle.publish(tmp_path, classes=[f"class {i}" for i in range(100)], baseline=many)
    service = start("--reload-seconds", "0.2", store=tmp_path)
    assert service.predict(tiny_bundle.make_image("red")).status_code == 200
    tiny_bundle.publish(tmp_path, baseline={"class": baseline["class"]})
    swap(service)
    send(service, made(1000, (32,), tiny_bundle.CLASSES)[0][:36])
    wait_until(lambda: observed(service) != {})
    assert observed(service)["class"] < 0.1


@pytest.mark.parametrize(
    "window", ["2000", "1000000"]
)  # where neighbours share bins, and where none have to
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
    files = made(1000, (4,), tiny_bundle.CLASSES)[0][:36]
    send(service, files)
    wait_until(lambda: observed(service) != {})
    assert observed(service)["class"] < 0.1
    write(20_001, 10_000)
    swap(service)
    assert service.http.get("/model").json()["version"] == "2"
    send(service, files)
    wait_until(lambda: observed(service) != {})
    assert observed(service)["class"] > 1
    assert "Traceback" not in service.log.read_text()


def test_classes_too_many_for_the_window_share_bins(start, tmp_path):
    even = [20] * 500
    tiny_bundle.publish(
        tmp_path,
        classes=[f"class {i}" for i in range(500)],
        baseline={"class": Histogram(edges=class_edges(500).tolist(), counts=even)},
    )
    service = start("--drift-window", "60", store=tmp_path)
    send(service, made(1000, (32,), ["red"])[0][:62])
    wait_until(lambda: observed(service) != {})
    want = psi(np.array([10_000 // 6] * 6), np.array([60, 0, 0, 0, 0, 0]))
    assert observed(service)["class"] == pytest.approx(want, rel=0.05)


def test_a_worker_that_rests_compares_with_the_new_baseline(start, tmp_path):
    def even(*counts: int) -> dict[str, Histogram]:
        return {"class": Histogram(edges=class_edges(3).tolist(), counts=counts)}

    tiny_bundle.publish(tmp_path, baseline=even(9000, 1, 1))
    service = start("--workers", "2", "--reload-seconds", "0.2", store=tmp_path)
    files = made(1000, (32,), tiny_bundle.CLASSES)[0][:36]
    for _ in range(5):  # both workers get some
        service.http.post("/predict", files=[("f", (str(i), data)) for i, data in enumerate(files)])
    tiny_bundle.publish(tmp_path, baseline=even(40, 40, 40))
    swap(service, workers=2)
    assert service.metric("imago_drift_images") == 0
    send(service, files)  # one at a time all go to one worker
    wait_until(lambda: observed(service) != {})
    assert observed(service)["class"] < 0.1


def test_no_baseline_no_index(server):
    server.predict(tiny_bundle.make_image("red"))
    assert "imago_drift_psi{" not in server.metrics()
    assert "drift_baseline" not in server.metrics()
