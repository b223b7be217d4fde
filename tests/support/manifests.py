"""The manifests that `kubectl kustomize` renders from each overlay and each component.

What it prints is kept in the cache directory of pytest, for all test processes and further runs.
"""

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import pytest
import yaml

from support import ROOT

K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir() if path.is_dir())
TEMPORARY_PREFIX = ".test-"
KSERVE = "components/kserve on local"  # it has no Deployment, so test_kserve.py covers it
COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir() if path.name != "kserve")

# Each component with many others, in the order that k8s/README.md asks for.
COMPONENT_COMBINATIONS = [
    "components/gpu-serving,gpu-training,training-multinode,store-bucket,cron-training,"
    "canary-rollout,ingress on cpu",
    "components/keda,pdb,network-policy,service-monitor,training-kubeflow,model-from-image,"
    "canary-plain,gateway-route on local",
    "components/keda,gpu-serving,gpu-training,training-kubeflow,canary-rollout,prometheus-rules,"
    "grafana-dashboard on local",
    "components/hpa,network-policy,pod-monitor,training-multinode,store-bucket,canary-plain,kueue "
    "on local",
]
CASES = (
    [f"overlays/{name}" for name in OVERLAYS]
    + [f"components/{name}" for name in COMPONENTS]
    + COMPONENT_COMBINATIONS
)

# Created by hand or by `make deploy`, as k8s/README.md and the components say.
HAND_MADE_SECRETS = {"imago-tls", "imago-bucket", "imago-api-key"}

Manifest = dict


@cache
def render(case: str) -> tuple[Manifest, ...]:
    """Render an overlay as it is, or components as an overlay would list them.

    Examples: `overlays/cpu`; `components/pdb`, on the base; `components/hpa,pdb on local`, two
    components on that overlay.
    """
    if not case.startswith("components/"):
        return kustomize(K8S / case)

    names, _, overlay = case.removeprefix("components/").partition(" on ")
    resource = f"../{overlay}" if overlay else "../../base"
    return render_overlay(_kustomization(resource, names.split(",")))


def render_overlay(kustomization: str) -> tuple[Manifest, ...]:
    """Render an overlay with this kustomization.yaml."""
    with temporary_overlay(kustomization) as name:
        return kustomize(K8S / "overlays" / name)


@contextmanager
def temporary_overlay(kustomization: str) -> Iterator[str]:
    """Write an overlay for the duration of the block; yield its name."""
    with tempfile.TemporaryDirectory(dir=K8S / "overlays", prefix=TEMPORARY_PREFIX) as directory:
        (Path(directory) / "kustomization.yaml").write_text(kustomization)
        yield Path(directory).name


def overlay_with_components(*components: str) -> AbstractContextManager[str]:
    """A temporary overlay: the local one with these components."""
    return temporary_overlay(_kustomization("../local", components))


def _kustomization(resource: str, components: list[str] | tuple[str, ...]) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "imago",
            "resources": [resource],
            "components": [f"../../components/{name}" for name in components],
        }
    )


def kustomize(directory: Path) -> tuple[Manifest, ...]:
    """Run `kubectl kustomize`; skip the test where kubectl is not installed."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, so no manifest can be rendered")
    script = KUSTOMIZE.format(**kustomize_variables())
    result = subprocess.run(
        ["sh", "-c", script, "sh", "kustomize", directory], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return tuple(yaml.load_all(result.stdout, yaml.CSafeLoader))


# `kubectl kustomize DIRECTORY`, which runs once for the same contents of the directory.
KUSTOMIZE = """
rendered={cache}/$(LC_ALL=C; cat "$2"/* | sha256sum | cut -d' ' -f1)
if [ ! -e "$rendered" ]; then
  {kubectl} "$@" >"$rendered.$$" && mv "$rendered.$$" "$rendered" || exit 1
fi
exec cat "$rendered"
"""


def kustomize_variables() -> dict[str, str]:
    """Return the variables of the script KUSTOMIZE."""
    return {"cache": str(make_cache_directory()), "kubectl": str(shutil.which("kubectl"))}


@cache
def make_cache_directory() -> Path:
    """Make the directory for what is rendered from these manifests by this kubectl."""
    digest = hashlib.sha256()
    kubectl = Path(shutil.which("kubectl") or "/nowhere")
    for path in [kubectl, *sorted(K8S.rglob("*.*"))]:
        if path.is_file() and TEMPORARY_PREFIX not in str(path):
            digest.update(f"{path} {path.stat().st_mtime_ns}\n".encode())

    directory = ROOT / f".pytest_cache/manifests-{digest.hexdigest()[:16]}"
    if not directory.exists():
        for old in directory.parent.glob("manifests-*"):
            shutil.rmtree(old, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def manifests_of_kind(case: str, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in render(case) if manifest["kind"] in kinds]


def pod_templates(case: str) -> list[tuple[str, Manifest]]:
    """(kind/name, pod template) of everything that creates pods, custom resources included."""
    templates: list[tuple[str, Manifest]] = []
    for manifest in render(case):
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        spec = manifest.get("spec", {})
        match manifest["kind"]:
            case "Deployment" | "Job":
                templates.append((name, spec["template"]))
            case "CronJob":
                templates.append((name, spec["jobTemplate"]["spec"]["template"]))
            case "TrainingRuntime":
                for job in spec["template"]["spec"]["replicatedJobs"]:
                    templates.append((name, job["template"]["spec"]["template"]))
    return templates


def containers(template: Manifest) -> list[Manifest]:
    """All containers of a pod template, init containers first."""
    return template["spec"].get("initContainers", []) + template["spec"]["containers"]
