"""Validate custom resources by their operators' own definitions, without unknown fields.

Opt-in, because the definitions are large and not part of Imago. IMAGO_TEST_CRDS names a directory
with those of KEDA (config/crd/bases), Argo Rollouts (manifests/crds), Kubeflow Trainer
(manifests/base/crds), the Gateway API (config/crd/standard) and the Prometheus operator
(example/prometheus-operator-crd), each as in its repository. Without it, only test_schema.py
validates custom resources.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from support import crd_models
from support.manifests import CASES, render

PLACE = os.environ.get("IMAGO_TEST_CRDS")
pytestmark = pytest.mark.skipif(
    not PLACE, reason="IMAGO_TEST_CRDS names no directory of CustomResourceDefinitions"
)
WORDS = (
    "default",
    "example",
    "format",
)  # of a schema, which ask for nothing, or for what JSON Schema has no name for
OPEN = ("x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource")


def strict(schema: Any, top: bool = True) -> Any:
    """Return a definition's schema as JSON Schema without additional properties.

    The cluster would silently drop unknown fields.
    """
    if isinstance(schema, list):
        return [strict(part, top=False) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: {name: strict(part, top=False) for name, part in value.items()}
        if key == "properties"
        else strict(value, top=False)
        for key, value in schema.items()
        if key not in WORDS
    }
    if found.pop("x-kubernetes-int-or-string", False):
        found.pop("type", None)
        found["anyOf"] = [{"type": "string"}, {"type": "integer"}]
    if (
        found.get("properties")
        and "additionalProperties" not in found
        and not any(found.get(word) for word in OPEN)
    ):
        found["additionalProperties"] = False
    if top:
        found["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    return found


def definitions() -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield (apiVersion, kind) and the schema of each version of each definition."""
    for file in sorted(Path(PLACE or "").glob("*.yaml")):
        for definition in yaml.load_all(file.read_text(), yaml.CSafeLoader):
            spec = definition["spec"]
            for version in spec["versions"]:
                yield (
                    (f"{spec['group']}/{version['name']}", spec["names"]["kind"]),
                    strict(version["schema"]["openAPIV3Schema"]),
                )


@pytest.fixture(scope="module")
def validators() -> dict[tuple[str, str], jsonschema.Draft7Validator]:
    return {name: jsonschema.Draft7Validator(schema) for name, schema in definitions()}


@pytest.mark.parametrize("case", CASES)
def test_custom_kinds_match_their_definitions(case, validators):
    for manifest in render(case):
        if manifest["kind"] in crd_models.custom_resource_models():
            errors = validators[manifest["apiVersion"], manifest["kind"]].iter_errors(manifest)
            assert [f"{error.json_path}: {error.message}" for error in errors] == []


def test_an_unknown_field_is_an_error(validators):
    (scaled,) = (m for m in render("components/keda") if m["kind"] == "ScaledObject")
    known = validators[scaled["apiVersion"], "ScaledObject"]
    assert not known.is_valid({**scaled, "spec": {**scaled["spec"], "maxReplicas": 8}})
    assert not known.is_valid({**scaled, "spec": {**scaled["spec"], "maxReplicaCount": "eight"}})
