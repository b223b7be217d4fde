"""The local overlay on a real cluster: what only running it can show.

Opt-in, so that nobody's cluster is touched by chance: IMAGO_TEST_CONTEXT names the kubectl context of a one-node
cluster that holds the images of `make images`. The namespace imago is made and, at the end, deleted.
"""
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONTEXT = os.environ.get("IMAGO_TEST_CONTEXT")
pytestmark = [
    pytest.mark.slow, pytest.mark.timeout(1500),
    pytest.mark.skipif(not CONTEXT, reason="IMAGO_TEST_CONTEXT names no cluster to test on"),
]
SELECTOR = "app.kubernetes.io/component=serving"


def kubectl(*words: str, stdin: str | None = None) -> str:
    done = subprocess.run(["kubectl", "--context", CONTEXT, "-n", "imago", *words], input=stdin, capture_output=True,
                          text=True)
    assert done.returncode == 0, f"kubectl {' '.join(words)}: {done.stderr}"
    return done.stdout


def make(*words: str) -> None:
    done = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for(what: str, true, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"waited {seconds} s for {what}:\n{kubectl('get', 'pods')}"
        time.sleep(0.5)


def pod(name: str, image: str, command: list[str], *claims: str) -> str:
    """The manifest of a pod that runs once under the restricted profile."""
    return json.dumps({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 60,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": c, "persistentVolumeClaim": {"claimName": c}} for c in claims],
            "containers": [{
                "name": "c", "image": image, "command": command,
                "volumeMounts": [{"name": c, "mountPath": f"/{c.removeprefix('imago-')}",
                                  "subPath": c.replace("-", "/")} for c in claims],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}]}})


def image(kind: str) -> str:
    path = "deployment/imago-serving" if kind == "serve" else "job/imago-train"
    return kubectl("get", path, "-o", "jsonpath={.spec.template.spec.containers[0].image}")


@contextmanager
def load(clients: int = 4, pause: float = 0.02) -> Iterator[dict]:
    """Clients in a pod of their own; the account is there when the block has ended."""
    account: dict = {}
    script = (Path(__file__).parent / "loader.py").read_text()
    kubectl("apply", "-f", "-", stdin=pod("load", image("serve"), [
        "python", "-c", script, "imago-serving.imago" if dns() else service_address(), str(clients), str(pause)]))
    kubectl("wait", "--for=condition=Ready", "pod/load", "--timeout=60s")
    wait_for("the load to start", lambda: "started" in kubectl("logs", "load"))
    time.sleep(2)
    try:
        yield account
        time.sleep(2)
        kubectl("exec", "load", "--", "python", "-c", "import os; os.kill(1, 15)")
        wait_for("the account", lambda: "lost" in kubectl("logs", "load"))
        account.update(json.loads(kubectl("logs", "load").splitlines()[-1]))
        print(account)
    finally:
        kubectl("delete", "pod", "load", "--grace-period=1", "--wait=true")


def dns() -> bool:
    return bool(kubectl("get", "pods", "-n", "kube-system", "-l", "k8s-app=kube-dns", "-o", "name"))


def service_address() -> str:
    return kubectl("get", "service", "imago-serving", "-o", "jsonpath={.spec.clusterIP}")


def rolled_out(seconds: int = 180) -> None:
    kubectl("rollout", "status", "deployment/imago-serving", f"--timeout={seconds}s")


def nothing_lost(account: dict) -> None:
    assert account["count"] == 0, account["lost"]
    assert set(account["statuses"]) == {"200"}, account["statuses"]
    assert account["statuses"]["200"] > 100


@pytest.fixture(scope="module", autouse=True)
def deployed() -> Iterator[None]:
    subprocess.run(["kubectl", "config", "use-context", CONTEXT], check=True, capture_output=True)
    make("deploy", "OVERLAY=local")
    yield
    if not os.environ.get("IMAGO_TEST_KEEP"):
        make("undeploy", "OVERLAY=local", "PURGE=1")


def test_the_job_completes_and_the_deployment_is_ready():
    kubectl("wait", "--for=condition=Complete", "job/imago-train", "--timeout=300s")
    assert kubectl("get", "deployment", "imago-serving", "-o", "jsonpath={.status.readyReplicas}") == "2"


def test_a_second_deploy_changes_nothing():
    before = kubectl("get", "pods", "-o", "jsonpath={.items[*].metadata.uid}")
    make("deploy", "OVERLAY=local")
    assert kubectl("get", "pods", "-o", "jsonpath={.items[*].metadata.uid}") == before


def test_an_image_that_is_not_there_is_one_line():
    done = subprocess.run(["make", "deploy", "TAG=no-such"], cwd=ROOT, capture_output=True, text=True)
    try:
        assert done.returncode == 2
        assert "imago-serve:no-such is not on the node" in done.stderr.splitlines()[-2]
    finally:
        kubectl("rollout", "undo", "deployment/imago-serving")
        rolled_out()


def test_a_rolling_update_loses_no_request():
    with load() as account:
        kubectl("rollout", "restart", "deployment/imago-serving")
        rolled_out()
        wait_for("the old pods to go", lambda: len(kubectl("get", "pods", "-l", SELECTOR, "-o", "name").split()) == 2)
    nothing_lost(account)


def test_deleted_pods_lose_no_request():
    with load() as account:
        for name in kubectl("get", "pods", "-l", SELECTOR, "-o", "name").split():
            kubectl("delete", name, "--wait=true")
            rolled_out()
    nothing_lost(account)


def test_scaling_loses_no_request():
    with load() as account:
        for count in (1, 3, 1, 2):
            make("scale", f"N={count}")
            wait_for(f"{count} pods",
                     lambda count=count: len(kubectl("get", "pods", "-l", SELECTOR, "-o", "name").split()) == count)
    nothing_lost(account)


SPOIL = """
import pathlib, shutil
store = pathlib.Path("/store/digits")
shutil.rmtree(store / "99", ignore_errors=True)
shutil.copytree(store / "1", store / "99")
manifest = store / "99/manifest.json"
manifest.write_text(manifest.read_text().replace('"version": 1,', '"version": 99,'))
graph = store / "99/model.onnx"
graph.write_bytes(graph.read_bytes()[:-8] + b"spoilt!!")
"""


def test_a_bad_version_gets_no_traffic():
    kubectl("apply", "-f", "-", stdin=pod("spoil", image("serve"), ["python", "-c", SPOIL], "imago-store"))
    kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", "pod/spoil", "--timeout=60s")
    kubectl("delete", "pod", "spoil")
    with load() as account:
        kubectl("set", "env", "deployment/imago-serving", "IMAGO_VERSION=99")
        new = None

        def started() -> bool:
            nonlocal new
            found = json.loads(kubectl("get", "pods", "-l", SELECTOR, "-o", "json"))["items"]
            new = next((p for p in found if {"name": "IMAGO_VERSION", "value": "99"} in
                        p["spec"]["containers"][0].get("env", [])), None)
            status = (new or {"status": {}})["status"].get("containerStatuses", [{}])[0]
            return bool(status.get("started") or status.get("restartCount"))

        wait_for("the bad pod to start", started)
        time.sleep(15)
        name = new["metadata"]["name"]
        status = json.loads(kubectl("get", "pod", name, "-o", "json"))["status"]["containerStatuses"][0]
        assert not status["ready"]
        assert kubectl("get", "deployment", "imago-serving", "-o", "jsonpath={.status.readyReplicas}") == "2"
        kubectl("rollout", "undo", "deployment/imago-serving")
        rolled_out()
    nothing_lost(account)
    assert set(account["versions"]) == {"1"}


def train_pods() -> list[dict]:
    return json.loads(kubectl("get", "pods", "-l", "batch.kubernetes.io/job-name=imago-train", "-o", "json"))["items"]


def again(*args: str) -> None:
    """The training Job anew, with these arguments instead of its own."""
    kubectl("delete", "job", "imago-train", "--ignore-not-found", "--wait=true")
    rendered = subprocess.run([ROOT / "k8s/cluster", "render"], capture_output=True, text=True, check=True).stdout
    job = next(m for m in yaml.safe_load_all(rendered) if m["kind"] == "Job")
    job["spec"]["template"]["spec"]["containers"][0]["args"] += args
    kubectl("apply", "-f", "-", stdin=json.dumps(job))


def test_a_wrong_setting_fails_at_once():
    again("--trainer.max_epochs=none-at-all")
    kubectl("wait", "--for=condition=Failed", "job/imago-train", "--timeout=120s")
    assert len(train_pods()) == 1
    assert "max_epochs" in kubectl("logs", "job/imago-train").splitlines()[-1]
    assert "PodFailurePolicy" in kubectl("get", "job", "imago-train", "-o", "jsonpath={.status.conditions}")


def test_an_evicted_pod_goes_on_where_it_was():
    again("--trainer.max_epochs=60", "--name=resumed")
    wait_for("some epochs", lambda: train_pods() and train_pods()[0]["status"]["phase"] == "Running"
             and "epoch 5/60" in kubectl("logs", "job/imago-train"), 240)
    first = train_pods()[0]["metadata"]["name"]
    kubectl("create", "--raw", f"/api/v1/namespaces/imago/pods/{first}/eviction", "-f", "-", stdin=json.dumps(
        {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first, "namespace": "imago"}}))
    kubectl("wait", "--for=condition=Complete", "job/imago-train", "--timeout=600s")
    log = kubectl("logs", "job/imago-train")
    assert "epoch 1/60" not in log
    assert "epoch 60/60" in log
    assert kubectl("get", "job", "imago-train", "-o", "jsonpath={.status.failed}") in ("", "0")
