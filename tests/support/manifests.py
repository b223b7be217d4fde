"""What `kubectl kustomize` makes of each overlay, and of each component on the base."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import pytest
import yaml

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(p.name for p in (K8S / "overlays").iterdir() if p.is_dir())
COMPONENTS = sorted(p.name for p in (K8S / "components").iterdir())
COMPONENT_COMBINATIONS = [  # each component with many others, in the order that k8s/README.md asks for
    "components/gpu-serving,gpu-training,training-multinode,cron-training,model-from-bucket,canary-rollout,ingress "
    "on cpu",
    "components/keda,pdb,network-policy,service-monitor,training-kubeflow,model-from-image,canary-plain,gateway-route "
    "on local",
    "components/keda,gpu-serving,gpu-training,training-kubeflow,canary-rollout,prometheus-rules,grafana-dashboard "
    "on local",
    "components/hpa,network-policy,pod-monitor,training-multinode,model-from-bucket,canary-plain on local",
]
CASES = (
    [f"overlays/{name}" for name in OVERLAYS]
    + [f"components/{name}" for name in COMPONENTS]
    + COMPONENT_COMBINATIONS
)
HAND_MADE_SECRETS = {
    "imago-tls",
    "imago-bucket",
}  # made by hand, as k8s/README.md and the components say

Manifest = dict


@cache
def render(case: str) -> tuple[Manifest, ...]:
    """The manifests of an overlay as it is, or of components as an overlay would list them.

    `overlays/cpu`; `components/pdb`, which is on the base; `components/hpa,pdb on local`: two on that overlay.
    """
    if not case.startswith("components/"):
        return kustomize(K8S / case)
    listed, _, overlay = case.removeprefix("components/").partition(" on ")
    return render_overlay(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "namespace": "imago",
                "resources": [f"../{overlay}" if overlay else "../../base"],
                "components": [f"../../components/{name}" for name in listed.split(",")],
            }
        )
    )


def render_overlay(kustomization: str) -> tuple[Manifest, ...]:
    """The manifests of an overlay of one's own."""
    with temporary_overlay(kustomization) as name:
        return kustomize(K8S / "overlays" / name)


@contextmanager
def temporary_overlay(kustomization: str) -> Iterator[str]:
    """The name of an overlay that stands beside the others for a while."""
    with tempfile.TemporaryDirectory(dir=K8S / "overlays", prefix=".test-") as directory:
        (Path(directory) / "kustomization.yaml").write_text(kustomization)
        yield Path(directory).name


def overlay_with_components(*components: str) -> AbstractContextManager[str]:
    """The name of an overlay for a while: the local one with these components."""
    return temporary_overlay(
        yaml.safe_dump(
            {
                "kind": "Kustomization",
                "namespace": "imago",
                "resources": ["../local"],
                "components": [f"../../components/{name}" for name in components],
            }
        )
    )


def kustomize(directory: Path) -> tuple[Manifest, ...]:
    kubectl = shutil.which("kubectl") or pytest.skip(
        "kubectl is not installed, so nothing renders here"
    )
    done = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def manifests_of_kind(case: str, *kinds: str) -> list[Manifest]:
    return [m for m in render(case) if m["kind"] in kinds]


def pod_templates(case: str) -> list[tuple[str, Manifest]]:
    """(kind/name, pod template) of everything that makes pods, custom resources included."""
    found = []
    for manifest in render(case):
        name, spec = f"{manifest['kind']}/{manifest['metadata']['name']}", manifest.get("spec", {})
        match manifest["kind"]:
            case "Deployment" | "Job":
                found.append((name, spec["template"]))
            case "CronJob":
                found.append((name, spec["jobTemplate"]["spec"]["template"]))
            case "TrainingRuntime":
                jobs = spec["template"]["spec"]["replicatedJobs"]
                found += [(name, job["template"]["spec"]["template"]) for job in jobs]
    return found


def containers(template: Manifest) -> list[Manifest]:
    return template["spec"].get("initContainers", []) + template["spec"]["containers"]
