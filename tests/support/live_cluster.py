"""A real cluster, for the tests that need one.

Opt-in, so that no cluster is changed by accident: IMAGO_TEST_CONTEXT names the kubectl context of a
one-node cluster that holds the images of `make images`. The tests create the namespace imago and
delete it at the end, with everything they trained on the node.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from support import ROOT, load_generator
from support.manifests import K8S, Manifest

CONTEXT = os.environ.get("IMAGO_TEST_CONTEXT")
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.usefixtures("deployed"),
    pytest.mark.skipif(not CONTEXT, reason="IMAGO_TEST_CONTEXT does not name a cluster"),
]
SELECTOR = "app.kubernetes.io/component=serving"


def kubectl(*words: str, stdin: str | None = None) -> str:
    """Run kubectl in the namespace imago and return what it prints."""
    result = subprocess.run(
        ["kubectl", "--context", CONTEXT, "-n", "imago", *words],
        input=stdin,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"kubectl {' '.join(words)}: {result.stderr}"
    return result.stdout


def make(*words: str) -> None:
    result = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def wait_for(description: str, condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        in_time = time.monotonic() < deadline
        assert in_time, f"waited {seconds} s for {description}:\n{kubectl('get', 'pods')}"
        time.sleep(0.5)


def pod_manifest(name: str, image: str, command: list[str], *claims: str) -> str:
    """The manifest of a pod that runs once under the restricted profile.

    Each claim, e.g. imago-store, is mounted at the path of its last part, e.g. /store.
    """
    mounts = [
        {
            "name": claim,
            "mountPath": f"/{claim.removeprefix('imago-')}",
            "subPath": claim.replace("-", "/"),
        }
        for claim in claims
    ]
    container = {
        "name": "c",
        "image": image,
        "command": command,
        "volumeMounts": mounts,
        # Small, so that the pod fits on the node next to the server.
        "resources": {"requests": {"cpu": "250m", "memory": "64Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "terminationGracePeriodSeconds": 60,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumes": [
                {"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims
            ],
            "containers": [container],
        },
    }
    return json.dumps(pod)


def image_of(kind: str) -> str:
    """The image that the cluster runs, of "serve" or "train"."""
    workload = "deployment/imago-serving" if kind == "serve" else "job/imago-train"
    return kubectl("get", workload, "-o", "jsonpath={.spec.template.spec.containers[0].image}")


@contextmanager
def sustained_load(
    clients: int = 4, rate: float | None = 150, side: int = 8
) -> Iterator[dict[str, object]]:
    """Run the load generator in a separate pod within the block.

    `rate`: requests per second, None for as many as the clients can; `side`: pixels a side of the
    image. The dict is filled with the counts after the block.
    """
    host = "imago-serving.imago" if has_dns() else service_address()
    script = Path(load_generator.__file__).read_text()
    command = ["python", "-c", script, f"{host}:80", f"--clients={clients}", f"--side={side}"]
    if rate is not None:
        command.append(f"--rate={rate}")

    counts: dict[str, object] = {}
    kubectl("apply", "-f", "-", stdin=pod_manifest("load", image_of("serve"), command))
    kubectl("wait", "--for=condition=Ready", "pod/load", "--timeout=60s")
    wait_for("the load to start", lambda: "started" in kubectl("logs", "load"))
    time.sleep(2)  # requests before and after what the block does
    try:
        yield counts
        time.sleep(2)
        kubectl("exec", "load", "--", "python", "-c", "import os; os.kill(1, 15)")
        wait_for("the counts", lambda: "unanswered" in kubectl("logs", "load"))
        counts.update(json.loads(kubectl("logs", "load").splitlines()[-1]))
        print(counts)
    finally:
        kubectl("delete", "pod", "load", "--grace-period=1", "--wait=true")


def assert_no_request_lost(counts: dict) -> None:
    """Assert that every request was answered with 200, and that there were some."""
    assert counts["unanswered_count"] == 0, counts["unanswered"]
    assert set(counts["statuses"]) == {"200"}, counts["statuses"]
    assert counts["statuses"]["200"] > 100


def has_dns() -> bool:
    return bool(kubectl("get", "pods", "-n", "kube-system", "-l", "k8s-app=kube-dns", "-o", "name"))


def service_address() -> str:
    return kubectl("get", "service", "imago-serving", "-o", "jsonpath={.spec.clusterIP}")


def wait_for_rollout(name: str = "imago-serving", seconds: int = 180) -> None:
    kubectl("rollout", "status", f"deployment/{name}", f"--timeout={seconds}s")


def serving_pods() -> list[str]:
    """The serving pods as `pod/NAME`."""
    return kubectl("get", "pods", "-l", SELECTOR, "-o", "name").split()


def render_with_components(*components: str, patches: tuple[Manifest, ...] = ()) -> list[Manifest]:
    """Render the local overlay with these components, as an overlay would list them."""
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "imago",
        "resources": ["../local"],
        "components": [f"../../components/{name}" for name in components],
        "patches": list(patches),
    }
    with tempfile.TemporaryDirectory(dir=K8S / "overlays", prefix=".test-") as directory:
        (Path(directory) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return list(yaml.safe_load_all(kubectl("kustomize", directory)))


def apply(manifests: list[Manifest]) -> None:
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))


@contextmanager
def applied_components(*components: str, patches: tuple[Manifest, ...] = ()) -> Iterator[None]:
    """Apply the local overlay with these components within the block, and without them after."""
    before = render_with_components()
    after = render_with_components(*components, patches=patches)
    added = _manifest_names(after) - _manifest_names(before)

    apply(after)
    try:
        yield
    finally:
        kubectl("delete", *sorted(added))
        apply(before)
        wait_for_rollout()


def _manifest_names(manifests: list[Manifest]) -> set[str]:
    return {f"{manifest['kind']}/{manifest['metadata']['name']}" for manifest in manifests}


def evict(pod: str) -> bool:
    """Request the eviction of `pod/NAME`; return whether the disruption budget allowed it."""
    name = pod.removeprefix("pod/")
    path = f"/api/v1/namespaces/imago/pods/{name}/eviction"
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": name, "namespace": "imago"},
    }
    result = subprocess.run(
        ["kubectl", "--context", CONTEXT, "create", "--raw", path, "-f", "-"],
        input=json.dumps(eviction),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 or "disruption budget" in result.stderr, result.stderr
    return result.returncode == 0
