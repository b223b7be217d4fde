"""Components on the local overlay of a real cluster; support/live_cluster.py says on which."""

import json
import time

import pytest

from support.live_cluster import (
    MARKS,
    applied_components,
    apply,
    assert_no_request_lost,
    evict,
    has_dns,
    image_of,
    kubectl,
    pod_manifest,
    render_with_components,
    serving_pods,
    sustained_load,
    wait_for,
    wait_for_rollout,
)

pytestmark = MARKS


def ready_replicas() -> int:
    ready = "jsonpath={.status.readyReplicas}"
    return int(kubectl("get", "deployment", "imago-serving", "-o", ready) or 0)


# Only pending images, because CPU needs metrics-server, and a short stabilization window.
QUICK_SCALE_DOWN = {
    "target": {"kind": "HorizontalPodAutoscaler"},
    "patch": json.dumps(
        [
            {"op": "remove", "path": "/spec/metrics/1"},
            {"op": "replace", "path": "/spec/maxReplicas", "value": 3},
            {
                "op": "replace",
                "path": "/spec/behavior/scaleDown",
                "value": {
                    "stabilizationWindowSeconds": 15,
                    "policies": [{"type": "Pods", "value": 1, "periodSeconds": 15}],
                },
            },
        ]
    ),
}


def test_replicas_follow_pending_images():
    if "v1beta1.custom.metrics.k8s.io" not in kubectl("get", "apiservices", "-o", "name"):
        pytest.skip("the cluster has no custom metrics API (prometheus-adapter)")
    components = ["hpa"]
    if "podmonitors.monitoring.coreos.com" in kubectl("get", "crds", "-o", "name"):
        components.append("pod-monitor")

    with applied_components(*components, patches=(QUICK_SCALE_DOWN,)):
        wait_for("one replica without load", lambda: len(serving_pods()) == 1, 300)
        # 64 pending images are enough for 4 replicas; 3 are allowed.
        with sustained_load(clients=64, rate=None, side=1500) as counts:
            wait_for("3 replicas", lambda: ready_replicas() == 3, 300)
        assert_no_request_lost(counts)
        with sustained_load() as counts:
            wait_for("one replica afterwards", lambda: len(serving_pods()) == 1, 300)
        assert_no_request_lost(counts)


MAKE_SECOND_VERSION = """
import pathlib, shutil
from models.bundle import checksums
store = pathlib.Path("/store/digits")
shutil.copytree(store / "1", store / "2", dirs_exist_ok=True)
manifest = store / "2/manifest.json"
manifest.write_text(manifest.read_text().replace('"version": 1,', '"version": 2,'))
checksums.write_checksums(store / "2")
"""
METRICS = (
    "import urllib.request as r; print(r.urlopen('http://localhost:9090/metrics').read().decode())"
)


def test_a_canary_gets_its_share_and_loses_no_request():
    kubectl(
        "apply",
        "-f",
        "-",
        stdin=pod_manifest(
            "second", image_of("serve"), ["python", "-c", MAKE_SECOND_VERSION], "imago-store"
        ),
    )
    kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/second", "--timeout=60s")
    kubectl("delete", "pod", "second")
    with applied_components("canary-plain"):
        wait_for_rollout()
        wait_for_rollout("imago-serving-canary")
        with sustained_load(clients=16) as counts:
            time.sleep(10)  # of load: enough requests to measure the share of each version
            metrics = kubectl(
                "exec", "deployment/imago-serving-canary", "--", "python", "-c", METRICS
            )
    assert_no_request_lost(counts)
    assert 0.05 < counts["versions"]["2"] / sum(counts["versions"].values()) < 0.6
    assert "imago_shadow_images_total{" in metrics


def test_a_drain_evicts_one_pod_at_a_time():
    with applied_components("pdb"), sustained_load() as counts:
        kubectl(
            "wait",
            "--for=jsonpath={.status.disruptionsAllowed}=1",
            "pdb/imago-serving",
            "--timeout=60s",
        )
        wait_for("two pods, and none of another test", lambda: len(serving_pods()) == 2)
        first, second = serving_pods()
        assert evict(first)
        assert not evict(second)
        wait_for("the second eviction to be granted", lambda: evict(second))
        wait_for_rollout()
    assert_no_request_lost(counts)


def test_network_policies_let_predictions_through():
    with applied_components("network-policy"), sustained_load() as counts:
        time.sleep(5)  # of load, with the policies in place
    assert_no_request_lost(counts)


def test_the_cron_job_trains():
    with applied_components("cron-training"):
        kubectl("create", "job", "imago-train-first", "--from=cronjob/imago-train")
        kubectl("wait", "--for=condition=Complete", "job/imago-train-first", "--timeout=600s")
        kubectl("delete", "job", "imago-train-first")


def test_two_pods_train_one_model():
    if not has_dns():
        pytest.skip("the cluster has no DNS, which the pods need to find each other")
    kubectl("delete", "job", "imago-train", "--cascade=foreground")
    try:
        apply(render_with_components("training-multinode"))
        kubectl("wait", "--for=condition=Complete", "job/imago-train", "--timeout=900s")
        logs = [
            kubectl("logs", name)
            for name in kubectl(
                "get", "pods", "-l", "batch.kubernetes.io/job-name=imago-train", "-o", "name"
            ).split()
        ]
        assert len(logs) == 2
        assert sum("test accuracy" in log for log in logs) == 1
    finally:
        kubectl("delete", "job/imago-train", "service/imago-train", "--cascade=foreground")
