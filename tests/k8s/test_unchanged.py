"""`kubectl apply` of manifests that the cluster has already changes nothing, and says so.

kubectl is the real one; the API server is support/api_server.py. kubectl compares a list without
merge keys as a whole: a default that the server adds to one of its items makes each apply a change.
"""

import copy
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from support.api_server import ApiServer, api_server, canonical_quantity
from support.fake_kubectl import needs_kubectl
from support.manifests import (
    COMPONENT_COMBINATIONS,
    COMPONENTS,
    KSERVE,
    OVERLAYS,
    Manifest,
    render,
)

# Every component occurs in one of them.
RENDERED = (
    *(f"overlays/{name}" for name in OVERLAYS),
    *COMPONENT_COMBINATIONS,
    "components/store-bucket,bulk-predict on local",
    KSERVE,
)
BUDGETS = "/poddisruptionbudgets/"


def run_kubectl(
    server: ApiServer, kubeconfig: Path, verb: str, manifests: list[Manifest]
) -> subprocess.CompletedProcess[str]:
    """Run `kubectl apply` or `kubectl diff` of these manifests."""
    server.add_kinds(manifests)
    server.write_kubeconfig(kubeconfig)
    options = ["--validate=false"] if verb == "apply" else []
    return subprocess.run(
        ["kubectl", verb, *options, "-f", "-"],
        input=yaml.safe_dump_all(manifests),
        capture_output=True,
        text=True,
        env={**os.environ, "KUBECONFIG": str(kubeconfig), "HOME": str(kubeconfig.parent)},
    )


def apply(server: ApiServer, kubeconfig: Path, manifests: list[Manifest]) -> list[str]:
    """Run `kubectl apply`, and return the lines that it prints."""
    result = run_kubectl(server, kubeconfig, "apply", manifests)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def all_manifests() -> list[Manifest]:
    """Return each manifest of RENDERED once, each with a name of its own."""
    distinct: dict[str, Manifest] = {}
    for case in RENDERED:
        for manifest in render(case):
            distinct[json.dumps(manifest, sort_keys=True)] = manifest

    named: list[Manifest] = []
    for number, manifest in enumerate(distinct.values()):
        renamed = copy.deepcopy(manifest)
        renamed["metadata"]["name"] += f"-{number}"
        named.append(renamed)
    return named


def test_every_component_is_applied():
    rendered = " ".join(RENDERED)
    in_overlays = {"api-key", "pod-monitor"}  # of ingress, and of overlays/cpu
    left = [name for name in COMPONENTS if name not in rendered and name not in in_overlays]
    assert left == []


@needs_kubectl
def test_all_manifests_are_unchanged_when_they_are_applied_again(tmp_path):
    manifests = all_manifests()
    with api_server() as server:
        created = apply(server, tmp_path / "kubeconfig", manifests)
        assert [line for line in created if not line.endswith(" created")] == []

        applied = apply(server, tmp_path / "kubeconfig", manifests)

    # kubectl always sends the selector of a disruption budget, which is replaced as a whole.
    patches = {path: patch for path, patch in server.patches.items() if BUDGETS not in path}
    assert patches == {}
    for path in server.patches:
        selector = server.objects[path]["spec"]["selector"]
        assert json.loads(server.patches[path]) == {"spec": {"selector": selector}}
    assert len(applied) == len(manifests)
    changed = [line for line in applied if not line.endswith(" unchanged")]
    assert len(changed) == len(server.patches)


@needs_kubectl
def test_a_deploy_compares_with_the_cluster_as_it_is(tmp_path):
    """`kubectl diff`, by which `make deploy` says that nothing differs, sees no change either."""
    manifests = list(render("overlays/cpu"))
    with api_server() as server:
        run_kubectl(server, tmp_path / "kubeconfig", "apply", manifests)
        assert run_kubectl(server, tmp_path / "kubeconfig", "diff", manifests).returncode == 0

        next(m for m in manifests if m["kind"] == "Service")["spec"]["ports"][0]["port"] = 81
        assert run_kubectl(server, tmp_path / "kubeconfig", "diff", manifests).returncode == 1


@needs_kubectl
@pytest.mark.parametrize(
    ("field", "value"),
    [("requests", {"cpu": "1000m", "memory": "512Mi"}), ("requests", {"memory": "0.5Gi"})],
)
def test_a_quantity_that_the_server_writes_in_another_way_is_a_change(field, value, tmp_path):
    """The stand-in for the API server shows what the test above looks for."""
    manifests = [copy.deepcopy(m) for m in render("overlays/local") if m["kind"] == "Deployment"]
    manifests[0]["spec"]["template"]["spec"]["containers"][0]["resources"][field] = value
    with api_server() as server:
        apply(server, tmp_path / "kubeconfig", manifests)
        (line,) = apply(server, tmp_path / "kubeconfig", manifests)
    assert line == "deployment.apps/imago-serving configured"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("1000m", "1"),
        ("0.5Gi", "512Mi"),
        ("1536Mi", "1536Mi"),
        ("1024Mi", "1Gi"),
        ("0.1", "100m"),
        ("1400m", "1400m"),
        (2, "2"),
        ("0", "0"),
    ],
)
def test_quantities_are_written_as_the_server_writes_them(text, canonical):
    assert canonical_quantity(text) == canonical
