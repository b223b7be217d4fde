"""The local overlay on a real cluster; support/live_cluster.py says on which."""

import json
import subprocess
import time

import yaml

from support.live_cluster import (
    MARKS,
    ROOT,
    SELECTOR,
    assert_no_request_lost,
    evict,
    image_of,
    kubectl,
    make,
    pod_manifest,
    serving_pods,
    sustained_load,
    wait_for,
    wait_for_rollout,
)
from support.manifests import K8S

pytestmark = MARKS


def test_the_job_completes_and_the_deployment_is_ready():
    kubectl("wait", "--for=condition=Complete", "job/imago-train", "--timeout=300s")
    ready = "jsonpath={.status.readyReplicas}"
    assert kubectl("get", "deployment", "imago-serving", "-o", ready) == "2"


def test_a_second_deploy_changes_nothing():
    before = kubectl("get", "pods", "-o", "jsonpath={.items[*].metadata.uid}")
    make("deploy", "OVERLAY=local")
    assert kubectl("get", "pods", "-o", "jsonpath={.items[*].metadata.uid}") == before


def test_a_missing_image_is_one_line():
    result = subprocess.run(
        ["make", "deploy", "TAG=no-such"], cwd=ROOT, capture_output=True, text=True
    )
    try:
        assert result.returncode == 2
        assert "imago-serve:no-such is not on the node" in result.stderr.splitlines()[-2]
    finally:
        kubectl("rollout", "undo", "deployment/imago-serving")
        wait_for_rollout()


def test_a_rolling_update_loses_no_request():
    with sustained_load() as counts:
        kubectl("rollout", "restart", "deployment/imago-serving")
        wait_for_rollout()
        wait_for("the old pods to go", lambda: len(serving_pods()) == 2)
    assert_no_request_lost(counts)


def test_deleted_pods_lose_no_request():
    with sustained_load() as counts:
        for name in serving_pods():
            kubectl("delete", name, "--wait=true")
            wait_for_rollout()
    assert_no_request_lost(counts)


def test_scaling_loses_no_request():
    with sustained_load() as counts:
        for count in (1, 3, 1, 2):
            make("scale", f"N={count}")
            wait_for(f"{count} pods", lambda count=count: len(serving_pods()) == count)
    assert_no_request_lost(counts)


MAKE_DAMAGED_VERSION = """
import pathlib, shutil
store = pathlib.Path("/store/digits")
shutil.rmtree(store / "99", ignore_errors=True)
shutil.copytree(store / "1", store / "99")
manifest = store / "99/manifest.json"
manifest.write_text(manifest.read_text().replace('"version": 1,', '"version": 99,'))
graph = store / "99/model.onnx"
graph.write_bytes(graph.read_bytes()[:-8] + b"damaged!")
"""


def damaged_pod_status() -> dict:
    """Return the container's status in the pod of version 99, empty where there is none yet."""
    damaged_version = {"name": "IMAGO_VERSION", "value": "99"}
    for pod in json.loads(kubectl("get", "pods", "-l", SELECTOR, "-o", "json"))["items"]:
        if damaged_version in pod["spec"]["containers"][0].get("env", []):
            statuses = pod["status"].get("containerStatuses", [{}])
            return statuses[0]
    return {}


def is_started(status: dict) -> bool:
    return bool(status.get("started") or status.get("restartCount"))


def test_a_damaged_version_gets_no_traffic():
    kubectl(
        "apply",
        "-f",
        "-",
        stdin=pod_manifest(
            "damage", image_of("serve"), ["python", "-c", MAKE_DAMAGED_VERSION], "imago-store"
        ),
    )
    kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/damage", "--timeout=60s")
    kubectl("delete", "pod", "damage")
    with sustained_load() as counts:
        kubectl("set", "env", "deployment/imago-serving", "IMAGO_VERSION=99")
        wait_for("the new pod to start", lambda: is_started(damaged_pod_status()))
        time.sleep(15)  # a pod that became ready later, wrongly, would do so within seconds
        assert not damaged_pod_status()["ready"]
        ready = "jsonpath={.status.readyReplicas}"
        assert kubectl("get", "deployment", "imago-serving", "-o", ready) == "2"
        kubectl("rollout", "undo", "deployment/imago-serving")
        wait_for_rollout()
    assert_no_request_lost(counts)
    assert set(counts["versions"]) == {"1"}


def train_pods() -> list[dict]:
    return json.loads(
        kubectl("get", "pods", "-l", "batch.kubernetes.io/job-name=imago-train", "-o", "json")
    )["items"]


def restart_training(*args: str) -> None:
    """Replace the training Job by one with additional arguments."""
    kubectl("delete", "job", "imago-train", "--ignore-not-found", "--wait=true")
    rendered = subprocess.run(
        [K8S / "cluster", "render"], capture_output=True, text=True, check=True
    ).stdout
    job = next(m for m in yaml.safe_load_all(rendered) if m["kind"] == "Job")
    job["spec"]["template"]["spec"]["containers"][0]["args"] += args
    kubectl("apply", "-f", "-", stdin=json.dumps(job))


def test_an_invalid_setting_fails_at_once():
    restart_training("--trainer.max_epochs=none-at-all")
    kubectl("wait", "--for=condition=Failed", "job/imago-train", "--timeout=120s")
    assert len(train_pods()) == 1
    assert "max_epochs" in kubectl("logs", "job/imago-train").splitlines()[-1]
    assert "PodFailurePolicy" in kubectl(
        "get", "job", "imago-train", "-o", "jsonpath={.status.conditions}"
    )


def has_trained_five_epochs() -> bool:
    pods = train_pods()
    if not pods or pods[0]["status"]["phase"] != "Running":
        return False
    return "epoch 5/60" in kubectl("logs", "job/imago-train")


def test_training_resumes_after_an_eviction():
    restart_training("--trainer.max_epochs=60", "--name=resumed")
    wait_for("the fifth epoch", has_trained_five_epochs, 240)
    first = train_pods()[0]["metadata"]["name"]
    assert evict(first)
    kubectl("wait", "--for=condition=Complete", "job/imago-train", "--timeout=600s")
    log = kubectl("logs", "job/imago-train")
    assert "epoch 1/60" not in log
    assert "epoch 60/60" in log
    assert kubectl("get", "job", "imago-train", "-o", "jsonpath={.status.failed}") in ("", "0")
