"""Hot reload of `latest`, for real: under load, with several workers, with bad versions and back again."""
import base64
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import tiny
from service import wait

from models.bundle import write_sums
from models.store import Store

# Even root reads no file that is closed to it.
BOUND = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
SOON = ("--reload-seconds", "0.2")


@contextmanager
def load(service, clients: int = 4) -> Iterator[list[tuple[int, str]]]:
    """Clients that ask without a pause; status and version of each answer."""
    answers, stop = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as http:
            while not stop.is_set():
                answer = http.post("/predict", content=tiny.image("red"), headers={"Content-Type": "image/png"})
                answers.append((answer.status_code, answer.headers.get("x-model-version", "")))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def replace_worker(service) -> None:
    """Kill the only worker and wait for the next."""
    (worker,) = service.workers()
    os.kill(worker, signal.SIGKILL)
    wait(lambda: service.workers() not in ([worker], []))
    wait(service.is_ready)


def checks(store) -> list[int]:
    """Processes that check a version of this store."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"check" in words and str(store).encode() in words:
                found.append(int(path.parent.name))
    return found


def version(service) -> str:
    return service.predict(tiny.image("red")).json()["model"]["version"]


def spoiled(store, how: str) -> None:
    """A version 2 that must not be served; `latest` points to it."""
    path = tiny.write(store, promote=False)
    if how == "changed":
        (path / "model.onnx").write_bytes((path / "model.onnx").read_bytes() + b"\0")
    elif how == "no graph":
        (path / "model.onnx").write_bytes(b"not a graph")
        write_sums(path)
    elif how == "other answers":
        expected = dict(np.load(path / "samples" / "expected.npz"))
        expected["probabilities"] = expected["probabilities"][:, ::-1]
        np.savez(path / "samples" / "expected.npz", **expected)
        write_sums(path)
    elif how == "no such class":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["samples"][0]["label"] = 99
        (path / "manifest.json").write_text(json.dumps(manifest))
        write_sums(path)
    elif how == "a graph that fails":
        tiny.break_where_bright(path, 0.1)
    elif how == "a graph that hangs":
        tiny.hang(path)
    elif how == "closed to us":
        (path / "model.onnx").chmod(0)
    elif how == "no manifest":
        (path / "manifest.json").unlink()
    os.symlink("2", store / "colours" / "next")
    os.replace(store / "colours" / "next", store / "colours" / "latest")


def test_a_new_version_is_swapped_in_under_load_and_back(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path)
    assert version(service) == "1"
    with load(service) as answers:
        tiny.write(tmp_path, scale=0.5)
        wait(lambda: answers and answers[-1][1] == "2")
        Store(tmp_path).promote("colours", 1)
        wait(lambda: answers[-1][1] == "1")
    assert {status for status, _ in answers} == {200}
    assert {number for _, number in answers} == {"1", "2"}
    assert service.metric("imago_reloads_total", outcome="ok") == 2
    info = [line for line in service.metrics().splitlines() if line.startswith("imago_model_info{")]
    assert len(info) == 1
    assert 'version="1"' in info[0]


def test_the_answers_are_those_of_the_new_version(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path)
    tiny.write(tmp_path, classes=["rot", "grün", "blau", "rosa"], size=48)  # other classes, another size
    wait(lambda: version(service) == "2")
    (prediction,) = service.predict(tiny.image("blue")).json()["predictions"]
    assert prediction["label"] == "blau"
    model = service.http.get("/model").json()
    assert (model["version"], model["input"]["height"], len(model["classes"])) == ("2", 48, 4)


def test_labels_and_numbers_are_those_of_the_version_that_answered(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, "--workers", "2", store=tmp_path)
    classes = {"1": tiny.CLASSES, "2": ["rot", "grün", "blau", "rosa"]}
    request = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1],
                           "data": [base64.b64encode(tiny.image("blue")).decode()]}]}

    def ask() -> str:
        answer = service.http.post("/v2/models/colours/infer", json=request).json()
        found = {output["name"]: output for output in answer["outputs"]}
        assert found["label"]["data"] == [classes[answer["model_version"]][2]]
        assert found["probabilities"]["shape"] == [1, len(classes[answer["model_version"]])]
        return answer["model_version"]

    assert ask() == "1"
    tiny.write(tmp_path, classes=classes["2"])
    wait(lambda: ask() == "2")
    wait(lambda: service.metric("imago_reloads_total", outcome="ok") == 2)
    assert {ask() for _ in range(20)} == {"2"}


def test_the_images_of_a_request_are_answered_by_one_version(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, "--workers", "2", "--threads", "1", store=tmp_path)
    labels = {"1": "blue", "2": "blau"}
    files = [("f", (f"{i}", tiny.image("blue"))) for i in range(16)]
    found, over = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as http:
            while not over.is_set():
                found.append(http.post("/predict", files=files))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    tiny.write(tmp_path, classes=["rot", "grün", "blau"])
    wait(lambda: service.metric("imago_reloads_total", outcome="ok") == 2)
    over.set()
    for client in clients:
        client.join()
    assert {answer.status_code for answer in found} == {200}
    for answer in (answer.json() for answer in found):
        assert {p["label"] for p in answer["predictions"]} == {labels[answer["model"]["version"]]}


def test_a_tensor_that_was_right_when_it_was_sent_is_no_fault_of_the_client(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, "--batch-wait-ms", "1000", "--threads", "1", store=tmp_path)  # so it waits in the queue
    request = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [7] * 3072}]}
    tiny.write(tmp_path, size=48)
    found = [200]
    while found[-1] == 200:
        answer = service.http.post("/v2/models/colours/infer", json=request)
        found.append(answer.status_code)
    assert found[-1] == 503, answer.text
    assert service.http.post("/v2/models/colours/infer", json=request).status_code == 400


def test_every_worker_swaps(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, "--workers", "2", store=tmp_path)
    with load(service, clients=2) as answers:
        tiny.write(tmp_path)
        wait(lambda: service.metric("imago_reloads_total", outcome="ok") == 2)
        seen = len(answers)
        wait(lambda: len(answers) > seen + 50)
    assert {status for status, _ in answers} == {200}
    assert {number for _, number in answers[seen + 10:]} == {"2"}


def told(service) -> list[str]:
    """The versions that imago_model_info is 1 for."""
    lines = [line for line in service.metrics().splitlines() if line.startswith("imago_model_info{")]
    return sorted(line.split('version="')[1].split('"')[0] for line in lines if line.endswith(" 1.0"))


@pytest.mark.parametrize("flags", [("--threads", "2"), ("--threads", "2", "--workers", "2")])
def test_an_idle_service_tells_of_the_new_version_alone(start, tmp_path, flags):
    tiny.write(tmp_path)
    service = start(*SOON, *flags, store=tmp_path)
    assert told(service) == ["1"]
    tiny.write(tmp_path)
    workers = 2 if "--workers" in flags else 1
    wait(lambda: service.metric("imago_reloads_total", outcome="ok") == workers)
    assert told(service) == ["2"]


@pytest.mark.parametrize("how", ["changed", "no graph", "other answers", "no such class", "no manifest",
                                 "a graph that fails"])
def test_a_bad_version_is_refused_and_the_old_serves_on(start, tmp_path, how):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path)
    with load(service, clients=1) as answers:
        spoiled(tmp_path, how)
        wait(lambda: service.metric("imago_reloads_total", outcome="refused") == 1)
        time.sleep(1)
    assert set(answers) == {(200, "1")}
    assert service.is_ready()
    assert service.metric("imago_reloads_total", outcome="refused") == 1, "it is not tried again and again"
    lines = [json.loads(line) for line in service.log.read_text().splitlines() if "refused" in line]
    assert len(lines) == 1
    assert (lines[0]["level"], lines[0]["from"], lines[0]["to"]) == ("error", 1, 2)


@pytest.mark.parametrize("how", ["changed", "a graph that fails", "closed to us"])
def test_a_worker_that_dies_while_latest_is_bad_comes_back_with_the_old(start, tmp_path, how):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path, command=[*BOUND, sys.executable, "-m", "serve"])
    spoiled(tmp_path, how)
    wait(lambda: service.metric("imago_reloads_total", outcome="refused") == 1)
    replace_worker(service)
    assert version(service) == "1"
    wait(lambda: service.metric("imago_reloads_total", outcome="refused") == 2)  # it looked by itself
    assert service.metric("imago_restarts_total", process="worker", reason="crash") == 1


def test_a_worker_that_dies_while_latest_hangs_comes_back_with_the_old(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, store=tmp_path)
    spoiled(tmp_path, "a graph that hangs")
    wait(lambda: checks(tmp_path))
    (first,) = checks(tmp_path)
    replace_worker(service)
    assert version(service) == "1"
    wait(lambda: checks(tmp_path) and first not in checks(tmp_path))  # a check does not outlive its worker
    assert service.stop() == 0
    wait(lambda: not checks(tmp_path))


def test_a_worker_that_dies_before_latest_was_checked_moves_on_by_itself(start, tmp_path):
    tiny.write(tmp_path)
    service = start("--reload-seconds", "3", store=tmp_path)
    tiny.write(tmp_path)
    replace_worker(service)
    wait(lambda: version(service) == "2")
    assert service.metric("imago_reloads_total", outcome="ok") == 1


def test_a_worker_that_dies_when_the_old_is_gone_takes_the_new(start, tmp_path):
    tiny.write(tmp_path)
    service = start("--reload-seconds", "1000", store=tmp_path)
    tiny.write(tmp_path)
    shutil.rmtree(tmp_path / "colours" / "1")
    replace_worker(service)
    assert version(service) == "2"


def test_variables_that_flags_override_do_not_reach_the_check(start, tmp_path):
    tiny.write(tmp_path)
    clash = {"IMAGO_PORT": "9090", "IMAGO_VERSION": "7", "imago_workers": "0"}  # 9090 is the default of another port
    service = start(*SOON, "--version", "latest", "--workers", "1", store=tmp_path, env=clash)
    tiny.write(tmp_path)
    wait(lambda: version(service) == "2")


def test_a_version_withdrawn_while_it_is_checked_is_not_served(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, "--threads", "1", store=tmp_path)
    tiny.write(tmp_path)
    wait(lambda: checks(tmp_path))
    (pid,) = checks(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    assert b"--threads\x001\0" in Path(f"/proc/{pid}/cmdline").read_bytes(), "it takes no more cores than we may"
    Store(tmp_path).promote("colours", 1)
    os.kill(pid, signal.SIGCONT)
    wait(lambda: not checks(tmp_path))
    tiny.write(tmp_path)
    wait(lambda: version(service) == "3")
    assert service.metric("imago_reloads_total", outcome="ok") == 1


def test_a_number_is_not_followed(start, tmp_path):
    tiny.write(tmp_path)
    service = start(*SOON, "--version", "1", store=tmp_path)
    tiny.write(tmp_path)
    time.sleep(2)
    assert version(service) == "1"
