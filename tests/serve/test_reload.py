"""Hot reload: the service follows `latest`, also under load and with several workers."""

import base64
import threading
import time

import httpx
import pytest
from support import tiny_bundle
from support.hot_reload import FAST_RELOAD, served_version
from support.load_generator import LoadGenerator
from support.server import wait_until

from models.store import Store

IMAGE = tiny_bundle.make_image("red")


def test_new_version_and_rollback_under_load(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start(*FAST_RELOAD, store=tmp_path)
    assert served_version(service) == "1"
    with LoadGenerator(service.port, IMAGE, clients=4) as load:
        tiny_bundle.publish(tmp_path, scale=0.5)
        wait_until(lambda: load.responses and load.responses[-1].version == "2")
        Store(tmp_path).promote("colours", 1)
        wait_until(lambda: load.responses[-1].version == "1")
    assert set(load.statuses) == {200}
    assert set(load.versions) == {"1", "2"}
    assert load.unanswered == []
    assert service.metric("imago_reloads_total", outcome="ok") == 2
    info = [line for line in service.metrics().splitlines() if line.startswith("imago_model_info{")]
    assert len(info) == 1
    assert 'version="1"' in info[0]


def test_answers_are_those_of_the_new_version(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start(*FAST_RELOAD, store=tmp_path)
    tiny_bundle.publish(
        tmp_path, classes=["rot", "grün", "blau", "rosa"], size=48
    )  # other classes, another size
    wait_until(lambda: served_version(service) == "2")
    (prediction,) = service.predict(tiny_bundle.make_image("blue")).json()["predictions"]
    assert prediction["label"] == "blau"
    model = service.http.get("/model").json()
    assert (model["version"], model["input"]["height"], len(model["classes"])) == ("2", 48, 4)


def test_labels_and_numbers_are_those_of_the_version_that_answered(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start(*FAST_RELOAD, "--workers", "2", store=tmp_path)
    classes = {"1": tiny_bundle.CLASSES, "2": ["rot", "grün", "blau", "rosa"]}
    request = {
        "inputs": [
            {
                "name": "image",
                "datatype": "BYTES",
                "shape": [1],
                "data": [base64.b64encode(tiny_bundle.make_image("blue")).decode()],
            }
        ]
    }

    def ask() -> str:
        answer = service.http.post("/v2/models/colours/infer", json=request).json()
        found = {output["name"]: output for output in answer["outputs"]}
        assert found["label"]["data"] == [classes[answer["model_version"]][2]]
        assert found["probabilities"]["shape"] == [1, len(classes[answer["model_version"]])]
        return answer["model_version"]

    assert ask() == "1"
    tiny_bundle.publish(tmp_path, classes=classes["2"])
    wait_until(lambda: ask() == "2")
    wait_until(lambda: service.metric("imago_reloads_total", outcome="ok") == 2)
    assert {ask() for _ in range(20)} == {"2"}


def test_the_images_of_a_request_are_answered_by_one_version(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start(*FAST_RELOAD, "--workers", "2", "--threads", "1", store=tmp_path)
    labels = {"1": "blue", "2": "blau"}
    files = [("f", (f"{i}", tiny_bundle.make_image("blue"))) for i in range(16)]
    found, over = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as http:
            while not over.is_set():
                found.append(http.post("/predict", files=files))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    tiny_bundle.publish(tmp_path, classes=["rot", "grün", "blau"])
    wait_until(lambda: service.metric("imago_reloads_total", outcome="ok") == 2)
    over.set()
    for client in clients:
        client.join()
    assert {answer.status_code for answer in found} == {200}
    for answer in (answer.json() for answer in found):
        assert {p["label"] for p in answer["predictions"]} == {labels[answer["model"]["version"]]}


def test_tensor_with_the_shape_of_the_model_before_gets_503(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start(
        *FAST_RELOAD, "--batch-wait-ms", "1000", "--threads", "1", store=tmp_path
    )  # so it waits in the queue
    request = {
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [7] * 3072}
        ]
    }
    tiny_bundle.publish(tmp_path, size=48)
    found = [200]
    while found[-1] == 200:
        answer = service.http.post("/v2/models/colours/infer", json=request)
        found.append(answer.status_code)
    assert found[-1] == 503, answer.text
    assert service.http.post("/v2/models/colours/infer", json=request).status_code == 400


def test_every_worker_reloads(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start(*FAST_RELOAD, "--workers", "2", store=tmp_path)
    with LoadGenerator(service.port, IMAGE, clients=2) as load:
        tiny_bundle.publish(tmp_path)
        wait_until(lambda: service.metric("imago_reloads_total", outcome="ok") == 2)
        before = len(load.responses)
        wait_until(lambda: len(load.responses) > before + 50)
    assert set(load.statuses) == {200}
    assert {response.version for response in load.responses[before + 10 :]} == {"2"}


def read_served_versions(service) -> list[str]:
    """Return the versions for which imago_model_info is 1."""
    lines = [
        line for line in service.metrics().splitlines() if line.startswith("imago_model_info{")
    ]
    return sorted(
        line.split('version="')[1].split('"')[0] for line in lines if line.endswith(" 1.0")
    )


@pytest.mark.parametrize("flags", [("--threads", "2"), ("--threads", "2", "--workers", "2")])
def test_model_info_of_an_idle_service_names_only_the_new_version(start, tmp_path, flags):
    tiny_bundle.publish(tmp_path)
    service = start(*FAST_RELOAD, *flags, store=tmp_path)
    assert read_served_versions(service) == ["1"]
    tiny_bundle.publish(tmp_path)
    workers = 2 if "--workers" in flags else 1
    wait_until(lambda: service.metric("imago_reloads_total", outcome="ok") == workers)
    assert read_served_versions(service) == ["2"]


def test_check_does_not_see_environment_variables_that_flags_override(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    clash = {
        "IMAGO_PORT": "9090",
        "IMAGO_VERSION": "7",
        "imago_workers": "0",
    }  # 9090 is the default of another port
    service = start(
        *FAST_RELOAD, "--version", "latest", "--workers", "1", store=tmp_path, env=clash
    )
    tiny_bundle.publish(tmp_path)
    wait_until(lambda: served_version(service) == "2")


def test_version_number_is_not_followed(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start(*FAST_RELOAD, "--version", "1", store=tmp_path)
    tiny_bundle.publish(tmp_path)
    time.sleep(2)
    assert served_version(service) == "1"
