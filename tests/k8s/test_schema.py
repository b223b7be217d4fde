"""Manifests are valid for Kubernetes 1.30 to 1.36, without unknown fields.

Custom resources are validated by models in support/crd_models.py; test_crds.py has the operators'
own definitions.
"""

import copy
import json
from collections.abc import Iterator
from functools import cache

import kubernetes_validate
import pytest

from support import crd_models
from support.manifests import CASES, KSERVE, Manifest, render

KINDS = crd_models.custom_resource_models()
VERSIONS = [f"1.{minor}" for minor in range(30, 37)]
# Image volumes are newer than 1.30; the component names the version they need.
FROM = {"model-from-image": "1.31"}


@cache
def validate_json(manifest: str, version: str) -> None:
    """Validate a manifest once: most cases render most manifests alike."""
    kubernetes_validate.validate(json.loads(manifest), version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_renders(case):
    names = [(m["apiVersion"], m["kind"], m["metadata"]["name"]) for m in render(case)]
    assert names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES)
def test_built_in_kinds_match_the_schema_of_each_kubernetes(case):
    for version in VERSIONS:
        if any(name in case and version < first for name, first in FROM.items()):
            continue
        for manifest in render(case):
            if manifest["kind"] not in KINDS:
                validate_json(json.dumps(manifest), version)


def built_in(manifest: Manifest) -> Iterator[Manifest]:
    """Yield the built-in kinds inside a custom resource as objects."""
    spec = manifest["spec"]
    named = {"metadata": manifest["metadata"]}
    match manifest["kind"]:
        case "TrainingRuntime":
            for job in spec["template"]["spec"]["replicatedJobs"]:
                yield {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    **named,
                    "spec": job["template"]["spec"],
                }
        case "ScaledObject":
            yield {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                **named,
                "spec": {
                    "scaleTargetRef": {"kind": "Deployment", **spec["scaleTargetRef"]},
                    "maxReplicas": 1,
                    **spec["advanced"]["horizontalPodAutoscalerConfig"],
                },
            }


@pytest.mark.parametrize("case", [*CASES, KSERVE])
def test_custom_kinds_match_their_models(case):
    for manifest in render(case):
        if manifest["kind"] in KINDS:
            KINDS[manifest["kind"]].model_validate(manifest)
            for inner in built_in(manifest):
                kubernetes_validate.validate(inner, VERSIONS[-1], strict=True)
        else:
            group = manifest["apiVersion"].split("/")[0]
            is_built_in = "." not in group or group.endswith(".k8s.io")
            assert is_built_in, f"{manifest['kind']}: no model of this custom kind"


def test_the_check_is_strict():
    deployment = next(m for m in render("overlays/local") if m["kind"] == "Deployment")
    broken = {**deployment, "spec": {**deployment["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("ScaledObject", ("advanced", "horizontalPodAutoscalerConfig", "behavior", "scaleDown")),
        (
            "TrainingRuntime",
            ("template", "spec", "replicatedJobs", 0, "template", "spec", "template", "spec"),
        ),
    ],
)
def test_the_check_covers_built_in_kinds_in_custom_ones(kind, path):
    case = "components/keda,gpu-serving,gpu-training,training-kubeflow on local"
    broken = copy.deepcopy(next(m for m in render(case) if m["kind"] == kind))
    inside = broken["spec"]
    for step in path:
        inside = inside[step]
    inside["unheardOf"] = 1
    (inner,) = built_in(broken)
    with pytest.raises(kubernetes_validate.ValidationError, match="unheardOf"):
        kubernetes_validate.validate(inner, VERSIONS[-1], strict=True)


def test_the_local_overlay_has_no_custom_kind():
    assert not [m["kind"] for m in render("overlays/local") if m["kind"] in KINDS]
