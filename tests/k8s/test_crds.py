"""Validate custom resources by their operators' own definitions, without unknown fields.

Opt-in, because the definitions are large and not part of Imago. IMAGO_TEST_CRDS names a directory
with those of KEDA (config/crd/bases), Argo Rollouts (manifests/crds), Kubeflow Trainer
(manifests/base/crds), the Gateway API (config/crd/standard), the Prometheus operator
(example/prometheus-operator-crd) and KServe (config/crd/full), each as in its repository. Without
it, only test_schema.py validates custom resources.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from support import crd_models
from support.manifests import CASES, KSERVE, render

DIRECTORY = os.environ.get("IMAGO_TEST_CRDS")
pytestmark = pytest.mark.skipif(
    not DIRECTORY, reason="IMAGO_TEST_CRDS names no directory of CustomResourceDefinitions"
)
# Keywords of a schema that restrict nothing, or that JSON Schema does not know.
IGNORED_KEYWORDS = ("default", "example", "format")
OPEN_KEYWORDS = ("x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource")


def forbid_unknown_fields(schema: Any, is_top: bool = True) -> Any:
    """Return a definition's schema as JSON Schema without additional properties.

    The cluster would silently drop unknown fields.
    """
    if isinstance(schema, list):
        return [forbid_unknown_fields(part, is_top=False) for part in schema]
    if not isinstance(schema, dict):
        return schema

    strict: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":  # the keys inside are names of fields, not keywords
            strict[key] = {
                name: forbid_unknown_fields(part, is_top=False) for name, part in value.items()
            }
        elif key not in IGNORED_KEYWORDS:
            strict[key] = forbid_unknown_fields(value, is_top=False)

    if strict.pop("x-kubernetes-int-or-string", False):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "string"}, {"type": "integer"}]
    is_open = any(strict.get(keyword) for keyword in OPEN_KEYWORDS)
    if strict.get("properties") and not is_open:
        strict.setdefault("additionalProperties", False)
    if is_top:
        strict["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
    return strict


def definitions() -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield (apiVersion, kind) and the schema of each version of each definition."""
    for file in sorted(Path(DIRECTORY or "").glob("*.yaml")):
        for definition in yaml.load_all(file.read_text(), yaml.CSafeLoader):
            spec = definition["spec"]
            for version in spec["versions"]:
                yield (
                    (f"{spec['group']}/{version['name']}", spec["names"]["kind"]),
                    forbid_unknown_fields(version["schema"]["openAPIV3Schema"]),
                )


@pytest.fixture(scope="module")
def validators() -> dict[tuple[str, str], jsonschema.Draft7Validator]:
    return {name: jsonschema.Draft7Validator(schema) for name, schema in definitions()}


@pytest.mark.parametrize("case", [*CASES, KSERVE])
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
