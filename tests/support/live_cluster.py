"""A real cluster, for the tests of what only running on one can show.

Opt-in, so that nobody's cluster is touched by chance: IMAGO_TEST_CONTEXT names the kubectl context of a one-node
cluster that holds the images of `make images`. The namespace imago is made and, at the end, deleted; so is what the
tests trained on the node.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from support.manifests import K8S, Manifest

ROOT = K8S.parent
CONTEXT = os.environ.get("IMAGO_TEST_CONTEXT")
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.usefixtures("deployed"),
    pytest.mark.skipif(not CONTEXT, reason="IMAGO_TEST_CONTEXT names no cluster to test on"),
]
SELECTOR = "app.kubernetes.io/component=serving"


def kubectl(*words: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        ["kubectl", "--context", CONTEXT, "-n", "imago", *words],
        input=stdin,
        capture_output=True,
        text=True,
    )
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


def pod_manifest(name: str, image: str, command: list[str], *claims: str) -> str:
    """The manifest of a pod that runs once under the restricted profile."""
    return json.dumps(
        {
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
                "volumes": [{"name": c, "persistentVolumeClaim": {"claimName": c}} for c in claims],
                "containers": [
                    {
                        "name": "c",
                        "image": image,
                        "command": command,
                        "volumeMounts": [
                            {
                                "name": c,
                                "mountPath": f"/{c.removeprefix('imago-')}",
                                "subPath": c.replace("-", "/"),
                            }
                            for c in claims
                        ],
                        "resources": {
                            "requests": {"cpu": "250m", "memory": "64Mi"}
                        },  # a client must not wait for its server
                        "securityContext": {
                            "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                        },
                    }
                ],
            },
        }
    )


def image_of(kind: str) -> str:
    path = "deployment/imago-serving" if kind == "serve" else "job/imago-train"
    return kubectl("get", path, "-o", "jsonpath={.spec.template.spec.containers[0].image}")


@contextmanager
def sustained_load(clients: int = 4, pause: float = 0.02, side: int = 8) -> Iterator[dict]:
    """Clients in a pod of their own, with images of so many pixels a side; the account is there after the block."""
    account: dict = {}
    script = (Path(__file__).parent / "cluster_load.py").read_text()
    kubectl(
        "apply",
        "-f",
        "-",
        stdin=pod_manifest(
            "load",
            image_of("serve"),
            [
                "python",
                "-c",
                script,
                "imago-serving.imago" if dns() else service_address(),
                str(clients),
                str(pause),
                str(side),
            ],
        ),
    )
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


def wait_for_rollout(name: str = "imago-serving", seconds: int = 180) -> None:
    kubectl("rollout", "status", f"deployment/{name}", f"--timeout={seconds}s")


def serving_pods() -> list[str]:
    return kubectl("get", "pods", "-l", SELECTOR, "-o", "name").split()


def render_with_components(*components: str, patches: tuple[Manifest, ...] = ()) -> list[Manifest]:
    """The local overlay with these components, as an overlay would list them."""
    with tempfile.TemporaryDirectory(dir=K8S / "overlays", prefix=".test-") as directory:
        (Path(directory) / "kustomization.yaml").write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "kustomize.config.k8s.io/v1beta1",
                    "kind": "Kustomization",
                    "namespace": "imago",
                    "resources": ["../local"],
                    "components": [f"../../components/{name}" for name in components],
                    "patches": list(patches),
                }
            )
        )
        return list(yaml.safe_load_all(kubectl("kustomize", directory)))


def apply(manifests: list[Manifest]) -> None:
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(manifests))


@contextmanager
def applied_components(*components: str, patches: tuple[Manifest, ...] = ()) -> Iterator[None]:
    """The local overlay with these components; afterwards without."""
    before, after = render_with_components(), render_with_components(*components, patches=patches)

    def named(manifests: list[Manifest]) -> dict[str, Manifest]:
        return {f"{m['kind']}/{m['metadata']['name']}": m for m in manifests}

    apply(after)
    try:
        yield
    finally:
        kubectl("delete", *sorted(named(after).keys() - named(before)))
        apply(before)
        wait_for_rollout()


def evict(pod: str) -> bool:
    """Ask for the eviction of `pod/NAME`; whether it was granted."""
    name = pod.removeprefix("pod/")
    path = f"/api/v1/namespaces/imago/pods/{name}/eviction"
    done = subprocess.run(
        ["kubectl", "--context", CONTEXT, "create", "--raw", path, "-f", "-"],
        input=json.dumps(
            {
                "apiVersion": "policy/v1",
                "kind": "Eviction",
                "metadata": {"name": name, "namespace": "imago"},
            }
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 or "disruption budget" in done.stderr, done.stderr
    return done.returncode == 0


def assert_no_request_lost(account: dict) -> None:
    assert account["count"] == 0, account["lost"]
    assert set(account["statuses"]) == {"200"}, account["statuses"]
    assert account["statuses"]["200"] > 100
