"""Hot reload: the service follows `latest`, also under load and with several workers."""

import base64
import threading

import httpx
import pytest

from models.store import Store
from support import tiny_bundle
from support.hot_reload import FAST_RELOAD, served_version
from support.load_generator import LoadGenerator
from support.server import CLIENT_SECONDS, NO_TLS, Server, wait_until

IMAGE = tiny_bundle.make_image("red")
INFER_PATH = "/v2/models/colours/infer"
OTHER_CLASSES = ["rot", "grün", "blau", "rosa"]  # one more than the tiny bundle has


def test_a_new_version_and_a_rollback_under_load(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, store=tmp_path)
    assert served_version(server) == "1"
    with LoadGenerator(server.port, IMAGE, clients=4, pause=0.01) as load:
        tiny_bundle.publish(tmp_path, scale=0.5)
        wait_until(lambda: load.responses and load.responses[-1].version == "2")
        Store(tmp_path).promote("colours", 1)
        wait_until(lambda: load.responses[-1].version == "1")
    assert set(load.statuses) == {200}
    assert set(load.versions) == {"1", "2"}
    assert load.unanswered == []
    assert server.metric("imago_reloads_total", outcome="ok") == 2
    assert read_served_versions(server) == ["1"]


def test_answers_are_those_of_the_new_version(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, store=tmp_path)
    tiny_bundle.publish(tmp_path, classes=OTHER_CLASSES, size=48)
    wait_until(lambda: served_version(server) == "2")
    (prediction,) = server.predict(tiny_bundle.make_image("blue")).json()["predictions"]
    assert prediction["label"] == "blau"
    model = server.http.get("/model").json()
    assert model["version"] == "2"
    assert model["input"]["height"] == 48
    assert model["classes"] == OTHER_CLASSES


def test_labels_and_numbers_are_those_of_the_version_that_answered(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, "--workers", "2", store=tmp_path)
    classes_by_version = {"1": tiny_bundle.CLASSES, "2": OTHER_CLASSES}
    text = base64.b64encode(tiny_bundle.make_image("blue")).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}

    def infer() -> str:
        """Check an answer, and return the version that gave it."""
        answer = server.http.post(INFER_PATH, json={"inputs": [tensor]}).json()
        outputs = {output["name"]: output for output in answer["outputs"]}
        classes = classes_by_version[answer["model_version"]]
        assert outputs["label"]["data"] == [classes[2]]
        assert outputs["probabilities"]["shape"] == [1, len(classes)]
        return answer["model_version"]

    assert infer() == "1"
    tiny_bundle.publish(tmp_path, classes=OTHER_CLASSES)
    wait_until(lambda: infer() == "2")
    wait_until(lambda: server.metric("imago_reloads_total", outcome="ok") == 2)
    assert {infer() for _ in range(20)} == {"2"}


@pytest.mark.slow
def test_the_images_of_a_request_are_answered_by_one_version(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, "--workers", "2", "--threads", "1", store=tmp_path)
    labels_by_version = {"1": "blue", "2": "blau"}
    files = [("f", (f"{i}", tiny_bundle.make_image("blue"))) for i in range(16)]
    responses: list[httpx.Response] = []
    stop = threading.Event()

    def send_requests() -> None:
        with httpx.Client(base_url=server.url, timeout=CLIENT_SECONDS, verify=NO_TLS) as http:
            while not stop.is_set():
                responses.append(http.post("/predict", files=files))

    clients = [threading.Thread(target=send_requests) for _ in range(4)]
    for client in clients:
        client.start()
    tiny_bundle.publish(tmp_path, classes=OTHER_CLASSES)
    wait_until(lambda: server.metric("imago_reloads_total", outcome="ok") == 2)
    stop.set()
    for client in clients:
        client.join()

    for response in responses:
        assert response.status_code == 200
        answer = response.json()
        labels = {prediction["label"] for prediction in answer["predictions"]}
        assert labels == {labels_by_version[answer["model"]["version"]]}


def test_a_tensor_with_the_shape_of_the_replaced_model_gets_503(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    # Each tensor waits in the queue, so one of them is there when the model is replaced.
    server = start(*FAST_RELOAD, "--batch-wait-ms", "1000", "--threads", "1", store=tmp_path)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [7] * 3072}
    request = {"inputs": [tensor]}
    tiny_bundle.publish(tmp_path, size=48)

    response = server.http.post(INFER_PATH, json=request)
    while response.status_code != 503:
        if response.status_code == 400:  # the model was replaced between two tensors
            Store(tmp_path).promote("colours", 1)
            wait_until(lambda: server.http.get("/model").json()["version"] == "1")
            Store(tmp_path).promote("colours", 2)
        response = server.http.post(INFER_PATH, json=request)
        assert response.status_code in (200, 400, 503), response.text
    assert server.http.post(INFER_PATH, json=request).status_code == 400


@pytest.mark.slow
def test_every_worker_reloads(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, "--workers", "2", store=tmp_path)
    with LoadGenerator(server.port, IMAGE, clients=2) as load:
        tiny_bundle.publish(tmp_path)
        wait_until(lambda: server.metric("imago_reloads_total", outcome="ok") == 2)
        before = len(load.responses)
        wait_until(lambda: len(load.responses) > before + 50)
    assert set(load.statuses) == {200}
    assert {response.version for response in load.responses[before + 10 :]} == {"2"}


def read_served_versions(server: Server) -> list[str]:
    """Return the versions for which imago_model_info is 1."""
    versions: list[str] = []
    for line in server.metrics().splitlines():
        if line.startswith("imago_model_info{") and line.endswith(" 1.0"):
            versions.append(line.split('version="')[1].split('"')[0])
    return sorted(versions)


@pytest.mark.parametrize("flags", [("--threads", "2"), ("--threads", "2", "--workers", "2")])
def test_model_info_of_an_idle_service_names_only_the_new_version(start, tmp_path, flags):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, *flags, store=tmp_path)
    assert read_served_versions(server) == ["1"]
    tiny_bundle.publish(tmp_path)
    workers = 2 if "--workers" in flags else 1
    wait_until(lambda: server.metric("imago_reloads_total", outcome="ok") == workers)
    assert read_served_versions(server) == ["2"]


def test_the_check_does_not_see_environment_variables_that_flags_override(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    variables = {
        "IMAGO_PORT": "9090",  # the default of metrics_port
        "IMAGO_VERSION": "7",
        "imago_workers": "0",
    }
    flags = ("--version", "latest", "--workers", "1")
    server = start(*FAST_RELOAD, *flags, store=tmp_path, env=variables)
    tiny_bundle.publish(tmp_path)
    wait_until(lambda: served_version(server) == "2")


@pytest.mark.slow
def test_a_version_given_by_number_is_kept(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start(*FAST_RELOAD, "--version", "1", store=tmp_path)
    following = start(*FAST_RELOAD, store=tmp_path)
    for version in ("2", "3"):
        tiny_bundle.publish(tmp_path)
        # A server that follows `latest` shows that the time between two checks has passed.
        wait_until(lambda version=version: served_version(following) == version)
    assert served_version(server) == "1"
